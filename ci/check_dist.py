"""What `nox -s sdist` asks of the built distributions: they import, agree on a version, and hold no more
and no less than they should. Run with the environment that the wheels were installed in.
"""

from __future__ import annotations

import importlib
import sys
import tarfile
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

PACKAGES = {
    "flute-kernels": "flute_kernels",
    "flute-quant": "flute_quant",
    "flute-hf": "flute_hf",
    "flute-vllm": "flute_vllm",
}


def check(condition: bool, message: str) -> None:
    """End with ``message`` unless ``condition`` holds."""
    if not condition:
        sys.exit(f"sdist: {message}")


def check_archives(dist: Path, name: str, module: str, expected: str) -> None:
    """The sdist holds VERSION and LICENSE as files; the wheel its module, py.typed and licence, no tests."""
    stem = f"{module}-{expected}"
    with tarfile.open(dist / f"{stem}.tar.gz") as sdist:
        members = {member.name: member for member in sdist.getmembers()}
    for file in ("VERSION", "LICENSE", "README.md", "pyproject.toml"):
        member = members.get(f"{stem}/{file}")
        check(member is not None and member.isfile(), f"{name}'s sdist has no file {file}.")
    check(not any(path.endswith(".so") for path in members), f"{name}'s sdist holds a compiled file.")
    wheels = sorted(dist.glob(f"{stem}-*.whl"))
    check(len(wheels) == 1, f"{name} has {len(wheels)} wheels; expected 1.")
    tag = "py3-none-any" if name != "flute-kernels" else "cp310-abi3"
    check(tag in wheels[0].name, f"{wheels[0].name} is not tagged {tag}.")
    files = zipfile.ZipFile(wheels[0]).namelist()
    check(f"{module}/py.typed" in files, f"{wheels[0].name} has no py.typed.")
    check(any(file.endswith("LICENSE") for file in files), f"{wheels[0].name} has no LICENSE.")
    check(not any("test" in Path(file).parts[0] for file in files), f"{wheels[0].name} holds tests.")


def main(dist: Path) -> None:
    """Check all four packages."""
    root = Path(__file__).parents[1]
    expected = (root / "VERSION").read_text(encoding="utf-8").strip()
    for name, module in PACKAGES.items():
        check(version(name) == expected, f"{name} is {version(name)}; VERSION says {expected}.")
        check_archives(dist, name, module, expected)
        origin = Path(importlib.import_module(module).__file__ or "")
        check(Path(sys.prefix) in origin.parents, f"{module} comes from {origin}, not from its wheel.")
        for requirement in requires(name) or []:
            if requirement.startswith("flute-") and "extra" not in requirement:
                check(
                    requirement.endswith(f"=={expected}"),
                    f"{name} needs {requirement}; expected =={expected}.",
                )
    from flute_kernels import build_info

    print(
        f"{len(PACKAGES)} packages of version {expected} build from their sdists and import; {build_info()}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
