"""The layer law of the packages and of csrc, read from the sources: an arrow never points back."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).resolve().parents[2] / "packages"
CSRC = PACKAGES / "flute-kernels/csrc"

# Beside the standard library. What is imported inside functions only is needed by some users only.
ALLOWED = {
    "flute_kernels": {"torch"},
    "flute_quant": {"flute_kernels", "numpy", "rich", "safetensors", "torch"},
    "flute_hf": {"flute_kernels", "flute_quant", "peft", "safetensors", "torch", "transformers"},
    "flute_vllm": {"flute_kernels", "flute_quant", "safetensors", "torch", "vllm"},
}
LAZILY = {"flute_quant": {"gguf", "lm_eval", "transformers", "yaml"}}


def imports(file: Path, package: str) -> Iterator[tuple[str, int, bool]]:
    """Top-level module, line, and whether it is imported only when a function runs."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name.partition(".")[0], child.lineno, lazy
            elif isinstance(child, ast.ImportFrom):
                root = (child.module or "").partition(".")[0]
                yield (package if child.level else root), child.lineno, lazy
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, lazy or inside)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), False)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    source = PACKAGES / package.replace("_", "-") / "src" / package
    assert source.is_dir()
    wrong = []
    for file in sorted(source.rglob("*.py")):
        for root, line, lazy in imports(file, package):
            allowed = ALLOWED[package] | (LAZILY.get(package, set()) if lazy else set())
            if root not in {package, *allowed} and root not in sys.stdlib_module_names:
                wrong.append(f"{file.relative_to(PACKAGES)}:{line} imports {root}{' lazily' * lazy}")
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "without"),
    [
        ("flute_kernels", ["transformers", "safetensors", "rich", "flute_quant", "flute_hf", "flute_vllm"]),
        ("flute_quant", ["transformers", "gguf", "flute_hf", "flute_vllm", "vllm"]),
        ("flute_hf", ["peft", "gguf", "flute_vllm", "vllm"]),
    ],
)
def test_a_package_can_be_imported_without_what_lies_above_it(package: str, without: list[str]) -> None:
    # A None in sys.modules makes Python refuse the import.
    program = f"import sys; sys.modules.update(dict.fromkeys({without!r})); import {package}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def includes(file: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', file.read_text(encoding="utf-8"), re.MULTILINE)


def c_sources() -> list[Path]:
    found = [f for f in CSRC.rglob("*") if f.is_file()]
    assert found
    return found


def test_csrc_has_no_torch_header() -> None:
    torch = ("torch/", "ATen/", "c10/", "caffe2/")
    assert [
        f"{f.relative_to(CSRC)}: {i}" for f in c_sources() for i in includes(f) if i.startswith(torch)
    ] == []


def test_nanobind_is_in_the_bindings_only() -> None:
    found = {f.relative_to(CSRC).parts[0] for f in c_sources() if any("nanobind" in i for i in includes(f))}
    assert found == {"bindings"}


def test_rooms_do_not_share_with_each_other() -> None:
    rooms = {f.name for f in (CSRC / "qgemm").iterdir() if f.is_dir()} - {"common"}
    wrong = []
    for room in rooms:
        for file in (CSRC / "qgemm" / room).rglob("*.*"):
            for included in includes(file):
                match = re.match(r"(?:\.\./|qgemm/)(\w+)/", included)
                if match is not None and match[1] in rooms - {room}:
                    wrong.append(f"{file.relative_to(CSRC)} includes {included}")
    assert wrong == []
