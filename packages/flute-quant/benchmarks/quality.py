"""How much each method changes what a model says: perplexity and KL divergence, as JSON.

    python benchmarks/quality.py MODEL TEXT --bits 4 3 --seeds 0 1 2 --output quality.json

The fair protocol: the model's channels are put into another order for every seed (see ``permute.py``;
the logits are checked to stay the same), its linears are quantized and dequantized, and it runs in
bfloat16 on evenly spaced windows of the text, as does the model before.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from permute import permute_channels
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant import quantize_model
from flute_quant.version import package_version

# Another order of additions moves logits by some 1e-6 of their size in float32; a wrong order of
# channels, by all of it.
_SAME = 1e-4


def main() -> None:
    options = _options()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    windows = _windows(tokenizer, options.text.read_text(encoding="utf-8"), options.windows, options.length)
    original = _load(options.model)
    result: dict[str, Any] = {
        "model": options.model.name,
        "text": options.text.name,
        "windows": len(windows),
        "length": options.length,
        "group_size": options.group_size,
        "date": dt.date.today().isoformat(),
        "cpu": _cpu(),
        "versions": {
            "flute-quant": package_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "runs": [],
    }
    for seed in options.seeds:
        model = copy.deepcopy(original)
        permute_channels(model, seed)
        _check_same(original, model, windows[:1])
        runner = copy.deepcopy(model).to(torch.bfloat16)
        reference = [_logits(runner, window) for window in windows]
        perplexity = math.exp(
            sum(_negative_log_likelihood(r, w) for r, w in zip(reference, windows, strict=True))
            / len(windows)
        )
        for bits in options.bits:
            for name in options.methods:
                method, _, importance = name.partition(":")
                linears, report = quantize_model(
                    model,
                    QuantSpec(bits, options.group_size),
                    method=method,
                    importance=importance or "auto",
                )
                for module, linear in linears.items():
                    runner.get_submodule(module).weight.data.copy_(linear.dequantize())
                run = {
                    "method": name,
                    "stands_for": report.method,
                    "importance": report.importance.source,
                    "bits": bits,
                    "seed": seed,
                    "perplexity_16_bits": round(perplexity, 4),
                    **_compare(runner, reference, windows),
                }
                result["runs"].append(run)
                print(json.dumps(run), flush=True)
                options.output.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a 16- or 32-bit model of the Llama family")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, after every run")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["nf", "lloyd", "nf-search", "int", "default:none", "default"],
        help="method, or method:importance",
    )
    return parser.parse_args()


def _load(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _windows(tokenizer: Any, text: str, count: int, length: int) -> list[Tensor]:
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    last = len(tokens) - length
    if last < 0:
        raise SystemExit(f"The text has {len(tokens)} tokens; one window needs {length}.")
    starts = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return [tokens[start : start + length] for start in starts]


def _logits(model: Any, window: Tensor) -> Tensor:
    """``[length - 1, vocabulary]`` in the model's dtype: the last position predicts nothing that is known."""
    with torch.inference_mode():
        logits: Tensor = model(window[None]).logits[0, :-1]
    return logits


def _check_same(original: Any, permuted: Any, windows: list[Tensor]) -> None:
    for window in windows:
        before, after = _logits(original, window), _logits(permuted, window)
        change = float((after - before).norm() / before.norm())
        if not change < _SAME:
            raise SystemExit(
                f"Permuting the channels changed the logits by {change:.2g}; expected {_SAME:.0e}."
            )


def _negative_log_likelihood(logits: Tensor, window: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), window[1:]))


def _compare(model: Any, reference: list[Tensor], windows: list[Tensor]) -> dict[str, float]:
    """Means over all predictions: every window has as many."""
    loss = divergence = same = 0.0
    for before, window in zip(reference, windows, strict=True):
        logits = _logits(model, window)
        loss += _negative_log_likelihood(logits, window)
        p, q = before.float().log_softmax(1), logits.float().log_softmax(1)
        divergence += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
        same += float((before.argmax(1) == logits.argmax(1)).float().mean())
    count = len(windows)
    return {
        "perplexity": round(math.exp(loss / count), 4),
        "kl": round(divergence / count, 5),
        "top1": round(same / count, 5),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    main()
