"""What is installed and what of it is used: build_info and FLUTE_CPU_ISA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flute_kernels
from flute_kernels import _C, UnsupportedError, build_info, check_environment

from .helpers import refusal

KNOWN = ("avx512bf16", "avx512", "avx2", "neon", "scalar")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The distribution's metadata, as an installation of version 1.2.3 leaves it."""
    folder = tmp_path / "flute_kernels-1.2.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: flute-kernels\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "1.2.3"


@pytest.mark.usefixtures("isa")
def test_build_info_describes_the_build(installed: str) -> None:
    info = build_info()
    assert info.version == installed
    assert list(info.cpu_isas) == [name for name in KNOWN if name in info.cpu_isas]  # known, best first
    assert info.cpu_isas[-1] == "scalar"
    assert info.cpu_isa == _C.isa()
    assert (info.cuda_version == "") == (info.cuda_architectures == ())
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", a) for a in info.cuda_architectures)


def test_an_unknown_instruction_set_cannot_be_selected() -> None:
    before = _C.isa()
    assert not _C.select_isa("mmx")
    assert _C.isa() == before


def python(program: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLUTE_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_the_variable_chooses_at_import() -> None:
    run = python("import flute_kernels; print(flute_kernels._C.isa())", "scalar")
    assert (run.stdout.strip(), run.stderr) == ("scalar", "")


def test_an_unknown_name_stops_the_import_with_a_sentence() -> None:
    run = python("import flute_kernels", "sse9")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    sets = ", ".join(_C.available_isas())
    assert last == (
        "flute_kernels.errors.UnsupportedError: "
        f"FLUTE_CPU_ISA is 'sse9'; this build has, for this processor, {sets}."
    )


@pytest.mark.parametrize("name", ["", *_C.available_isas()])
def test_names_of_this_processor_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUTE_CPU_ISA", name)
    check_environment()


@pytest.mark.parametrize("name", ["sse9", "AVX2", " scalar", "avx2,scalar"])
def test_other_names_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUTE_CPU_ISA", name)
    with refusal(UnsupportedError, repr(name), *_C.available_isas()):
        check_environment()


def test_every_public_name_exists() -> None:
    assert sorted(flute_kernels.__all__) == sorted(set(flute_kernels.__all__))
    assert all(hasattr(flute_kernels, name) for name in flute_kernels.__all__)
