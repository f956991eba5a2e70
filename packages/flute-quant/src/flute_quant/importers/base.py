"""What an importer makes of somebody else's checkpoint, before a weight is read and while it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flute_kernels import FormatError, QuantizedLinear, QuantSpec
from flute_quant.checkpoint.safetensors_reader import DTYPE_NAMES
from flute_quant.checkpoint.safetensors_writer import TensorSlot
from flute_quant.errors import CheckpointError

__all__ = [
    "Candidate",
    "Imported",
    "Importer",
    "PassedTensor",
    "Source",
    "SourceFile",
    "SourceLinear",
    "checked_spec",
]


@dataclass(frozen=True)
class Imported:
    """One linear in FLUTE's format.

    Args:
        linear: the stored tensors, without a bias.
        error: squared difference from the source's dequantized weight relative to that weight's energy;
            0 where the two are equal.
    """

    linear: QuantizedLinear
    error: float = 0.0


@dataclass(frozen=True)
class SourceLinear:
    """One quantized linear of a source, as far as its small tensors tell.

    Args:
        name: of the module, as the output's tensors will call it.
        out_features, in_features: shape of the weight ``[N, K]``.
        spec: what it becomes.
        scale_dtype, table_dtype: of the tensors to come.
        read: reads the codes and makes the stored tensors.
        note: what is different from the source, in words, or None.
    """

    name: str
    out_features: int
    in_features: int
    spec: QuantSpec
    scale_dtype: torch.dtype
    table_dtype: torch.dtype
    read: Callable[[], Imported]
    note: str | None = None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        """The tensors that it will be stored as."""
        shapes = self.spec.shapes(self.out_features, self.in_features)
        dtypes = {"qweight": torch.int32, "scales": self.scale_dtype, "codebook": self.table_dtype}
        return tuple(TensorSlot(f"{self.name}.{p}", DTYPE_NAMES[d], shapes[p]) for p, d in dtypes.items())


@dataclass(frozen=True)
class PassedTensor:
    """A tensor that is no linear's code, scale or table: written as it is, or cast."""

    slot: TensorSlot
    blocks: Callable[[], Iterable[bytes | memoryview]]


@dataclass(frozen=True)
class SourceFile:
    """One output file."""

    name: str
    linears: tuple[SourceLinear, ...]
    passed: tuple[PassedTensor, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint that an importer has understood.

    Args:
        path: the folder or file.
        config: what the output's ``config.json`` holds, without a ``quantization_config``.
        files: the output files; there is an index if ``sharded``.
        identity: all of the source that decides about the output's bytes, as JSON.
        nbytes: size of its weight files.
        side_files: writes tokenizer, generation config and the like into a folder.
        left: linears that stay in 16 bits to the reason, where the importer knows one.
        unheld: those of them that are quantized in the source, in a way that the format cannot hold.
        notes: what else a user should know, in sentences.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[SourceFile, ...]
    sharded: bool
    identity: list[Any]
    nbytes: int
    side_files: Callable[[Path], None]
    left: dict[str, str] = field(default_factory=dict)
    unheld: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A path that may be a source, with what is told at first sight.

    Args:
        path: a folder, or a GGUF file.
        config: content of its ``config.json``; empty where there is none.
        gguf: the GGUF file that ``path`` is or holds.
        dtype: that tensors are given which are quantized in the source and cannot stay it.
    """

    path: Path
    config: dict[str, Any]
    gguf: Path | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config``, or an empty one."""
        given = self.config.get("quantization_config")
        return given if isinstance(given, dict) else {}

    @property
    def method(self) -> str:
        """The ``quant_method`` that the config names, or an empty text."""
        return str(self.quantization.get("quant_method") or "")


@dataclass(frozen=True)
class Importer:
    """One kind of source.

    Args:
        name: on the command line.
        summary: what it takes, for people.
        recognises: whether a candidate is of this kind, as far as its config tells.
        open: understands it. It raises CheckpointError for what is damaged and QuantizationError for
            what the format cannot hold, and reads no codes.
    """

    name: str
    summary: str
    recognises: Callable[[Candidate], bool]
    open: Callable[[Candidate], Source]


def checked_spec(name: str, out_features: int, in_features: int, **fields: int) -> QuantSpec:
    """A spec that the format has for this shape; else a refusal that names the tensor."""
    try:
        spec = QuantSpec(**fields)
        spec.shapes(out_features, in_features)
    except FormatError as error:
        raise CheckpointError(f"{name}, {out_features} x {in_features}: {error}") from None
    return spec
