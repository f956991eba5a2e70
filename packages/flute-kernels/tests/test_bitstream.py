"""pack_codes and unpack_codes: the bit stream of ``qweight``."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flute_kernels import FormatError, pack_codes, unpack_codes

from .helpers import BITS_AND_VECTORS, refusal

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Codes ``[N, K / p]`` with their bits and vector size."""
    bits, vector_size = draw(st.sampled_from(BITS_AND_VECTORS))
    rows = draw(st.integers(1, 7))
    columns = 32 * draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (rows, columns // vector_size)
    return torch.randint(0, 1 << bits * vector_size, shape, generator=generator), bits, vector_size


def words_of(row: list[int], width: int) -> list[int]:
    """The documented layout, told with one long integer: code j lies at bits [j * width, (j + 1) * width)."""
    stream = sum(code << j * width for j, code in enumerate(row))
    words = [stream >> 32 * i & 0xFFFFFFFF for i in range(len(row) * width // 32)]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@given(streams())
def test_unpacking_gives_the_codes_back(stream: tuple[Tensor, int, int]) -> None:
    codes, bits, vector_size = stream
    unpacked = unpack_codes(pack_codes(codes, bits, vector_size), bits, vector_size)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes.to(torch.uint8))


@given(streams())
def test_the_stream_is_little_endian_along_a_row(stream: tuple[Tensor, int, int]) -> None:
    codes, bits, vector_size = stream
    packed = pack_codes(codes, bits, vector_size)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [words_of(row, bits * vector_size) for row in codes.tolist()]


def test_an_example_to_check_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0] * 4])
    assert pack_codes(codes, 4).tolist() == [[0x07654321] * 4]
    # Eight codes of three bits are 0o07654321 = 0x1F58D1; four such triples of bytes are three words.
    assert pack_codes(codes, 3).tolist() == [[0xD11F58D1 - (1 << 32), 0x58D11F58, 0x1F58D11F]]


@given(streams())
def test_a_pair_is_two_scalar_codes_on_the_same_stream(stream: tuple[Tensor, int, int]) -> None:
    pairs, bits, vector_size = stream
    if vector_size == 1:
        pairs = pairs[:, ::2] | pairs[:, 1::2] << bits
    scalars = torch.stack([pairs & (1 << bits) - 1, pairs >> bits], -1).flatten(1)
    assert torch.equal(pack_codes(pairs, bits, 2), pack_codes(scalars, bits, 1))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype_and_stride_packs_alike(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 16, (64, 5))
    assert torch.equal(pack_codes(codes.to(dtype).T, 4), pack_codes(codes.T.contiguous(), 4))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_wide_unsigned_codes_pack_or_are_refused(dtype: torch.dtype) -> None:
    codes = torch.arange(64).reshape(2, 32) % 16
    with contextlib.suppress(FormatError):
        assert torch.equal(pack_codes(codes.to(dtype), 4), pack_codes(codes, 4))


def test_a_view_unpacks_like_its_copy() -> None:
    words = torch.randint(-(2**31), 2**31, (6, 16), dtype=torch.int32)
    assert torch.equal(unpack_codes(words[::2, 4:12], 4), unpack_codes(words[::2, 4:12].clone(), 4))


@pytest.mark.parametrize(("bits", "vector_size"), BITS_AND_VECTORS)
@pytest.mark.parametrize("outside", [-1, None])
def test_a_code_outside_of_its_table_is_refused(bits: int, vector_size: int, outside: int | None) -> None:
    entries = 1 << bits * vector_size
    codes = torch.zeros(2, 32 // vector_size, dtype=torch.int64)
    codes[1, 3] = entries if outside is None else outside
    with refusal(FormatError, codes[1, 3].item(), f"0 to {entries - 1}"):
        pack_codes(codes, bits, vector_size)


def test_other_codes_are_refused() -> None:
    with refusal(FormatError, "[64]", "[N, K / vector_size]"):
        pack_codes(torch.zeros(64, dtype=torch.uint8), 4)
    with refusal(FormatError, "torch.float32"):
        pack_codes(torch.zeros(2, 64), 4)
    with refusal(FormatError, "torch.bool"):
        pack_codes(torch.zeros(2, 64, dtype=torch.bool), 4)
    with refusal(FormatError, "48", "32"):
        pack_codes(torch.zeros(2, 48, dtype=torch.uint8), 4)
    with refusal(FormatError, "5", "2, 3 and 4"):
        pack_codes(torch.zeros(2, 64, dtype=torch.uint8), 5)


def test_other_words_are_refused() -> None:
    with refusal(FormatError, "torch.int64", "[2, 8]", "int32"):
        unpack_codes(torch.zeros(2, 8, dtype=torch.int64), 4)
    with refusal(FormatError, "[8]"):
        unpack_codes(torch.zeros(8, dtype=torch.int32), 4)
    with refusal(FormatError, "7", "multiple of 3"):
        unpack_codes(torch.zeros(2, 7, dtype=torch.int32), 3)
    with refusal(FormatError, "0"):
        unpack_codes(torch.zeros(2, 0, dtype=torch.int32), 3)


def test_a_large_layer_packs_and_unpacks_in_seconds() -> None:
    """A layer of an 8B model; a loop over codes in Python would take minutes."""
    codes = torch.randint(0, 8, (14336, 4096), dtype=torch.uint8)
    start = time.thread_time()
    unpacked = unpack_codes(pack_codes(codes, 3), 3)
    assert time.thread_time() - start < 4
    assert torch.equal(unpacked, codes)
