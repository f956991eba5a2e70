"""QuantSpec: which numbers the format has, and the shapes that follow from them."""

from __future__ import annotations

import dataclasses

import pytest

from flute_kernels import FormatError, QuantSpec

from .helpers import ALL_SPECS, refusal, spec_id


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bits", 1, "2, 3 and 4"),
        ("bits", 5, "2, 3 and 4"),
        ("bits", 4.0, "an integer"),
        ("bits", True, "an integer"),
        ("bits", "4", "an integer"),
        ("group_size", 48, "32, 64, 128 and 256"),
        ("group_size", 0, "-1"),
        ("group_size", -2, "-1"),
        ("group_size", 512, "256"),
        ("vector_size", 0, "1 and 2"),
        ("vector_size", 3, "1 and 2"),
        ("hadamard", 1, "powers of two"),
        ("hadamard", 48, "powers of two"),
        ("hadamard", 8192, "4096"),
        ("hadamard", -2, "powers of two"),
        ("hadamard_seed", -2, "2**64"),
        ("hadamard_seed", 1 << 64, "2**64"),
    ],
)
def test_a_number_that_the_format_lacks_is_refused(field: str, value: object, said: str) -> None:
    with refusal(FormatError, field, repr(value), said):
        QuantSpec(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["hadamard", "hadamard_seed"])
def test_the_largest_numbers_are_taken(field: str) -> None:
    largest = {"hadamard": 4096, "hadamard_seed": (1 << 64) - 1}[field]
    assert getattr(QuantSpec(**{field: largest}), field) == largest


@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
def test_shapes_follow_the_formulas(spec: QuantSpec) -> None:
    n, k, tables = 37, 768, 3
    group = k if spec.group_size == -1 else spec.group_size
    assert spec.shapes(n, k, tables) == {
        "qweight": (n, k * spec.bits // 32),
        "scales": (n, k // group),
        "codebook": (tables, 2 ** (spec.bits * spec.vector_size), spec.vector_size),
    }
    assert spec.code_bits == spec.bits * spec.vector_size
    assert spec.table_entries == 2**spec.code_bits


def test_storage_counts_codes_scales_and_tables() -> None:
    spec = QuantSpec(bits=4, group_size=64)
    assert spec.bits_per_weight(128, 256) == pytest.approx(4 + 16 / 64 + 16 * 16 / (128 * 256))
    more = spec.bits_per_weight(128, 256, tables=8, table_bits=32)
    assert more == pytest.approx(4 + 16 / 64 + 8 * 16 * 32 / (128 * 256))


@pytest.mark.parametrize("k", [-32, 0, 16, 33, 48])
def test_rows_are_a_positive_multiple_of_32(k: int) -> None:
    with refusal(FormatError, k, "multiple of 32"):
        QuantSpec(group_size=-1).check_in_features(k)


def test_the_group_divides_the_row() -> None:
    with refusal(FormatError, "in_features is 96", "group_size 64", "32 and -1"):
        QuantSpec(group_size=64).check_in_features(96)


def test_the_hadamard_block_divides_the_row() -> None:
    with refusal(FormatError, "in_features is 96", "64"):
        QuantSpec(group_size=32, hadamard=64).check_in_features(96)


@pytest.mark.parametrize("n", [0, -1])
def test_a_weight_has_rows(n: int) -> None:
    with refusal(FormatError, "out_features", n):
        QuantSpec().shapes(n, 64)


def test_a_spec_is_a_value() -> None:
    assert QuantSpec(bits=3) == QuantSpec(bits=3)
    assert len({QuantSpec(bits=3), QuantSpec(bits=3), QuantSpec()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 5  # type: ignore[misc]
