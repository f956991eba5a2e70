"""HQQ: half-quadratic fit of zero points, affine codes, one scale and zero point a group in 16 bits each."""

from __future__ import annotations

import time

import torch
from common import linears, load, parser, write
from hqq.core.quantize import Quantizer


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    model = load(options.model, options.device)
    weights, stored, count, seconds = {}, 0, 0, 0.0
    for name, module in linears(model):
        weight = module.weight.data
        started = time.monotonic()
        codes, meta = Quantizer.quantize(
            weight,
            nbits=options.bits,
            group_size=options.group_size,
            axis=1,
            device=options.device,
            compute_dtype=torch.float32,
        )
        seconds += time.monotonic() - started
        weights[name] = Quantizer.dequantize(codes, meta)
        # HQQ keeps scales and zero points in the compute dtype, 16 bits in a model of 16 bits.
        stored += options.bits * weight.numel() + 16 * (meta["scale"].numel() + meta["zero"].numel())
        count += weight.numel()
    write(options.out, weights, stored / count, seconds, ["hqq"])


if __name__ == "__main__":
    main()
