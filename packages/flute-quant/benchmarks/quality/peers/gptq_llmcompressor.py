"""GPTQ of llm-compressor: symmetric integers, reordered by activation, calibrated on windows of a text."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import linears, load, parser, write
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoTokenizer


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--calibration", type=Path, required=True)
    p.add_argument("--samples", type=int, default=128)
    p.add_argument("--length", type=int, default=512)
    options = p.parse_args()
    model = load(options.model, options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.calibration.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    last = len(ids) - options.length
    starts = [round(i * last / max(options.samples - 1, 1)) for i in range(options.samples)]
    samples = [ids[start : start + options.length] for start in starts]
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(s) for s in samples]})
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=options.bits, symmetric=True, strategy="group", group_size=options.group_size
        ),
    )
    count = sum(module.weight.numel() for _, module in linears(model))
    scales = sum(module.weight.numel() // options.group_size for _, module in linears(model))
    started = time.monotonic()
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder="static")
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=options.length,
        num_calibration_samples=options.samples,
    )
    seconds = time.monotonic() - started
    weights = {name: module.weight.data for name, module in linears(model)}
    _check_grid(weights, options.bits, options.group_size)
    write(options.out, weights, options.bits + 16 * scales / count, seconds, ["llmcompressor"])


def _check_grid(weights: dict[str, torch.Tensor], bits: int, group: int) -> None:
    """The modifier leaves dequantized weights; a group with more values than codes says that it did not."""
    for name, weight in weights.items():
        first = weight[: 1 << 6].float().reshape(-1, group)
        most = max(len(torch.unique(row)) for row in first)
        if most > 1 << bits:
            raise SystemExit(f"{name} has {most} values in a group, more than the {1 << bits} of {bits} bits")


if __name__ == "__main__":
    main()
