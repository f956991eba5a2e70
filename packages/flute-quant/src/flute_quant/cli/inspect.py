"""``flute-quant inspect``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flute_quant.checkpoint.inspect import inspect_checkpoint
from flute_quant.cli.text import counted, size

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    p = commands.add_parser("inspect", help="show what is in a quantized folder")
    p.add_argument("dst", metavar="DST", type=Path, help="a folder that quantize wrote")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_run, interrupted=lambda options: "Interrupted.")


def _run(options: argparse.Namespace) -> int:
    found = inspect_checkpoint(options.dst)
    if options.json:
        json.dump(found.to_dict(), sys.stdout, indent=2)
        print()
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "bits", "group", "error", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    for x in found.layers:
        error = "-" if x.error is None else f"{x.error:.5f}"
        bits = f"{x.bits}" + (" pairs" if x.vector_size == 2 else "") + (" rotated" if x.hadamard else "")
        table.add_row(x.name, f"{x.shape[0]} x {x.shape[1]}", bits, str(x.group_size), error, size(x.nbytes))
    console = Console()
    # Not cut to the width of a terminal that is not there.
    Console(width=None if console.is_terminal else 160, highlight=False).print(table)
    print(
        f"{found.path}: {counted(len(found.layers), 'quantized linear')}, "
        f"method {found.method or 'unknown'}, "
        f"{found.bits_per_weight:.3f} bits a quantized weight with scales and tables, "
        f"{found.bits_per_parameter:.3f} bits a parameter of the whole model, {size(found.file_bytes)}."
    )
    return 0
