"""Codes to bit stream and back: the ``qweight`` tensor of the weight format.

Every row is one little-endian bit stream along K. Eight codes of ``c`` bits fill exactly ``c``
bytes for every width that the format has, so eight codes are squeezed together inside one 64-bit
integer, in three steps that halve the number of fields, and its low ``c`` bytes are stored.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from flute_kernels.errors import FormatError
from flute_kernels.format.spec import PER_ROW, QuantSpec

__all__ = ["pack_codes", "unpack_codes"]

_FIELDS = 8
# Rows are handled in slices of about this many codes: the temporaries then stay in a core's cache.
_SLICE = 1 << 18


def pack_codes(codes: Tensor, bits: int, vector_size: int = 1) -> Tensor:
    """Pack table indices into the format's bit stream.

    Args:
        codes: integer ``[N, K / vector_size]``, each in ``[0, 2**(bits * vector_size))``.
        bits: bits per weight, 2, 3 or 4.
        vector_size: weights that share a code, 1 or 2.

    Returns:
        int32 ``[N, K * bits / 32]`` on the device of ``codes``.

    Raises:
        FormatError: ``codes`` has another rank or dtype, K is no multiple of 32, or a code is
            outside of its table.
    """
    spec = QuantSpec(bits=bits, group_size=PER_ROW, vector_size=vector_size)
    if codes.ndim != 2:
        raise FormatError(
            f"codes has shape {list(codes.shape)}; expected two dimensions [N, K / vector_size]."
        )
    if codes.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise FormatError(f"codes has dtype {codes.dtype}; expected uint8, int8, int16, int32 or int64.")
    rows, per_row = codes.shape
    in_features = per_row * vector_size
    spec.check_in_features(in_features)
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if low < 0 or high >= spec.table_entries:
        raise FormatError(
            f"codes span {low} to {high}; a table of {bits} bits and vectors of "
            f"{vector_size} has entries 0 to {spec.table_entries - 1}."
        )
    width = spec.code_bits
    packed = torch.empty(rows, in_features * bits // 8, dtype=torch.uint8, device=codes.device)
    for start, stop in _row_slices(rows, per_row):
        words = codes[start:stop].to(torch.uint8).contiguous().view(torch.int64)
        for field in (8, 16, 32):
            even, odd = _masks(width, field)
            words = (words & even).bitwise_or_((words >> (field - _used(width, field))).bitwise_and_(odd))
        squeezed = words.view(torch.uint8).view(stop - start, -1, _FIELDS)[..., :width]
        packed[start:stop] = squeezed.reshape(stop - start, -1)
    return packed.view(torch.int32)


def unpack_codes(qweight: Tensor, bits: int, vector_size: int = 1) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        qweight: int32 ``[N, K * bits / 32]``.
        bits: bits per weight, 2, 3 or 4.
        vector_size: weights that share a code, 1 or 2.

    Returns:
        uint8 ``[N, K / vector_size]``.

    Raises:
        FormatError: ``qweight`` is no such tensor.
    """
    spec = QuantSpec(bits=bits, group_size=PER_ROW, vector_size=vector_size)
    if qweight.dtype != torch.int32 or qweight.ndim != 2:
        raise FormatError(
            f"qweight is {qweight.dtype} of shape {list(qweight.shape)}; expected int32 [N, K * {bits} / 32]."
        )
    rows, row_words = qweight.shape
    if row_words == 0 or row_words % bits:
        raise FormatError(
            f"qweight has {row_words} words a row; at {bits} bits expected a positive multiple of {bits}."
        )
    width = spec.code_bits
    per_row = row_words * 32 // width
    codes = torch.empty(rows, per_row, dtype=torch.uint8, device=qweight.device)
    for start, stop in _row_slices(rows, per_row):
        stored = qweight[start:stop].contiguous().view(torch.uint8).view(stop - start, -1, width)
        words = torch.nn.functional.pad(stored, (0, _FIELDS - width)).contiguous().view(torch.int64)
        for field in (32, 16, 8):
            even, odd = _masks(width, field)
            words = (words & even).bitwise_or_((words & odd).bitwise_left_shift_(field - _used(width, field)))
        codes[start:stop] = words.view(torch.uint8).view(stop - start, per_row)
    return codes


def _row_slices(rows: int, per_row: int) -> list[tuple[int, int]]:
    if sys.byteorder != "little":  # the int64 view below would order the fields the other way
        raise NotImplementedError("FLUTE's bit stream is little-endian, and so must the host be.")
    step = max(1, _SLICE // max(1, per_row))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def _used(width: int, field: int) -> int:
    """Bits in use inside a field of ``field`` bits (8, 16 or 32) before it is merged with its neighbour."""
    return width * field // _FIELDS


def _masks(width: int, field: int) -> tuple[int, int]:
    """Bits of the even and of the odd fields of ``field`` bits once each pair is squeezed together."""
    used = _used(width, field)
    even = sum(((1 << used) - 1) << shift for shift in range(0, 64, 2 * field))
    return _signed(even), _signed(even << used)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
