"""Seconds and memory of quantizing a checkpoint of a large model's shapes, on a GPU or a CPU.

Checkpoints have random values, the model's embedding and head, and one or some of its layers; calibration
reads random tokens. What the whole model takes is extrapolated from the two::

    python benchmarks/quantizing.py --layers 4 --save
    python benchmarks/quantizing.py --model Llama-3-70B --layers 2 --ways calibrated
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import record
import torch
from served import SERVED, config, layer_linears, write_checkpoint

from flute_kernels import QuantSpec
from flute_quant import quantize_checkpoint
from flute_quant.rotation import AUTO_HADAMARD

WAYS: dict[str, tuple[str, QuantSpec]] = {
    "default": ("default", QuantSpec(4, 64)),
    "calibrated": ("calibrated", QuantSpec(3, 64, 2, AUTO_HADAMARD)),
    "blockwise": ("blockwise", QuantSpec(3, 64)),
    "blockwise-pairs": ("blockwise", QuantSpec(2, 64, 2, AUTO_HADAMARD)),
}
"""What is measured: name to method and spec. All but ``default`` read tokens."""


def main() -> None:
    """Print seconds and memory of each way, and save them where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    llamas = [name for name, described in SERVED.items() if described["model_type"] == "llama"]
    parser.add_argument("--model", default="Llama-3-8B", choices=llamas)
    parser.add_argument("--layers", type=int, default=4, help="of the larger checkpoint, 2 or more")
    parser.add_argument("--ways", nargs="+", default=["default", "calibrated"], choices=WAYS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", default="128x2048", help="of calibration: sequences x length")
    parser.add_argument("--folder", type=Path, help="where the checkpoints lie; a temporary one by default")
    record.add_argument(parser)
    options = parser.parse_args()
    every = SERVED[options.model]["num_hidden_layers"]
    layer = sum(n * k for n, k in layer_linears(config(options.model)).values())
    print(f"{options.model}: a layer of {every} has {layer * 2 / 1e9:.2f} GB in 16 bits", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        sources = {layers: Path(place) / f"{layers}-layers" for layers in (1, options.layers)}
        for layers, source in sources.items():
            write_checkpoint(source, options.model, layers)
        for way in options.ways:
            one, row = (_alone(source, way, options.device, options.tokens) for source in sources.values())
            of_layer = (row["seconds"] - one["seconds"]) / (options.layers - 1)
            row["seconds_of_a_layer"] = round(of_layer, 2)
            row["seconds_extrapolated"] = round(row["seconds"] + (every - options.layers) * of_layer, 1)
            rows.append({"way": way, **row})
            print(json.dumps(rows[-1]), flush=True)
    if options.save:
        setting = {"model": options.model, "layers": options.layers, "of_layers": every}
        size = {"layer_gigabytes": round(layer * 2 / 1e9, 3)}
        record.save(
            f"quantizing-{options.model.lower()}-{options.device}",
            {**setting, **size, "ways": rows},
            options.tag,
        )


def _alone(source: Path, way: str, device: str, tokens: str) -> dict[str, Any]:
    """The figures of a process of its own, whose memory is that of this way alone."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_quantize, (source, way, device, tokens))


def _quantize(source: Path, way: str, device: str, tokens: str) -> dict[str, Any]:
    method, spec = WAYS[way]
    options: dict[str, Any] = {}
    if way != "default":
        sequences, length = map(int, tokens.split("x"))
        words = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        drawn = torch.randint(3, words, (sequences, length), generator=torch.Generator().manual_seed(0))
        options = {"calibration": drawn}
    target = source.with_name("quantized")
    with _Memory() as memory:
        report = quantize_checkpoint(source, target, spec, method=method, device=device, **options)
    shutil.rmtree(target)
    errors = list(report.errors.values())
    if not all(0 < error < 1 for error in errors):
        raise ValueError(f"{way}: errors from {min(errors)} to {max(errors)}, which is no quantized model.")
    figures: dict[str, Any] = {
        "method": report.method,
        "bits_per_weight": round(report.bits_per_weight, 3),
        "tokens": tokens if options else "",
        "seconds": round(report.seconds, 1),
        "mean_error": float(f"{math.fsum(errors) / len(errors):.3g}"),
        "peak_memory_gigabytes": round(memory.most / 1e9, 2),
    }
    if device != "cpu":
        peaks = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
        figures["peak_gpu_gigabytes"] = [round(peak / 1e9, 2) for peak in peaks]
    return figures


class _Memory:
    """The most memory of a process over what it had before, without pages of files, which come and go."""

    def __enter__(self) -> _Memory:
        self.most, self._before = 0, self._now()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.M))


if __name__ == "__main__":
    main()
