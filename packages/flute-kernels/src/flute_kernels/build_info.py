"""What this build of flute-kernels contains and what it uses on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flute_kernels import _C
from flute_kernels.errors import UnsupportedError

__all__ = ["BuildInfo", "build_info", "check_environment"]


@dataclass(frozen=True)
class BuildInfo:
    """Version, compiled GPU architectures, CPU instruction sets.

    Attributes:
        version: of the flute-kernels distribution.
        cuda_version: of the toolkit that compiled the GPU kernels; empty without any.
        cuda_architectures: ``sm_90`` for machine code, ``compute_90`` for PTX; empty without GPU kernels.
        cpu_isas: instruction sets in this build that the processor has, best first.
        cpu_isa: the one in use.
    """

    version: str
    cuda_version: str
    cuda_architectures: tuple[str, ...]
    cpu_isas: tuple[str, ...]
    cpu_isa: str


def build_info() -> BuildInfo:
    """Describe the installed build."""
    return BuildInfo(
        version=_version(),
        cuda_version=_C.CUDA_VERSION,
        cuda_architectures=tuple(_C.CUDA_ARCHITECTURES.split()),
        cpu_isas=tuple(_C.available_isas()),
        cpu_isa=_C.isa(),
    )


def _version() -> str:
    try:
        return version("flute-kernels")
    except PackageNotFoundError:  # a source tree that is imported without being installed
        return (Path(__file__).parents[2] / "VERSION").read_text(encoding="utf-8").strip()


def check_environment() -> None:
    """Raise UnsupportedError where FLUTE_CPU_ISA names an instruction set that cannot be used here."""
    wanted = os.environ.get("FLUTE_CPU_ISA")
    if wanted and wanted not in _C.available_isas():
        raise UnsupportedError(
            f"FLUTE_CPU_ISA is {wanted!r}; this build has, for this processor, "
            f"{', '.join(_C.available_isas())}."
        )
