"""The Python example of the top README is a program of this repository, and it runs."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples/quickstart.py"


def test_readme_shows_the_quickstart_word_for_word() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    shown = [block for block in blocks if "quantize_checkpoint" in block]
    program = QUICKSTART.read_text(encoding="utf-8")
    marked = re.findall(r"^# --- README begins\n(.*?)^# --- README ends", program, re.M | re.S)
    assert shown == marked
    assert len(marked) == 1


def test_the_quickstart_runs(
    write_tiny_model: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "SmolLM2-135M-Instruct")
    runpy.run_path(str(QUICKSTART))
    assert len(capsys.readouterr().out.split()) >= 5
    assert (tmp_path / "SmolLM2-135M-4bit/model.safetensors").is_file()
