"""Milliseconds of a decode step and of a prefill inside vLLM: 16-bit, vLLM's own int4, and FLUTE.

Weights are random and made on the device, so that nothing is downloaded and 70 billion of them fit one GPU.
Each side runs in a process of its own, as vLLM does by default, compiled and with CUDA graphs, but without
prefix caching. A step's time is that of 255, the difference between answers of 256 tokens and of one::

    python benchmarks/vllm/decode.py --model Llama-3-8B --save
    python benchmarks/vllm/decode.py --model Llama-3-70B --sides 16-bit,int4,flute-4 --tensor-parallel 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # record.py and served.py serve all benchmarks
import record
from served import SERVED
from sides import SIDES, alone, make_folder

PROMPT, ANSWER, PREFILL = 32, 256, 2048


def main() -> None:
    """Print a table, and save the figures where asked, after each side."""
    parser = argparse.ArgumentParser(description="Decode steps and prefill inside vLLM.")
    parser.add_argument("--model", default="Llama-3-8B", choices=SERVED)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--batches", default="1,8,32,128,256")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="{}", help="more of vllm.LLM, as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    record.add_argument(parser)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    if options.side:
        options.result.write_text(json.dumps(measure(options, batches)), encoding="utf-8")
        return
    name = f"vllm-decode-{options.model.lower()}"
    if options.tensor_parallel > 1:
        name += f"-tp{options.tensor_parallel}"
    figures: list[dict[str, Any]] = []
    for side in options.sides.split(","):
        begin = time.perf_counter()
        try:
            figure = alone(side)
        except subprocess.CalledProcessError as error:
            print(f"{side}: {error}", flush=True)  # such as one that does not fit into memory
            continue
        figures.append({"side": side, **figure})
        print(f"{side}: {figure} in {time.perf_counter() - begin:.0f} s", flush=True)
        if options.save:
            setting = {"model": options.model, "tensor_parallel": options.tensor_parallel}
            record.save(name, {**setting, "milliseconds": figures}, options.tag)
    show(options.model, figures)


def measure(options: argparse.Namespace, batches: list[int]) -> dict[str, Any]:
    """Milliseconds by batch, and of the prefill, of one side, in this process."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "tensor_parallel_size": options.tensor_parallel,
            "max_model_len": 4096,
            "max_num_seqs": max(batches),
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False,
            "compilation_config": {"cudagraph_capture_sizes": batches},
        }
        made = make_folder(Path(folder), options.model, options.side)
        llm = LLM(str(made), **{**settings, **json.loads(options.options)})
    vocabulary = SERVED[options.model]["vocab_size"]

    def milliseconds(batch: int, prompt: int, answer: int) -> float:
        prompts = [
            {"prompt_token_ids": [(7 * i + 31 * j) % vocabulary for j in range(prompt)]} for i in range(batch)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert all(len(given.outputs[0].token_ids) == answer for given in answers)
        return 1e3 * taken

    def median(batch: int, prompt: int, answer: int, rounds: int) -> float:
        milliseconds(batch, prompt, min(answer, 8))  # what is made at the first call
        return statistics.median(milliseconds(batch, prompt, answer) for _ in range(rounds))

    figures: dict[str, Any] = {}
    for batch in batches:
        whole, first = (median(batch, PROMPT, answer, options.rounds) for answer in (ANSWER, 1))
        figures[str(batch)] = round((whole - first) / (ANSWER - 1), 3)
    figures["prefill"] = round(median(1, PREFILL, 1, 2 * options.rounds + 1), 2)
    return figures


def show(model: str, figures: list[dict[str, Any]]) -> None:
    """The table of milliseconds, and below it how many times faster FLUTE is."""
    if not figures:
        return
    columns = [name for name in figures[0] if name != "side"]
    print(f"\n{model}, {record.gpu_model() or record.cpu_model()}\nmilliseconds of a step, by batch")
    print(f"{'':22}" + "".join(f"{name:>9}" for name in columns))
    for figure in figures:
        print(f"{figure['side']:22}" + "".join(f"{figure[name]:9.2f}" for name in columns))
    for other in figures:
        for mine in figures:
            if mine["side"].startswith("flute") and not other["side"].startswith("flute"):
                ratios = "".join(f"{other[name] / mine[name]:8.2f}x" for name in columns)
                print(f"{mine['side'] + ' over ' + other['side']:22}{ratios}")


if __name__ == "__main__":
    main()
