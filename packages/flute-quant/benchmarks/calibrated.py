"""What calibration gains, and at which cost: perplexity and KL divergence on another text, as JSON.

    python benchmarks/calibrated.py MODEL TEXT --calibration FILE --runs runs.json --output calibrated.json

The protocol is that of ``quality.py``: another order of the channels for every seed, evenly spaced windows,
the model in bfloat16. A run of ``runs.json`` is a name with ``bits``, ``group_size``, ``vector_size`` and
``hadamard`` where they differ from the defaults, and either ``method`` or a ``recipe``; ``"calibration":
false`` leaves the text out; ``"learn"`` has options of ``learn_scales``, which then follows.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from permute import permute_channels
from quality import _check_same, _compare, _cpu, _load, _logits, _negative_log_likelihood, _windows

from flute_kernels import QuantSpec
from flute_quant import CalibrationText, Recipe, learn_scales, quantize_model, recipe_method
from flute_quant.calibration.run import dequantized
from flute_quant.calibration.text import parse_amount
from flute_quant.version import package_version


def main() -> None:
    options = _options()
    runs = json.loads(options.runs.read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    windows = _windows(tokenizer, options.text.read_text(encoding="utf-8"), options.windows, options.length)
    text = CalibrationText(options.calibration, *parse_amount(options.calibration_tokens))
    ids = tokenizer(text.read(), return_tensors="pt", verbose=False).input_ids[0]
    tokens, _ = text.windows(ids, None)
    original = _load(options.model)
    result: dict[str, Any] = {
        "model": options.model.name,
        "text": options.text.name,
        "windows": len(windows),
        "length": options.length,
        "calibration": {"text": options.calibration.name, "tokens": list(tokens.shape)},
        "date": dt.date.today().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "versions": {
            "flute-quant": package_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "recipes": runs,
        "runs": [],
    }
    for seed in options.seeds:
        model = copy.deepcopy(original)
        permute_channels(model, seed)
        _check_same(original, model, windows[:1])
        runner = copy.deepcopy(model).to(torch.bfloat16)
        reference = [_logits(runner, window) for window in windows]
        loss = sum(_negative_log_likelihood(r, w) for r, w in zip(reference, windows, strict=True))
        model.to(torch.bfloat16)
        for name, run in runs.items():
            spec = QuantSpec(**{k: v for k, v in run.items() if k in QuantSpec.__dataclass_fields__})
            started, busy = time.monotonic(), time.process_time()
            linears, report = quantize_model(
                model,
                spec,
                method=recipe_method(Recipe.from_dict(run["recipe"])) if "recipe" in run else run["method"],
                calibration=tokens if run.get("calibration", True) else None,
            )
            if "learn" in run:
                linears = learn_scales(model, linears, tokens, **run["learn"])
            seconds, cpu_seconds = time.monotonic() - started, time.process_time() - busy
            for module, linear in linears.items():
                runner.get_submodule(module).weight.data.copy_(dequantized(linear))
            stored = sum(linear.nbytes for linear in linears.values())
            found = {
                "run": name,
                "seed": seed,
                "bits_per_weight": round(8 * stored / report.covered, 4),
                "perplexity_16_bits": round(math.exp(loss / len(windows)), 4),
                **_compare(runner, reference, windows),
                "seconds": round(seconds),
                "cpu_seconds": round(cpu_seconds),
            }
            result["runs"].append(found)
            print(json.dumps(found), flush=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a 16- or 32-bit model of the Llama family")
    parser.add_argument("text", type=Path, help="UTF-8 text to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="UTF-8 text to calibrate with")
    parser.add_argument("--calibration-tokens", default="64x512", metavar="SxL")
    parser.add_argument("--runs", type=Path, required=True, help="JSON file with the runs by name")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, after every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
