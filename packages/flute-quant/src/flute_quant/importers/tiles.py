"""The packed codes of upstream FLUTE (``flute-kernel`` on PyPI), which HIGGS checkpoints use, too.

A word of the int16 ``weight`` ``[N * b / 16, K]`` holds codes of two neighbouring inputs and several outputs
that are ``tile`` rows apart. At 3 bits a pair of words is one of 32 bits with five 6-bit fields; what is left
over, two bits in each of three such words, is the sixteenth field.

Source: ``pack`` in flute/utils.py of github.com/HanGuo97/flute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute_quant.errors import CheckpointError

__all__ = ["TILES", "unpack_tiles"]

TILES = (32, 64)
"""Rows between the codes of one word. All published checkpoints have 32."""


def unpack_tiles(weight: Tensor, bits: int, tile: int, name: str) -> Tensor:
    """int16 ``[N * bits / 16, K]`` to uint8 codes ``[N, K]``.

    Raises:
        CheckpointError: N is no multiple of what one tile holds, or a 3-bit weight in tiles of 64.
    """
    rows, k = weight.shape
    n = rows * 16 // bits
    outputs = 16 * tile if bits == 3 else 16 // bits * tile
    if rows % bits or n % outputs or k % 2 or (bits == 3 and tile != 32):
        raise CheckpointError(
            f"{name} is {[rows, k]}, which is {n} outputs of {bits} bits; expected a multiple of {outputs} "
            f"outputs in tiles of {tile}."
        )
    return _unpack3(weight, tile) if bits == 3 else _unpack(weight, bits, tile)


def _unpack(weight: Tensor, bits: int, tile: int) -> Tensor:
    rows, k = weight.shape
    per_word = 16 // bits
    # [block, row in tile, pair of inputs, word of the pair]
    words = weight.view(rows // tile, tile, k // 2, 2)
    codes = torch.empty(rows // tile, per_word, tile, k // 2, 2, dtype=torch.uint8)
    for j in range(per_word):
        word = words[..., j // (per_word // 2)]
        for parity in (0, 1):
            shift = bits * (2 * (j % (per_word // 2)) + 1 - parity)
            codes[:, j, :, :, parity] = ((word >> shift) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(rows * per_word, k)


def _unpack3(weight: Tensor, tile: int) -> Tensor:
    rows, k = weight.shape
    blocks = rows // (3 * tile)
    # As 32-bit words [block, row in tile, pair of inputs], one for each slice.
    words = weight.contiguous().view(torch.int32)
    first = words[: blocks * tile].view(blocks, tile, k // 2)
    others = words[blocks * tile :].view(blocks, 2, tile, k // 2)
    slices = (first, others[:, 0], others[:, 1])
    codes = torch.empty(blocks, 16, tile, k // 2, 2, dtype=torch.uint8)

    def put(j: int, field: Tensor) -> None:
        codes[:, j, :, :, 1] = (field & 7).to(torch.uint8)
        codes[:, j, :, :, 0] = ((field >> 3) & 7).to(torch.uint8)

    for s, words_of in enumerate(slices):
        for i in range(5):
            put(3 * i + s, words_of >> (6 * i))
    put(15, sum(((w >> 30) & 3) << (2 * s) for s, w in enumerate(slices)))  # type: ignore[arg-type]
    return codes.view(blocks * 16 * tile, k)
