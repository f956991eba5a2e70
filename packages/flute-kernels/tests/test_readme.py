"""The example of README.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flute_kernels import _C

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    said = re.findall(r"print\(.*\)  # (.*)", example)
    assert said
    assert capsys.readouterr().out.splitlines() == said
    assert torch.allclose(names["y"], names["x"] @ names["weight"].dequantize().T, atol=1e-3)  # type: ignore[attr-defined]


def test_every_instruction_set_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(_C.available_isas()) <= set(rows)
    assert [name for name in rows if name in _C.available_isas()] == _C.available_isas()
