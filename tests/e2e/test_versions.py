"""One version: the file, the four packages as installed, and what they require of each other."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
SIBLINGS = {
    "flute-kernels": set(),
    "flute-quant": {"flute-kernels"},
    "flute-hf": {"flute-kernels", "flute-quant"},
    "flute-vllm": {"flute-kernels", "flute-quant"},
}


@pytest.fixture(params=SIBLINGS)
def installed(request: pytest.FixtureRequest) -> metadata.Distribution:
    """Each of the packages; tests of one that is not installed, as in a source tree, are skipped."""
    try:
        return metadata.distribution(request.param)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{request.param} is not installed here, only its sources are read.")


def test_packages_take_their_version_from_the_one_file() -> None:
    for name in SIBLINGS:
        assert (ROOT / "packages" / name / "VERSION").resolve() == ROOT / "VERSION"


def test_the_installed_version_is_that_of_the_file(installed: metadata.Distribution) -> None:
    # A wheel for some GPUs only has a label behind the version, such as 0.5.0+cu130.sm90.
    assert installed.version.partition("+")[0] == VERSION


def test_siblings_are_required_in_exactly_this_version(installed: metadata.Distribution) -> None:
    required = {}
    for line in installed.requires or []:
        match = re.match(r"(flute[-_.]\w+)\s*(.*)", line)
        if match is not None and "extra ==" not in line:
            required[re.sub(r"[-_.]+", "-", match[1])] = match[2]
    assert required == dict.fromkeys(SIBLINGS[installed.metadata["Name"]], f"=={VERSION}")
