"""The two texts of the grid: Wikipedia to measure on, and another kind of text to calibrate with.

    python packages/flute-quant/benchmarks/quality/corpora.py FOLDER

writes ``enwiki.txt`` and, where Debian's tools are, ``handbook.txt`` into the folder, unless they are there.
``examples/texts.py`` and ``examples/calibration_text.py`` say what they are.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "examples"))

import cache
import calibration_text
import texts


def main(folder: Path) -> None:
    cache.make_once(folder / "enwiki.txt", lambda p: p.write_text(texts.wikipedia(), encoding="utf-8"))
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        shutil.copyfile(calibration_text.handbook(), folder / "handbook.txt")
    else:
        print("There is no apt-get to fetch the calibration text with; rows that read it are left out.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
