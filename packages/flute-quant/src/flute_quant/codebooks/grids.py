"""Tables that hardware number formats define: two's complement integers and tiny floats."""

from __future__ import annotations

import torch
from torch import Tensor

from flute_quant.errors import QuantizationError

__all__ = ["float_table", "int_table"]

_MAGNITUDES = {
    4: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),  # e2m1, the element of OCP MXFP4
    3: (0.0, 1.0, 2.0, 4.0),  # e2m0: the same exponents without a mantissa bit
}


def int_table(bits: int) -> Tensor:
    """Two's complement integers: float32 ``[2**bits]`` from ``-2**(bits-1)`` to ``2**(bits-1) - 1``."""
    half = 1 << (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32)


def float_table(bits: int) -> Tensor:
    """Sign, two exponent bits and what is left as mantissa: float32 ``[2**bits]``, ascending, zero twice.

    Source: OCP Microscaling Formats (MX) v1.0, section 5.3.3, for 4 bits (e2m1).

    Raises:
        QuantizationError: 2 bits, which have no room for a sign and two exponent bits.
    """
    if bits not in _MAGNITUDES:
        raise QuantizationError(
            f"A float table of {bits} bits is not defined; a sign and two exponent bits need 3 or 4."
        )
    positive = torch.tensor(_MAGNITUDES[bits])
    return torch.cat([-positive.flip(0), positive])
