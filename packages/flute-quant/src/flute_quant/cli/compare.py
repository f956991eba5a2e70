"""``flute-quant compare``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flute_quant.cli.progress import ProgressView
from flute_quant.errors import QuantizationError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    p = commands.add_parser(
        "compare", help="perplexity, KL divergence and agreement of two folders on a text"
    )
    p.add_argument("src", metavar="SRC", type=Path, help="the source folder")
    p.add_argument("dst", metavar="DST", type=Path, help="the quantized folder")
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    p.add_argument("--windows", type=int, default=16, metavar="N", help="evenly spaced windows (default 16)")
    p.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a window (default 512)")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_run, interrupted=lambda options: "Interrupted.")


def _run(options: argparse.Namespace) -> int:
    from flute_quant.checkpoint.compare import compare_checkpoints

    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QuantizationError(f"{options.text} is not UTF-8 at byte {error.start}.") from None
    with ProgressView("loading") as view:
        result = compare_checkpoints(
            options.src,
            options.dst,
            text,
            windows=options.windows,
            length=options.length,
            dtype=getattr(torch, options.dtype),
            device=options.device,
            progress=lambda done, total: view.step(f"window {done}", done, total),
        )
    if options.json:
        print(json.dumps(asdict(result), indent=2))
        return 0
    change = result.quantized_perplexity / result.source_perplexity - 1
    before, after = result.source_perplexity, result.quantized_perplexity
    print(f"perplexity   {before:.3f} before, {after:.3f} after ({change:+.1%})")
    print(f"KL           {result.kl:.4f} nats a token")
    where = f"{result.tokens} predictions in {result.windows} windows of {result.length} tokens"
    print(f"same top-1   {result.top1:.1%} of {where}")
    return 0
