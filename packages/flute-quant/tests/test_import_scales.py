"""Scales and groups of other formats, in those that ours has."""

from __future__ import annotations

import pytest
import torch

from flute_quant import QuantizationError
from flute_quant.importers.grid import integer_grid
from flute_quant.importers.scales import constant_groups, fit_scales, group_for, regroup


def halves(count: int = 64) -> torch.Tensor:
    """Values with all 11 bits of a float16 mantissa, between 1 and 2."""
    return 1 + torch.arange(count).float() / 1024 + 1 / 1024


@pytest.mark.parametrize(
    ("wanted", "dtype", "factor"),
    [
        (halves(), torch.float16, 1.0),
        (halves().half(), torch.float16, 1.0),
        (halves().bfloat16(), torch.bfloat16, 1.0),
        # Eight bits of mantissa below the range of float16.
        (torch.tensor([1.5, 1.0078125]) * 2.0**-30, torch.bfloat16, 1.0),
        # Eleven bits below it, and above: a power of two moves them.
        (halves() * 2.0**-24, torch.float16, 2.0**-38),
        (halves() * 2.0**40, torch.float16, 2.0**26),
        (torch.zeros(3), torch.float16, 1.0),
    ],
)
def test_scales_that_a_16_bit_type_can_hold_are_exact(
    wanted: torch.Tensor, dtype: torch.dtype, factor: float
) -> None:
    fitted = fit_scales(wanted, "scales")
    assert fitted.exact
    assert (fitted.scales.dtype, fitted.factor) == (dtype, factor)
    assert torch.equal(fitted.scales.double() * fitted.factor, wanted.double())


@pytest.mark.parametrize("power", [0, -20, 20])
def test_others_are_rounded_once_to_float16(power: int) -> None:
    wanted = torch.rand(1000, generator=torch.Generator().manual_seed(0)).add(0.01) * 2.0**power
    fitted = fit_scales(wanted, "scales")
    assert not fitted.exact
    assert fitted.scales.dtype == torch.float16
    stored = fitted.scales.double() * fitted.factor
    assert torch.equal(stored / fitted.factor, (wanted.double() / fitted.factor).half().double())
    assert float((stored / wanted.double() - 1).abs().max()) <= 2**-11
    assert (fitted.factor == 1) == (power == 0)


def test_a_range_beyond_float16_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"x has scales from 1.1e-21 to 0.333"):
        fit_scales(torch.tensor([1 / 3, 1.1e-21]), "x")
    with pytest.raises(QuantizationError, match="x has 1 of 2 scales that are NaN or infinite"):
        fit_scales(torch.tensor([1.0, float("nan")]), "x")


@pytest.mark.parametrize(
    ("size", "k", "group"),
    [(64, 64, -1), (4096, 64, -1), (64, 96, 32), (128, 512, 128), (1024, 4096, 256), (4096, 11008, 256)],
)
def test_runs_along_the_flat_weight_hold_whole_groups(size: int, k: int, group: int) -> None:
    assert group_for(size, k, "x") == group
    width = k if group == -1 else group
    starts = torch.arange(0, 64 * k, width)
    assert torch.equal(starts // size, (starts + width - 1) // size)


def test_groups_smaller_than_ours_are_refused() -> None:
    with pytest.raises(QuantizationError, match="x has groups of 16 in rows of 64"):
        group_for(16, 64, "x")


def test_larger_groups_repeat_their_scale() -> None:
    scales = torch.tensor([[1.0, 2.0]])
    assert regroup(scales, 1024, 256).tolist() == [[1, 1, 2, 2]]
    assert regroup(scales[:, :1], 1024, -1).tolist() == [[1]]


def test_the_largest_constant_runs_are_taken() -> None:
    assert constant_groups(torch.arange(256) // 128, 2, "x")[0] == 128
    size, order = constant_groups(torch.tensor([2, 0, 1]).repeat_interleave(32), 3, "x")
    assert (size, order.tolist()) == (32, [2, 0, 1])
    assert constant_groups(torch.zeros(96), 1, "x")[0] == -1


def test_a_table_for_zero_points() -> None:
    one = integer_grid(4, torch.full((2, 3), 8), "x")
    assert one.table.tolist() == list(range(-8, 8))
    zeros = torch.tensor([[1, 4]])
    several = integer_grid(3, zeros, "x")
    codes = torch.tensor([[7, 0, 7, 0]], dtype=torch.uint8)
    values = several.table[several.move(codes, zeros).long()]
    assert several.bits == 4
    assert values.tolist() == [[6, -1, 3, -4]]
    with pytest.raises(QuantizationError, match="zero points from 0 to 9"):
        integer_grid(3, torch.tensor([0, 9]), "x")
