"""A text to calibrate with, which is not the one that models are measured on: The Debian Administrator's
Handbook.

The Debian package debian-handbook carries it (GPL-2+ or CC BY-SA 3.0). On Debian and Ubuntu apt fetches
that, and

    python examples/calibration_text.py

prints where the text is. It stays in the cache and is not part of this repository.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import cache

__all__ = ["extract", "handbook"]

_PACKAGE = "debian-handbook"
_PAGES = "usr/share/doc/debian-handbook/html/en-US"
_PARAGRAPH = re.compile(r'<div class="para">(.*?)</div>', re.DOTALL)
_NO_PROSE = re.compile(r"<(script|style|pre)[^>]*>.*?</\1>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_SPACE = re.compile("[\\s\u200b]+")
_SHORTEST_PARAGRAPH = 80  # characters; what is shorter is a caption or a command


def handbook() -> Path:
    """A file with the text, made where there is none yet.

    Raises:
        DownloadError: apt cannot fetch the package.
    """

    def make(target: Path) -> None:
        folder = target.parent
        _run(["apt-get", "download", _PACKAGE], folder)
        (package,) = folder.glob("*.deb")
        _run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], folder)
        target.write_text(extract(folder / "unpacked" / _PAGES), encoding="utf-8")

    return cache.make_once(cache.default_cache() / "debian-handbook.txt", make)


def extract(pages: Path) -> str:
    """The paragraphs of a folder of HTML pages, a line each and each once."""
    lines: dict[str, None] = {}
    for page in sorted(pages.glob("*.html")):
        for found in _PARAGRAPH.findall(page.read_text(encoding="utf-8")):
            line = _SPACE.sub(" ", html.unescape(_TAG.sub("", _NO_PROSE.sub("", found)))).strip()
            if len(line) >= _SHORTEST_PARAGRAPH:
                lines[line] = None
    return "\n".join(lines) + "\n"


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise cache.DownloadError(
            f"There is no {command[0]} here, which fetches {_PACKAGE} on Debian."
        ) from None
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-200:] or f"it ended with exit code {done.returncode}"
        raise cache.DownloadError(f"{command[0]} could not get {_PACKAGE}: {reason}.")


if __name__ == "__main__":
    try:
        print(handbook())
    except cache.DownloadError as error:
        sys.exit(str(error))
