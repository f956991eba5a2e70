"""Seconds until vLLM has a 16-bit checkpoint as it is, and quantized while it loads.

The checkpoint has a model's shapes and random values; it is written first, layer by layer, to a folder that
must have room for it (16 GB for Llama-3-8B). With ``--layers`` it has fewer layers, and the difference is
also given for all of them, as if each took the same::

    python benchmarks/vllm/load_time.py --folder /scratch --save
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # record.py and served.py serve all benchmarks
import record
from served import SERVED, write_checkpoint
from sides import alone

SIDES = {"16-bit": {}, "FLUTE, 4 bits": {"quantization": "flute"}}


def main() -> None:
    """Print seconds and memory of each side, and save them where asked."""
    parser = argparse.ArgumentParser(description="Loading with and without quantization.")
    parser.add_argument("--model", default="Llama-3-8B", choices=[n for n in SERVED if "Gemma" not in n])
    parser.add_argument("--folder", type=Path, default=Path("checkpoint-for-load-time"))
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    record.add_argument(parser)
    options = parser.parse_args()
    if options.side:
        figures = load(options.folder, SIDES[options.side])
        options.result.write_text(json.dumps(figures), encoding="utf-8")
        return
    every = SERVED[options.model]["num_hidden_layers"]
    layers = options.layers or every
    begin = time.perf_counter()
    size = write_checkpoint(options.folder, options.model, layers)
    print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - begin:.0f} s", flush=True)
    figures: dict[str, Any] = {}
    try:
        for side in ("16-bit", *SIDES):  # the first time is for the files' way into memory
            figures[side] = alone(side, VLLM_ENABLE_V1_MULTIPROCESSING="0")
            print(f"{side}: {figures[side]}", flush=True)
    finally:
        shutil.rmtree(options.folder)
    plain, quantized = (figures[side]["seconds"] for side in SIDES)
    more = quantized - plain
    result = {"model": options.model, "layers": layers, "gigabytes": size / 1e9, "more_seconds": more}
    print(f"{more:.1f} s more for {layers} of {every} layers, {more * every / layers:.1f} s for all")
    if options.save:
        rows = [{"side": side, **figure} for side, figure in figures.items()]
        record.save("vllm-load-time", {**result, "sides": rows}, options.tag)


def load(folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Seconds until vLLM could answer, uncompiled; on a GPU the most memory that there was of tensors."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=2**30,
        **options,
    )
    figures = {"seconds": round(time.perf_counter() - begin, 2)}
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False))
    if torch.cuda.is_available():
        figures["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return figures


if __name__ == "__main__":
    main()
