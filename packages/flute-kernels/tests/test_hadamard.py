"""The blockwise rotation against the matrix that defines it."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from flute_kernels import FormatError, UnsupportedError, hadamard

from .helpers import DTYPES, assert_near, refusal, same_bits

BLOCKS = [1 << i for i in range(1, 13)]


@cache
def sylvester() -> Tensor:
    """Sylvester's matrix of 4096 rows, float64; the smaller ones are its corners."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 4096:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotated(x: Tensor, signs: Tensor | None, block: int, transpose: bool = False) -> Tensor:
    """The definition, float64: every block times an orthonormal matrix, signs before or after."""
    signs = torch.ones(x.shape[-1]) if signs is None else signs
    blocks = (x if transpose else x * signs).double().unflatten(-1, (-1, block))
    out: Tensor = (blocks @ sylvester()[:block, :block] / block**0.5).flatten(-2)
    return out * signs if transpose else out


def random_signs(columns: int) -> Tensor:
    return torch.randint(0, 2, (columns,)) * 2.0 - 1


@pytest.mark.usefixtures("isa", "poisoned")
class TestOnEveryInstructionSet:
    @pytest.mark.parametrize("block", BLOCKS)
    def test_every_block_size_is_its_matrix(self, block: int) -> None:
        columns = block * 3
        signs = random_signs(columns)
        for dtype in DTYPES:
            x = torch.randn(5, columns).to(dtype)
            for given, transpose in product((signs, None), (False, True)):
                assert_near(hadamard(x, given, block, transpose), rotated(x, given, block, transpose))

    @pytest.mark.parametrize("block", BLOCKS)
    def test_transpose_is_the_inverse_and_lengths_stay(self, block: int) -> None:
        x, signs = torch.randn(3, 4096), random_signs(4096)
        y = hadamard(x, signs, block)
        assert_near(hadamard(y, signs, block, True), x.double())
        assert_near(y.norm(dim=1), x.double().norm(dim=1))

    @pytest.mark.parametrize("block", [4, 16, 64, 1024])
    def test_whole_numbers_are_exact(self, block: int) -> None:
        """With a block that is a power of four the norm is a power of two: every step is exact."""
        x, signs = torch.randint(-8, 9, (4, 2048)).float(), random_signs(2048)
        assert torch.equal(hadamard(x, signs, block).double(), rotated(x, signs, block))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_shape_and_stride(self, dtype: torch.dtype) -> None:
        wide, signs = torch.randn(6, 5, 200).to(dtype), random_signs(96)
        for x in (
            wide[:, :, :96],
            wide[:, ::2, ::2][..., :96],
            wide[..., :96].transpose(0, 1),
            wide[0, 0, :96],
            wide[:0, :, :96],
            wide[0, 0, :96].expand(2, 3, 96),
        ):
            before = x.clone()
            y = hadamard(x, signs, 32)
            assert y.is_contiguous()
            assert y.dtype == dtype
            assert_near(y, rotated(x, signs, 32))
            assert torch.equal(x, before)

    def test_the_number_of_threads_changes_no_bit(self) -> None:
        x, signs = torch.randn(301, 512), random_signs(512)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(hadamard(x, signs, 128))
        assert same_bits(results[0], results[1])
        assert same_bits(results[0], results[2])

    def test_strided_signs_are_read_as_such(self) -> None:
        x, signs = torch.randn(3, 96), random_signs(192)[::2]
        assert same_bits(hadamard(x, signs, 32), hadamard(x, signs.clone(), 32))


@pytest.mark.parametrize("block", [-2, 0, 1, 3, 48, 8192])
def test_another_block_size_is_refused(block: int) -> None:
    with refusal(FormatError, f"block_size is {block}", "4096"):
        hadamard(torch.zeros(2, 8192), None, block)


@pytest.mark.parametrize("shape", [(), (2, 48), (31,)])
def test_a_block_must_divide_the_last_dimension(shape: tuple[int, ...]) -> None:
    with refusal(FormatError, str(list(shape)), 32):
        hadamard(torch.zeros(shape), None, 32)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_rows_without_columns_stay_empty_or_are_refused(shape: tuple[int, ...]) -> None:
    try:
        out = hadamard(torch.zeros(shape), None, 32)
    except FormatError:
        return
    assert out.shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with refusal(UnsupportedError, dtype, "float32, float16 and bfloat16"):
        hadamard(torch.zeros(2, 64, dtype=dtype), None, 32)


def test_other_signs_are_refused() -> None:
    x = torch.zeros(2, 64)
    with refusal(FormatError, "[32]", "[64]"):
        hadamard(x, torch.ones(32), 32)
    with refusal(FormatError, "torch.float64", "float32"):
        hadamard(x, torch.ones(64).double(), 32)
    with refusal(FormatError, "meta", "cpu"):
        hadamard(x, torch.ones(64, device="meta"), 32)
