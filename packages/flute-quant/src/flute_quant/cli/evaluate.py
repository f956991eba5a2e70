"""``flute-quant eval``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from flute_quant.cli.text import write_json

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    p = commands.add_parser("eval", help="scores in tasks of lm-eval (needs flute-quant[eval])")
    p.add_argument(
        "dst", metavar="DST", type=Path, help="a quantized folder, or a 16-bit one to compare with"
    )
    p.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="such as hellaswag arc_easy")
    p.add_argument("--limit", type=int, metavar="N", help="examples of each task (default all)")
    p.add_argument("--shots", type=int, metavar="N", help="examples in the prompt (default as the task says)")
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="examples at once (default 1)")
    p.add_argument("--include", type=Path, metavar="FOLDER", help="task files of your own")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to a file")
    p.set_defaults(run=_run, interrupted=lambda options: "Interrupted.")


def _run(options: argparse.Namespace) -> int:
    from flute_quant.checkpoint.harness import evaluate_checkpoint

    found = evaluate_checkpoint(
        options.dst,
        options.tasks,
        limit=options.limit,
        shots=options.shots,
        batch_size=options.batch_size,
        include=options.include,
        dtype=getattr(torch, options.dtype),
        device=options.device,
    )
    if options.json is not None:
        write_json(found, options.json)
    if options.json != "-":
        for task, scores in found.items():
            for metric, value in scores.items():
                if not metric.endswith("_stderr"):
                    error = scores.get(f"{metric}_stderr")
                    print(f"{task:24} {metric:12} {value:.4f}" + (f" ± {error:.4f}" if error else ""))
    return 0
