"""Tables and a picture of a record of ``run.py``: fills the marked places of ``docs/quality.md``.

python packages/flute-quant/benchmarks/quality/report.py RECORD.json docs/quality.md docs/quality.png
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

_SHIPPED = "shipped"
_GRID = Path(__file__).with_name("grid.json")
_NAMES = {"kl": "KL", "quantized_perplexity": "perplexity"}
_PLACE = re.compile(r"(<!-- quality: ([a-z0-9 ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Line:
    """One row of the grid over the orders of channels that it was run with."""

    runs: list[dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        return self.runs[0]

    @property
    def permuted(self) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["seed"] != _SHIPPED]

    def mean(self, what: str) -> float:
        return fmean(run[what] for run in self.permuted)

    def spread(self, what: str, digits: int) -> str:
        values = [run[what] for run in self.permuted]
        whole = f"{fmean(values):.{digits}f}"
        return (
            whole if len(values) == 1 else f"{whole} ({min(values):.{digits}f} to {max(values):.{digits}f})"
        )


def main(record_file: Path, page: Path, picture: Path) -> None:
    record = json.loads(record_file.read_text(encoding="utf-8"))
    lines = gathered(record["runs"])
    makers: dict[str, Callable[[], str]] = {
        "protocol": lambda: protocol(record, record_file.name),
        "bars": lambda: bars(lines),
        **{f"{bits} bits": lambda bits=bits: table(lines, bits) for bits in (2, 3, 4)},
    }
    text = page.read_text(encoding="utf-8")
    unknown = [name for _, name, _ in _PLACE.findall(text) if name not in makers]
    if unknown:
        raise SystemExit(f"{page} has places for {', '.join(unknown)}; there are {', '.join(makers)}.")
    page.write_text(
        _PLACE.sub(lambda m: f"{m[1]}\n{makers[m[2]]()}\n\n{m[3]}", text), encoding="utf-8", newline="\n"
    )
    draw(lines, record, picture)


def gathered(runs: list[dict[str, Any]]) -> dict[str, Line]:
    """Rows by key that have at least one permuted run, in the order of the grid."""
    order = [entry["row"] for entry in json.loads(_GRID.read_text(encoding="utf-8"))["rows"]]
    found: dict[str, Line] = {}
    known = [run for run in runs if run["row"] in order]
    for run in sorted(known, key=lambda run: (order.index(run["row"]), -run["bits"], str(run["seed"]))):
        found.setdefault(run["key"], Line([])).runs.append(run)
    return {key: line for key, line in found.items() if line.permuted}


def protocol(record: dict[str, Any], file: str) -> str:
    """What was measured, and where."""
    runs = record["runs"]
    versions: dict[str, dict[str, str]] = {}
    for run in runs:
        versions.setdefault(run["machine"], {}).update({**run["versions"], **run.get("packages", {})})
    machines = [
        f"{machine} ({', '.join(f'{name} {version}' for name, version in found.items())})"
        for machine, found in sorted(versions.items())
    ]
    dates = sorted({run["date"] for run in runs})
    seeds = sorted({run["seed"] for run in runs if run["seed"] != _SHIPPED})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    begins = "no BOS" if record["bos"] == "none" else f"{record['bos']} first in each"
    return (
        f"{record['model']}, {record['windows']} windows of {record['length']} tokens of {record['text']}, "
        f"{begins}, bfloat16; orders of channels {', '.join(seeds)}; calibration text "
        f"{record['calibration'] or 'none'}. {when}, on {'; '.join(machines)}. "
        f"Record: `benchmarks/results/{file}`."
    )


def table(lines: dict[str, Line], bits: int) -> str:
    """All rows of so many bits, or with an average that begins with them."""
    rows = [line for line in lines.values() if int(line.first["bits"]) == bits]
    head = (
        "| method | group | true bits | KL mean | median | 99th percentile | perplexity | same top-1 "
        "| KL as shipped | seconds |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *(_cells(line) for line in rows)])


def _cells(line: Line) -> str:
    first = line.first
    shipped = next((f"{run['kl']:.3f}" for run in line.runs if run["seed"] == _SHIPPED), "")
    cells = [
        first["label"],
        str(first["group_size"]),
        f"{line.mean('bits_per_weight'):.3f}",
        line.spread("kl", 3),
        f"{line.mean('kl_median'):.3f}",
        f"{line.mean('kl_p99'):.2f}",
        f"{line.mean('quantized_perplexity'):.1f}",
        f"{line.mean('top1'):.1%}",
        shipped,
        f"{line.mean('seconds'):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def bars(lines: dict[str, Line]) -> str:
    """What ``grid.json`` promises of one row beside another, and what was found."""
    head = "| bar | found | |\n| --- | --- | --- |"
    found = [head]
    for bar in json.loads(_GRID.read_text(encoding="utf-8"))["bars"]:
        missing = [key for key in (bar["row"], bar["beside"]) if key not in lines]
        of = bar.get("of", "kl")
        words = (
            f"| {bar['words']}: {_NAMES[of]} of `{bar['row']}` at most {bar['most']:g} of `{bar['beside']}` |"
        )
        if missing:
            found.append(f"{words} | not run: {', '.join(missing)} |")
            continue
        ours, theirs = lines[bar["row"]], lines[bar["beside"]]
        # The same orders of channels on both sides.
        seeds = {run["seed"] for run in ours.permuted} & {run["seed"] for run in theirs.permuted}
        if not seeds:
            found.append(f"{words} | no order in common |")
            continue
        value, other = (
            fmean(run[of] for run in line.permuted if run["seed"] in seeds) for line in (ours, theirs)
        )
        kept = "kept" if value <= bar["most"] * other else "missed"
        bits = f"{ours.mean('bits_per_weight'):.3f} and {theirs.mean('bits_per_weight'):.3f} bits"
        found.append(f"{words} {value / other:.2f}, at {bits} (orders: {len(seeds)}) | {kept} |")
    return "\n".join(found)


def draw(lines: dict[str, Line], record: dict[str, Any], target: Path) -> None:
    """KL on a logarithmic axis against true bits a weight, one line for each row of the grid."""
    grid = {entry["row"]: entry for entry in json.loads(_GRID.read_text(encoding="utf-8"))["rows"]}
    by_row: dict[str, list[Line]] = {}
    for line in lines.values():
        by_row.setdefault(line.first["row"], []).append(line)
    figure, panel = plt.subplots(figsize=(10.5, 6))
    kinds = {"other projects": ("Oranges", "x", "--"), "without data": ("Blues", "o", "-")}
    kinds["with a text"] = ("Greens", "s", "-")
    for kind, (colors, marker, style) in kinds.items():
        rows = [row for row in by_row if _kind(grid[row]) == kind]
        panel.plot([], [], " ", label=f"{kind}:")
        for i, row in enumerate(rows):
            of_row = by_row[row]
            points = sorted((line.mean("bits_per_weight"), line.mean("kl")) for line in of_row)
            label = of_row[0].first["label"].replace("`", "")
            group = min(line.first["group_size"] for line in of_row)
            panel.plot(
                *zip(*points, strict=True),
                style,
                color=plt.get_cmap(colors)(0.95 - 0.55 * i / max(len(rows) - 1, 1)),
                marker=marker,
                markersize=5,
                linewidth=2.6 if row == "default" else 1.2,
                zorder=3 if row == "default" else 2,
                label=label if group == 64 else f"{label}, g{group}",
            )
    panel.set_yscale("log")
    panel.set_xlabel("true bits a weight, with scales, zero points and tables")
    panel.set_ylabel("KL(16 bits || quantized), nats a token")
    panel.set_title(f"{record['model']}, mean over permuted channels, groups of 64", fontsize=10)
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1.01), frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def _kind(entry: dict[str, Any]) -> str:
    if entry.get("peer"):
        return "other projects"
    return "with a text" if entry.get("calibrated") else "without data"


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
