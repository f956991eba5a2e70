"""Draws what linears.py saved, in one run or several: times faster than torch.mm, against the rows of x.

python benchmarks/gpu/plot.py benchmarks/results/gpu-linears-*-DATE.json docs/gpu-linears.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def main(sources: list[Path], target: Path) -> None:
    """One panel a shape, one line a side and number of bits; float16; the last run's figures."""
    records = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    gpus = " and ".join(dict.fromkeys(record["gpu"] for record in records))
    dates = " and ".join(dict.fromkeys(record["date"] for record in records))
    latest = {
        (t["n"], t["k"], t["side"], t["bits"], t["m"]): t
        for record in records
        for t in record["figures"]["times"]
        if t["dtype"] == "float16" and t["x_torch"]
    }
    times = [
        latest[key] for key in sorted(latest, key=lambda key: (key[2] != "FLUTE", key[2], -key[3], key[4]))
    ]
    shapes = list(dict.fromkeys((t["n"], t["k"]) for record in records for t in record["figures"]["times"]))
    figure, panels = plt.subplots(
        2, -(-len(shapes) // 2), figsize=(13, 7), sharex=True, sharey=True, squeeze=False
    )
    for shape, panel in zip(shapes, panels.flat, strict=False):
        draw(panel, [t for t in times if (t["n"], t["k"]) == shape])
        panel.set_title(f"{shape[0]} x {shape[1]}", fontsize=10)
    panels.flat[0].legend(fontsize=7)
    figure.supxlabel("rows of x")
    figure.supylabel("times faster than torch.mm in float16")
    figure.suptitle(f"{gpus}, {dates}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def draw(panel: Any, times: list[dict[str, Any]]) -> None:
    """The lines of one shape: FLUTE's with each number of bits, the peers' at 4 bits."""
    for side, bits in dict.fromkeys((t["side"], t["bits"]) for t in times):
        if side == "torch.mm" or side.startswith("FLUTE ") or (side != "FLUTE" and bits != 4):
            continue
        points = [(t["m"], t["x_torch"]) for t in times if (t["side"], t["bits"]) == (side, bits)]
        strong = (
            {"linewidth": 2, "marker": "o", "markersize": 3}
            if side == "FLUTE"
            else {"linewidth": 1, "alpha": 0.7}
        )
        panel.plot(*zip(*points, strict=True), label=f"{side}, {bits} bits", **strong)
    panel.axhline(1, color="black", linewidth=0.7)
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    main([Path(source) for source in sys.argv[1:-1]], Path(sys.argv[-1]))
