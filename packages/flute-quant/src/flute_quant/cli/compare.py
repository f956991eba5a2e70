"""``flute-quant compare``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flute_quant.cli.progress import ProgressView
from flute_quant.cli.text import counted, read_text, write_json
from flute_quant.evaluation import BOS_POLICIES

if TYPE_CHECKING:
    from flute_quant.checkpoint.compare import Comparison

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
    p.add_argument(
        "--bos",
        default="auto",
        choices=BOS_POLICIES,
        help="whether each window begins with the beginning-of-text token (auto: as the tokenizer does)",
    )
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to a file")
    p.set_defaults(run=_run, interrupted=lambda options: "Interrupted.")


def _run(options: argparse.Namespace) -> int:
    from flute_quant.checkpoint.compare import compare_checkpoints

    text = read_text(options.text)
    with ProgressView("loading") as view:
        result = compare_checkpoints(
            options.src,
            options.dst,
            text,
            windows=options.windows,
            length=options.length,
            bos=options.bos,
            dtype=getattr(torch, options.dtype),
            device=options.device,
            progress=lambda done, total: view.step(f"window {done}", done, total),
        )
    if options.json is not None:
        write_json(asdict(result), options.json)
    if options.json != "-":
        _print(result)
    return 0


def _print(result: Comparison) -> None:
    before, after = result.source_perplexity, result.quantized_perplexity
    print(f"perplexity   {before:.3f} before, {after:.3f} after ({after / before - 1:+.1%})")
    print(
        f"KL           {result.kl:.4f} nats a token in the mean, {result.kl_median:.4f} in the median, "
        f"{result.kl_p99:.4f} at the 99th percentile"
    )
    begins = "no BOS" if result.bos == "none" else f"{result.bos} first in each"
    print(
        f"same top-1   {result.top1:.1%} of {counted(result.tokens, 'prediction')} in "
        f"{counted(result.windows, 'window')} of {result.length} tokens, {begins}"
    )
    if result.layers:
        worst = max(result.layers, key=lambda name: result.layers[name])
        mean = sum(result.layers.values()) / len(result.layers)
        print(
            f"error        {mean:.5f} of a weight's energy in the mean of "
            f"{counted(len(result.layers), 'layer')}, {result.layers[worst]:.5f} at most ({worst})"
        )
    print(f"size         {result.bits_per_weight:.3f} bits a quantized weight with scales and tables")
