"""Scales of other formats in the two dtypes that ours has, and groups in the sizes that ours has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flute_kernels.format import GROUP_SIZES, PER_ROW
from flute_quant.errors import QuantizationError

__all__ = ["FittedScales", "constant_groups", "fit_scales", "group_for", "regroup", "rounding_error"]

_TOP = 15  # 2**15 is the largest power of two in float16
_LEAST_NORMAL = 2.0**-14
# Weights looked at at once: 4 M of them take 50 MB.
_VALUES = 1 << 22


@dataclass(frozen=True)
class FittedScales:
    """16-bit scales, and the power of two that the table is multiplied with.

    ``scales * factor`` are the wanted scales: exactly, or rounded once to float16 (by at most 2**-11 of
    each, if it is no more than 2**29 times smaller than the largest).
    """

    scales: Tensor
    factor: float
    exact: bool


def fit_scales(wanted: Tensor, name: str) -> FittedScales:
    """Store scales in float16 or bfloat16, exactly if one of them can, with a power of two if need be.

    Absolute maxima of 16-bit weights are 16-bit numbers themselves, though they are stored in 32 bits; a
    power of two moves the small ones among them into the range of float16.

    Args:
        wanted: float16, bfloat16 or float32 scales of any shape.
        name: what errors call them.

    Raises:
        QuantizationError: a scale is NaN or infinite, or their range is beyond both dtypes.
    """
    bad = int((~torch.isfinite(wanted)).sum())
    if bad:
        raise QuantizationError(
            f"{name} has {bad} of {wanted.numel()} scales that are NaN or infinite; expected none."
        )
    if wanted.dtype in (torch.float16, torch.bfloat16):
        return FittedScales(wanted, 1.0, True)
    values = wanted.to(torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        if _holds(values, dtype):
            return FittedScales(values.to(dtype), 1.0, True)
    largest = float(values.abs().max())
    smallest = float(values.abs()[values != 0].min())
    shift = 2.0 ** (int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent) - _TOP)
    if _holds(values / shift, torch.float16):
        return FittedScales((values / shift).to(torch.float16), shift, True)
    # Rounded, and then the plain table is preferred where float16 reaches as it is.
    if largest < 2.0**_TOP and smallest >= _LEAST_NORMAL:
        shift = 1.0
    rounded = (values / shift).to(torch.float16)
    if bool(((rounded == 0) & (values != 0)).any()):
        raise QuantizationError(
            f"{name} has scales from {smallest:.3g} to {largest:.3g}; "
            "float16 scales, with a power of two for all of them, span a factor of 2**40."
        )
    return FittedScales(rounded, shift, False)


def rounding_error(fitted: FittedScales, wanted: Tensor, codes: Tensor, table: Tensor) -> float:
    """Relative squared error of a weight of which nothing but the scales was rounded.

    Args:
        fitted: with the scales ``[N, G]`` that are stored.
        wanted: those of the source ``[N, G]``.
        codes: uint8 ``[N, K]``.
        table: the source's values ``[2**bits]``.
    """
    if fitted.exact:
        return 0.0
    squares = table.to(torch.float32).square()
    wanted, stored = wanted.double(), fitted.scales.double() * fitted.factor
    difference = energy = 0.0
    step = max(1, _VALUES // codes.shape[1])
    for rows in range(0, len(codes), step):
        part = slice(rows, rows + step)
        inside = squares[codes[part].long()].view(*wanted[part].shape, -1).sum(2).double()
        difference += float(((stored[part] - wanted[part]).square() * inside).sum())
        energy += float((wanted[part].square() * inside).sum())
    return difference / energy if energy else 0.0


def _holds(values: Tensor, dtype: torch.dtype) -> bool:
    return bool((values.to(dtype).to(torch.float64) == values).all())


def group_for(size: int, in_features: int, name: str) -> int:
    """The largest group of ours inside of runs of ``size`` weights, counted from any row's beginning.

    Args:
        size: neighbouring weights that share a scale; a row may begin inside of a run only where ours do.

    Raises:
        QuantizationError: the source's groups are smaller than ours can be, or do not divide K.
    """
    if size and in_features and size % in_features == 0:
        return PER_ROW
    fits = [g for g in GROUP_SIZES if size % g == 0 and in_features % g == 0]
    if not fits or not size or not in_features:
        raise QuantizationError(
            f"{name} has groups of {size} in rows of {in_features}; supported are whole rows and multiples "
            f"of {GROUP_SIZES[0]} that share a divisor among {', '.join(map(str, GROUP_SIZES))} with the row."
        )
    return max(fits)


def regroup(scales: Tensor, in_features: int, group_size: int) -> Tensor:
    """Scales ``[N, G]`` of equal larger groups, repeated for groups of ``group_size``: ``[N, K / g]``."""
    if group_size == PER_ROW:
        return scales.contiguous()
    return scales.repeat_interleave(in_features // group_size // scales.shape[1], dim=1)


def constant_groups(g_idx: Tensor, groups: int, name: str) -> tuple[int, Tensor]:
    """The largest group of ours within which every input has the same scale.

    Args:
        g_idx: integer ``[K]``, the scale that each input uses, of ``groups`` many.

    Returns:
        The group size, and int64 ``[K / g]``: the source's group of each of ours.

    Raises:
        QuantizationError: inputs are ordered by activation, so that neighbours have different scales.
    """
    k = len(g_idx)
    index = g_idx.to(torch.int64)
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= groups:
        raise QuantizationError(
            f"{name} names the groups {low} to {high}; its scales have 0 to {groups - 1}."
        )
    if low == high:
        return PER_ROW, index[:1]
    for size in sorted(GROUP_SIZES, reverse=True):
        if k % size == 0:
            runs = index.view(-1, size)
            if bool((runs == runs[:, :1]).all()):
                return size, runs[:, 0].contiguous()
    smallest = GROUP_SIZES[0]
    runs = index[: k // smallest * smallest].view(-1, smallest)
    mixed = torch.nonzero((runs != runs[:, :1]).any(1)).flatten()
    first = int(mixed[0]) if len(mixed) else k // smallest
    start = first * smallest
    raise QuantizationError(
        f"{name} gives the {smallest} inputs from {start} on "
        f"{len(torch.unique(index[start : start + smallest]))} different scales (act-order), as it does in "
        f"{len(mixed)} of {len(runs)} runs of {smallest}; supported are runs of {smallest} or more inputs "
        "that share one, as desc_act false or static groups give."
    )
