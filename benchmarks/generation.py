"""Tokens a second of a whole model through Transformers: bfloat16, float32 and quantized.

The small model of examples/ is fetched and quantized into the cache first. The models take turns, short
ones, so that all see the same phases of a machine whose speed changes by the second. Before anything is
timed, each quantized model's logits are compared with those of a model that has the same weights,
dequantized, in ordinary Linears::

    nox -s bench -- cpu
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import flute_hf
from flute_kernels import QuantSpec
from flute_quant import quantize_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import cache
import measure
import smollm2

TEXT = "The history of the locomotive begins in the mines, where wagons ran on wooden rails."
# Of the largest logit. In bfloat16 both sides round in each of thirty layers, and the dequantized weights
# are rounded too, which FLUTE's are not.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def main() -> None:
    """Print tokens a second and their ratios, and save them where asked."""
    parser = argparse.ArgumentParser(description="Whole-model generation on the CPU.")
    parser.add_argument("--rounds", type=int, default=24, metavar="N", help="of generation (default 24)")
    parser.add_argument("--tokens", type=int, default=17, metavar="N", help="a round (default 17)")
    record.add_argument(parser)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    source = smollm2.checkpoint()
    prompt = AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt").input_ids
    models: dict[str, Any] = {
        "bf16": AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
        "fp32": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
    }
    for bits in (4, 3, 2):
        folder = cache.default_cache() / f"bench-{smollm2.NAME}-{bits}bit"
        quantize_checkpoint(source, folder, QuantSpec(bits=bits, group_size=64), overwrite=True)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            check(model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).dequantize(), prompt)
            models[f"{bits}-bit, {name}"] = model
    speeds = measure.decode_speeds(models, prompt, options.tokens, options.rounds)
    print(f"{record.cpu_model()}\n\n{smollm2.NAME}\n{'':16}{'tokens/s':>9}{'x bf16':>9}{'x fp32':>9}")
    for name, speed in speeds.items():
        print(f"{name:16}{speed:9.1f}{speed / speeds['bf16']:9.2f}{speed / speeds['fp32']:9.2f}")
    if options.save:
        record.save("cpu-generation", {"tokens_per_second": speeds}, options.tag)


def check(model: Any, dense: Any, prompt: torch.Tensor) -> None:
    """Stop where the quantized model does not compute what its own weights say."""
    if not any(isinstance(module, flute_hf.FluteLinear) for module in model.modules()):
        raise SystemExit("The model has no quantized linear.")
    with torch.inference_mode():
        found, expected = (m(prompt).logits.float() for m in (model, dense))
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE[model.dtype]:
        raise SystemExit(
            f"{model.dtype} logits differ from the dequantized model's by {error:.2e} of the largest."
        )


if __name__ == "__main__":
    main()
