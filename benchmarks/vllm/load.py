"""``vllm bench serve`` at rising request rates against ``vllm serve``: throughput and waiting times.

Weights are random, so that every request's answer is as long as it may be::

    python benchmarks/vllm/load.py --sides 16-bit,int4,flute-4 --rates 2,8,16,32,64 --save
    python benchmarks/vllm/plot.py benchmarks/results/vllm-load-DATE.json docs/vllm-load.png
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # record.py and served.py serve all benchmarks
import record
from served import SERVED
from sides import ENVIRONMENT, VLLM, make_folder

PROMPT, ANSWER = 512, 128
FIGURES = (
    "completed",
    "request_throughput",
    "output_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
)


def main() -> None:
    """Print a table, and save the figures where asked, after each side."""
    parser = argparse.ArgumentParser(description="A server under rising load.")
    parser.add_argument("--model", default="Llama-3-8B", choices=SERVED)
    parser.add_argument("--sides", default="16-bit,int4,flute-4")
    parser.add_argument("--rates", default="2,8,16,32,64", help="requests a second")
    parser.add_argument("--seconds", type=float, default=15, help="for which requests come at each rate")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--answer", type=int, default=ANSWER)
    record.add_argument(parser)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for side in options.sides.split(","):
        with tempfile.TemporaryDirectory() as place:
            folder = make_folder(Path(place) / "model", options.model, side, tokenizer=True)
            with server(folder, options.prompt + options.answer) as port:
                for rate in map(float, options.rates.split(",")):
                    figures = under_load(folder, port, rate, options)
                    rows.append({"side": side, "rate": rate, **figures})
                    print(json.dumps(rows[-1]), flush=True)
        if options.save:
            setting = {"model": options.model, "prompt": options.prompt, "answer": options.answer}
            record.save("vllm-load", {**setting, "loads": rows}, options.tag)


@contextlib.contextmanager
def server(folder: Path, length: int) -> Iterator[int]:
    """``vllm serve`` with random weights; gives its port once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*VLLM, "serve", str(folder), "--port", str(port), "--load-format", "dummy"]
    command += ["--max-model-len", str(length + 64), "--no-enable-prefix-caching"]
    process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT})
    try:
        deadline = time.monotonic() + 400
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server of {folder} did not come up.")
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def under_load(folder: Path, port: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """What ``vllm bench serve`` finds at one rate."""
    with tempfile.TemporaryDirectory() as place:
        command = [*VLLM, "bench", "serve", "--backend", "openai", "--model", str(folder)]
        command += ["--port", str(port), "--endpoint", "/v1/completions", "--dataset-name", "random"]
        command += ["--random-input-len", str(options.prompt), "--random-output-len", str(options.answer)]
        command += ["--request-rate", str(rate), "--num-prompts", str(max(8, round(rate * options.seconds)))]
        command += ["--ignore-eos", "--disable-tqdm", "--save-result", "--result-dir", place]
        command += ["--result-filename", "result.json"]
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"vllm bench serve failed: {done.stderr[-2000:]}")
        found = json.loads((Path(place) / "result.json").read_text(encoding="utf-8"))
    return {name: round(found[name], 3) for name in FIGURES}


if __name__ == "__main__":
    main()
