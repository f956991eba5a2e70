"""NF4 of bitsandbytes, with one float32 scale a block or (``--nested``) scales quantized in their turn."""

from __future__ import annotations

import time

import bitsandbytes.functional as bnb
import torch
from common import linears, load, parser, write


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--nested", action="store_true")
    options = p.parse_args()
    if options.bits != 4:
        raise SystemExit(f"NF4 has 4 bits, not {options.bits}")
    model = load(options.model, options.device)
    weights, stored, count, seconds = {}, 0, 0, 0.0
    for name, module in linears(model):
        weight = module.weight.data
        started = time.monotonic()
        codes, state = bnb.quantize_4bit(
            weight, blocksize=options.group_size, quant_type="nf4", compress_statistics=options.nested
        )
        seconds += time.monotonic() - started
        weights[name] = bnb.dequantize_4bit(codes, state)
        stored += 8 * (codes.numel() * codes.element_size() + _bytes(state.absmax))
        if options.nested:
            stored += 8 * (_bytes(state.state2.absmax) + 4)  # and the mean that was taken off
        count += weight.numel()
    write(options.out, weights, stored / count, seconds, ["bitsandbytes"])


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
