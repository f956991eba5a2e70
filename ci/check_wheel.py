"""What `nox -s wheels` asks of a wheel of flute-kernels: that it is and holds what its label promises.

    python ci/check_wheel.py WHEEL LABEL VERSION

Run with the environment that the wheel is installed in; torch need not be there.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType


def check(condition: bool, message: str) -> None:
    """End with ``message`` unless ``condition`` holds."""
    if not condition:
        sys.exit(f"wheels: {message}")


def extension() -> Path:
    """Where the installed wheel's compiled module is; asked of the file list, not by importing."""
    files = [file for file in metadata.files("flute-kernels") or [] if file.suffix == ".so"]
    check(len(files) == 1, f"the wheel has {len(files)} compiled modules; expected 1.")
    return Path(str(files[0].locate())).resolve()


def load(path: Path) -> ModuleType:
    """The compiled module by its path, because importing the package imports torch."""
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def promised(architectures: list[str]) -> list[str]:
    """CMake's architectures in the toolkit's words: sm_90 is machine code, compute_90 PTX."""
    names = []
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        names += [f"sm_{number}"] if kind != "virtual" else []
        names += [f"compute_{number}"] if kind != "real" else []
    return names + (["sm_90a"] if "sm_90" in names else [])  # Hopper's own room


def found(cuobjdump: str, path: Path) -> dict[str, int]:
    """How many pieces of code ``path`` has for every architecture, as the toolkit lists them."""
    counts: dict[str, int] = {}
    for option, prefix in (("--list-elf", "sm_"), ("--list-ptx", "compute_")):
        listing = subprocess.run([cuobjdump, option, str(path)], capture_output=True, text=True).stdout
        for number in re.findall(r"\.sm_(\w+)\.", listing):
            counts[prefix + number] = counts.get(prefix + number, 0) + 1
    return counts


def main(wheel: Path, label: str, version: str) -> None:
    """Check one wheel and print a line about it."""
    entries = json.loads((Path(__file__).parent / "wheels.json").read_text(encoding="utf-8"))["kernels"]
    entry = next(entry for entry in entries if entry["label"] == label)
    installed = metadata.version("flute-kernels")
    check(installed == version, f"{wheel.name} has version {installed}; expected {version}.")
    module = load(extension())
    expected = promised(entry["architectures"])
    check(
        module.CUDA_ARCHITECTURES.split() == expected,
        f"{wheel.name} was compiled for {module.CUDA_ARCHITECTURES or 'no GPU'}; "
        f"{label} promises {' '.join(expected) or 'none'}.",
    )
    cuda = ".".join(module.CUDA_VERSION.split(".")[:2])
    check(
        cuda == (entry["cuda"] or ""),
        f"{wheel.name} was compiled with CUDA {cuda or '(none)'}; {label} promises {entry['cuda']}.",
    )
    inside = "no GPU code" if not expected else "for " + " ".join(expected)
    if expected and (cuobjdump := shutil.which("cuobjdump")):
        counts = found(cuobjdump, extension())
        check(
            sorted(counts) == sorted(expected),
            f"{wheel.name} holds code for {' '.join(counts) or 'no GPU'}; "
            f"{label} promises {' '.join(expected)}.",
        )
        inside = "holds " + ", ".join(f"{name} ({counts[name]})" for name in expected)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {inside}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
