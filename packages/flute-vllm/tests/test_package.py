"""The package beside its siblings, as long as it has no code of its own."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys


def test_importing_it_does_not_import_vllm() -> None:
    code = "import sys, flute_vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_typed() -> None:
    assert importlib.resources.files("flute_vllm").joinpath("py.typed").is_file()
