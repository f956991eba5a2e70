"""The table for groups whose scale has a sign: an exact zero, an exact +1, and no need for a -1."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["signed_table"]

_TABLES = {
    4: (
        *(-0.9258, -0.7007, -0.5415, -0.4116, -0.2986, -0.1956, -0.0972, 0.0),
        *(0.0779, 0.1626, 0.2542, 0.354, 0.4644, 0.5928, 0.7563, 1.0),
    ),
    3: (-0.7729, -0.4534, -0.2141, 0.0, 0.1786, 0.3765, 0.6206, 1.0),
    2: (-0.6211, 0.0, 0.4187, 1.0),
}


def signed_table(bits: int) -> Tensor:
    """The table of ``bits`` bits for signed scales: float32 ``[2**bits]``, ascending, 0 and 1 among them.

    A scale that may be negative turns a group so that its largest weight meets the +1, which leaves
    the entry at -1 free for smaller values. The entries are the fixed point, to within 0.002, of this
    alternation on 20,000 groups of 64 standard normals:

    1. every group takes the scale of least squared error among candidates around its largest
       magnitude, of either sign (the search of the method ``signed`` without its weighting);
    2. every entry moves to the mean of the values that chose it, weighted by their scales' squares,
       except zero, which stays;
    3. the table is divided by its largest entry.

    The tests take one step from these numbers and see that they stay. BOF4-S (Blumenberg et al.,
    arXiv 2505.06653) is the same idea without a search: its scale is always the largest weight.
    """
    return torch.tensor(_TABLES[bits], dtype=torch.float32)
