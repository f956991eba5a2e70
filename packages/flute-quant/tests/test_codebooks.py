"""The tables, against what was published and against what defines them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flute_kernels import QuantSpec
from flute_quant import QuantizationError, load_table
from flute_quant.codebooks import (
    anneal,
    cartesian_square,
    check_table,
    float_table,
    gaussian_pairs,
    int_table,
    lloyd_max_table,
    lloyd_pairs_table,
    normalfloat_table,
    signed_table,
    stored_table,
)

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
# Max 1960, table I: the positive levels for a standard normal, to four digits.
MAX_1960 = {
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


def test_normalfloat_of_4_bits_is_qloras_nf4() -> None:
    assert torch.allclose(normalfloat_table(4), torch.tensor(NF4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normalfloat_ascends_from_minus_one_to_one_through_an_exact_zero(bits: int) -> None:
    table = normalfloat_table(bits)
    assert table.shape == (2**bits,)
    assert bool((table.diff() > 0).all())
    assert (float(table[0]), float(table[-1])) == (-1.0, 1.0)
    assert int((table == 0).sum()) == 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_is_the_published_optimum(bits: int) -> None:
    table = lloyd_max_table(bits)
    published = torch.tensor(MAX_1960[bits])
    half = table[2 ** (bits - 1) :]
    assert torch.allclose(half * published[-1], published, rtol=1e-3, atol=0)
    assert torch.equal(table, -table.flip(0))


# Max 1960 gives the scalar distortions to four digits. Of pairs, HIGGS (arXiv 2411.17525) uses grids of
# these or larger distortions.
DISTORTIONS = {2: (0.1175, 0.108), 3: (0.0345, 0.0297), 4: (0.00950, 0.0078)}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortions_are_the_known_ones(bits: int) -> None:
    """Mean squared errors of a standard normal; the tables are in units of their largest entries."""
    scalar, pairs = DISTORTIONS[bits]
    line = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    mass = torch.exp(-line.square() / 2)
    levels = lloyd_max_table(bits).double() * MAX_1960[bits][-1]
    least = (line[:, None] - levels).square().amin(1)
    assert float((least * mass).sum() / mass.sum()) == pytest.approx(scalar, rel=2e-3)
    table = lloyd_pairs_table(bits)
    assert table.shape == (4**bits, 2)
    assert float(table.abs().max()) == 1.0
    largest = gaussian_pairs(bits).abs().max()
    assert anneal.pair_distortion(table * largest) <= pairs
    # Against a random sample, as the grid could be wrong.
    points = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1))
    sampled = float(torch.cdist(points, table * largest).amin(1).square().mean()) / 2
    assert sampled == pytest.approx(anneal.pair_distortion(table * largest), rel=1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pairs_are_a_fixed_point_of_lloyds_algorithm(bits: int) -> None:
    table = gaussian_pairs(bits)
    assert float((anneal.lloyd_step(table) - table).abs().max()) < 1e-4


def test_annealing_finds_such_pairs_again() -> None:
    """Another seed settles elsewhere, at nearly the same distortion; without the noise it stays above."""
    assert anneal.pair_distortion(anneal.anneal_pairs(16, seed=3)) <= DISTORTIONS[2][1]
    settled = anneal.anneal_pairs(64, seed=3, steps=0)
    assert DISTORTIONS[3][1] < anneal.pair_distortion(settled) < 1.02 * DISTORTIONS[3][1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_signed_table_is_a_fixed_point_of_its_own_making(bits: int) -> None:
    """One step of the alternation in its docstring, written out: no entry moves."""
    table = signed_table(bits)
    assert table.shape == (2**bits,)
    assert bool((table.diff() > 0).all())
    assert float(table[-1]) == 1.0
    assert int((table == 0).sum()) == 1
    groups = torch.randn(5_000, 64, generator=torch.Generator().manual_seed(3))
    largest = groups.abs().amax(1, keepdim=True)
    borders = (table[1:] + table[:-1]) / 2
    best, scale = torch.full_like(largest, math.inf), largest
    for factor in torch.linspace(0.55, 1.1, 23).tolist():
        for candidate in (factor * largest, -factor * largest):
            error = groups - candidate * table[torch.bucketize(groups / candidate, borders)]
            cost = error.square().sum(1, keepdim=True)
            scale = torch.where(cost < best, candidate, scale)
            best = torch.minimum(best, cost)
    codes = torch.bucketize(groups / scale, borders).flatten()
    weight = scale.square().expand_as(groups).flatten().double()
    pull = (scale * groups).flatten().double()
    moved = torch.bincount(codes, pull, 2**bits) / torch.bincount(codes, weight, 2**bits)
    moved[table == 0] = 0.0
    assert float((moved / moved.max() - table).abs().max()) < 0.004


def test_int_and_float_tables_are_the_hardware_formats() -> None:
    assert int_table(3).tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert float_table(4).tolist()[8:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float_table(3).tolist() == [-4, -2, -1, 0, 0, 1, 2, 4]
    with pytest.raises(QuantizationError, match="2 bits"):
        float_table(2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_cartesian_square_reads_two_scalar_codes_as_one(bits: int) -> None:
    table = int_table(bits)
    square = cartesian_square(table)
    for low in range(2**bits):
        for high in range(2**bits):
            assert square[low + (high << bits)].tolist() == [float(table[low]), float(table[high])]


def test_a_table_is_stored_in_16_bits_unless_exactness_needs_32() -> None:
    assert stored_table(torch.tensor([0.5, 1.0]), exact=True).dtype == torch.float16
    assert stored_table(torch.tensor([0.1, 1.0]), exact=True).dtype == torch.float32
    assert stored_table(torch.tensor([0.1, 1.0])).dtype == torch.float16


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([1.0, 2.0, 3.0], r"shape \[3\].*need \[4\]"),
        ([0.0, 1.0, math.nan, math.inf], "2 of 4 values"),
        ([0.0] * 4, "All 4 values"),
        (["a", "b", "c", "d"], "not an array of numbers"),
        ([[1.0, 2.0], [3.0]], "not an array of numbers"),
    ],
)
def test_a_users_table_is_refused_with_the_numbers(table: object, said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        check_table(table, QuantSpec(bits=2))


def test_pairs_need_vectors_of_two() -> None:
    pairs = torch.randn(16, 2)
    assert check_table(pairs, QuantSpec(bits=2, vector_size=2)).shape == (16, 2)
    with pytest.raises(QuantizationError, match=r"\[16, 2\]"):
        check_table(pairs, QuantSpec(bits=2))


def test_tables_are_read_from_json_and_safetensors(tmp_path: Path) -> None:
    values = [-1.0, -0.25, 0.25, 1.0]
    (tmp_path / "t.json").write_text(json.dumps(values))
    save_file({"table": torch.tensor(values)}, tmp_path / "t.safetensors")
    assert load_table(tmp_path / "t.json").tolist() == values
    assert load_table(tmp_path / "t.safetensors").tolist() == values


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.txt", b"1 2 3 4", "neither"),
        ("t.json", b"{", "not an array"),
        ("t.json", b"[" * 100_000, "not an array"),
        ("t.json", b'{"a": 1}', "not an array"),
        ("t.safetensors", b"\xff" * 64, "truncated"),
    ],
)
def test_a_table_file_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantizationError, match=said):
        load_table(tmp_path / name)


def test_a_missing_table_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="No such file"):
        load_table(tmp_path / "absent.json")
