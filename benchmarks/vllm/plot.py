"""Draws what load.py saved: throughput and waiting times against requests a second.

python benchmarks/vllm/plot.py benchmarks/results/vllm-load-DATE.json docs/vllm-load.png

Several files, of sides that were run one at a time, may come before the picture's name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = {
    "output_throughput": "tokens a second",
    "median_ttft_ms": "median ms to the first token",
    "median_tpot_ms": "median ms per token after it",
}


def main(sources: list[Path], target: Path) -> None:
    """One panel a figure, one line a side."""
    records = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    record, figures = records[0], records[0]["figures"]
    loads = [load for one in records for load in one["figures"]["loads"]]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4))
    for (name, title), panel in zip(PANELS.items(), panels, strict=True):
        for side in dict.fromkeys(load["side"] for load in loads):
            points = [(load["rate"], load[name]) for load in loads if load["side"] == side]
            panel.plot(*zip(*points, strict=True), label=side, marker="o", markersize=3)
        panel.set(title=title, xlabel="requests a second", xscale="log")
        panel.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend(fontsize=8)
    shape = f"{figures['prompt']} tokens in, {figures['answer']} out"
    figure.suptitle(f"{figures['model']} shapes, {shape}; {record['gpu']}, {record['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    main(sources, target)
