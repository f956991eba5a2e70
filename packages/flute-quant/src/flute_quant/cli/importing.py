"""``flute-quant import``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from flute_quant.cli.progress import ProgressView
from flute_quant.cli.text import counted, duration, interrupted, size
from flute_quant.importers import ImportReport, import_checkpoint, importer_names, importers

__all__ = ["add_parser"]

DTYPE_NAMES = ("bfloat16", "float16", "float32")


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    known = "\n".join(f"  {name:13} {importer.summary}" for name, importer in importers().items())
    p = commands.add_parser(
        "import",
        help="turn a checkpoint that others quantized into a FLUTE checkpoint",
        description="Take over codes, scales and tables of a quantized checkpoint, without quantizing.",
        epilog=f"sources:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("src", metavar="SRC", type=Path, help="the quantized folder, or a GGUF file")
    p.add_argument("dst", metavar="DST", type=Path, help="folder to create")
    p.add_argument(
        "--from",
        dest="source",
        metavar="NAME",
        help="kind of source, where it does not tell itself: " + ", ".join(importer_names()),
    )
    p.add_argument(
        "--dtype",
        default="bfloat16",
        choices=DTYPE_NAMES,
        help="of GGUF tensors in blocks that stay no linears of ours, such as embeddings (default bfloat16; "
        "float32 is exact)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace DST if it holds a FLUTE checkpoint")
    p.set_defaults(run=_run, interrupted=interrupted)


def _run(options: argparse.Namespace) -> int:
    with ProgressView("reading") as view:
        report = import_checkpoint(
            options.src,
            options.dst,
            source=options.source,
            dtype=getattr(torch, options.dtype),
            overwrite=options.overwrite,
            progress=view.imported,
            say=view.say,
        )
    _print_report(report)
    return 0


def _print_report(report: ImportReport) -> None:
    for texts, ending in ((report.notes, ""), (report.left, "left in 16 bits, ")):
        reasons: dict[str, list[str]] = {}
        for name, why in texts.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            print(f"{counted(len(names), 'linear')} {ending or 'with '}{why} (such as {names[0]}).")
    for remark in report.remarks:
        print(remark)
    print(
        f"Wrote {report.path}: {size(report.output_bytes)} ({size(report.source_bytes)} before), "
        f"{report.bits_per_weight:.3f} bits a quantized weight with scales and tables, "
        f"{counted(len(report.errors), 'linear')} from {report.importer}, in {duration(report.seconds)}."
    )
    if report.exact:
        print("All of them have exactly the values that they had.")
    else:
        worst = max(report.errors, key=lambda name: report.errors[name])
        print(
            "Rounding of scales changed their values by a relative squared error of "
            f"{report.errors[worst]:.2g} at most ({worst})."
        )
