"""The two texts of the grid: Wikipedia to measure on, and another kind of text to calibrate with.

    python packages/flute-quant/benchmarks/quality/corpora.py FOLDER

writes ``enwiki.txt`` and, where Debian's tools are, ``handbook.txt`` (149,000 words of the Debian
Administrator's Handbook, GPL-2+ or CC BY-SA 3.0) into the folder, unless they are there. Both belong to their
authors and are fetched where they are used.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "examples"))

import cache
import texts

_PARAGRAPH = re.compile(r'<div class="para">(.*?)</div>', re.DOTALL)
_UNREAD = re.compile(r"<(script|style|pre)[^>]*>.*?</\1>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_SPACE = re.compile(r"[\s\u200b]+")
_SHORTEST = 80  # characters; what is shorter is a heading or a label


def main(folder: Path) -> None:
    cache.make_once(folder / "enwiki.txt", lambda p: _write(p, texts.wikipedia()))
    if shutil.which("apt-get") and shutil.which("dpkg"):
        cache.make_once(folder / "handbook.txt", _handbook)
    else:
        print("There is no apt-get to fetch the calibration text with; rows that read it are left out.")


def _handbook(target: Path) -> None:
    folder = target.parent
    subprocess.run(["apt-get", "download", "debian-handbook"], cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("debian-handbook_*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(folder / "handbook")], check=True)
    seen: dict[str, None] = {}
    for page in sorted((folder / "handbook").glob("usr/share/doc/debian-handbook/html/en-US/*.html")):
        for paragraph in _PARAGRAPH.findall(page.read_text(encoding="utf-8")):
            words = _SPACE.sub(" ", html.unescape(_TAG.sub("", _UNREAD.sub("", paragraph)))).strip()
            if len(words) >= _SHORTEST:
                seen.setdefault(words)
    _write(target, "\n".join(seen) + "\n")


def _write(path: Path, words: str) -> None:
    path.write_text(words, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
