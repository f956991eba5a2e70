"""The block types of GGUF files that are tables: 32 codes of 4 bits and one scale.

Byte j of a block's 16 holds the code of its weight j in the low half and of weight j + 16 in the high half.

Source: ggml-common.h and ``dequantize_row_*`` in ggml-quants.c of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK", "BLOCK_TYPES", "BlockType"]

BLOCK = 32
_CODES = 16  # bytes


@dataclass(frozen=True)
class BlockType:
    """One of them.

    Args:
        name: as GGUF calls it.
        scale_bytes: before the codes.
        table: 16 values; all are exact in float16.
        scales: uint8 ``[N, K / 32, scale_bytes]`` to float16 or bfloat16 ``[N, K / 32]``.
        scale_dtype: of these.
    """

    name: str
    scale_bytes: int
    table: tuple[float, ...]
    scales: Callable[[Tensor], Tensor]
    scale_dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return self.scale_bytes + _CODES

    def split(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 ``[N, bytes of a row]`` to codes ``[N, K]`` and scales ``[N, K / 32]``."""
        blocks = data.view(len(data), -1, self.block_bytes)
        packed = blocks[..., self.scale_bytes :]
        codes = torch.cat([packed & 15, packed >> 4], -1)
        return codes.view(len(data), -1), self.scales(blocks[..., : self.scale_bytes].contiguous())


def _half(data: Tensor) -> Tensor:
    return data.view(torch.float16)[..., 0]


def _half_power(data: Tensor) -> Tensor:
    """Half of the power of two with a biased exponent (e8m0): the table is in halves."""
    powers = torch.tensor([2.0 ** (e - 128) for e in range(256)], dtype=torch.bfloat16)
    return powers[data[..., 0].long()]


_INT4 = tuple(float(v) for v in range(-8, 8))
# Steps that widen towards the ends, as in NormalFloat.
_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)

BLOCK_TYPES = {
    t.name: t
    for t in (
        BlockType("Q4_0", 2, _INT4, _half, torch.float16),
        BlockType("IQ4_NL", 2, tuple(float(v) for v in _NL), _half, torch.float16),
        BlockType("MXFP4", 1, (*_E2M1, *(-v for v in _E2M1)), _half_power, torch.bfloat16),
    )
}
