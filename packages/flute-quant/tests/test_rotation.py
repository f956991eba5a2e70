"""The reference rotation is what the format says: signs, then Sylvester-Hadamard, orthonormal."""

from __future__ import annotations

import math

import pytest
import torch

from flute_kernels.format import hadamard_signs
from flute_quant.rotation import fwht, rotate, unrotate


def sylvester(block: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(block)


@pytest.mark.parametrize("block", [2, 4, 32, 256])
def test_the_transform_is_the_sylvester_matrix_on_every_block(block: int) -> None:
    values = torch.randn(3, 2 * block, dtype=torch.float64)
    expected = (values.view(3, 2, block) @ sylvester(block)).view(3, -1)
    assert torch.allclose(fwht(values, block), expected)


def test_rotating_both_sides_keeps_the_product() -> None:
    x, w = torch.randn(5, 192, dtype=torch.float64), torch.randn(7, 192, dtype=torch.float64)
    assert torch.allclose(rotate(x, 64, 9) @ rotate(w, 64, 9).T, x @ w.T)
    assert torch.allclose(rotate(x, 64, 9), fwht(x * hadamard_signs(192, 9).double(), 64))


def test_unrotate_is_the_inverse() -> None:
    x = torch.randn(5, 192, dtype=torch.float64)
    assert torch.allclose(unrotate(rotate(x, 32, 3), 32, 3), x)
