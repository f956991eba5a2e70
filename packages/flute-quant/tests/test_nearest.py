"""The encoder finds the nearest entry of any table, as a comparison with all entries would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flute_quant.codebooks import float_table, int_table, lloyd_pairs_table, normalfloat_table
from flute_quant.methods.nearest import nearest_for


def _check(table: torch.Tensor, values: torch.Tensor) -> None:
    nearest = nearest_for(table)
    found = nearest.lookup(nearest.codes(values)).view(-1, nearest.vector_size)
    points = values.reshape(-1, nearest.vector_size)
    best = torch.cdist(points.double(), table.view(-1, nearest.vector_size).double()).amin(1)
    distance = (found.double() - points.double()).norm(dim=1)
    # Only a tie within float32's rounding may be settled the other way.
    assert torch.allclose(distance, best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "table",
    [
        normalfloat_table(4),
        int_table(2),
        float_table(4),
        normalfloat_table(3).flip(0),
        torch.tensor([0.0, 1e-7, 2e-7, 1.0]),
        torch.tensor([1.0, 1.0, 1.0, 1.0]),
    ],
    ids=["nf4", "int2", "fp4-two-zeros", "descending", "entries-too-close-for-a-grid", "all-equal"],
)
def test_scalar_tables(table: torch.Tensor) -> None:
    values = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * 3
    _check(table, values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pair_tables_inside_and_far_outside(bits: int) -> None:
    values = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    values[:10] *= 20
    _check(lloyd_pairs_table(bits), values)


@settings(max_examples=60, deadline=None)
@given(
    table=st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=16),
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
)
def test_any_table_any_values(table: list[float], values: list[float]) -> None:
    _check(torch.tensor(table), torch.tensor([values]))


@settings(max_examples=30, deadline=None)
@given(
    table=st.lists(
        st.tuples(st.floats(-2, 2, width=16), st.floats(-2, 2, width=16)), min_size=16, max_size=16
    ),
    values=st.lists(
        st.tuples(st.floats(-9, 9, width=32), st.floats(-9, 9, width=32)), min_size=1, max_size=20
    ),
)
def test_any_pairs_any_values(table: list[tuple[float, float]], values: list[tuple[float, float]]) -> None:
    if any(any(entry) for entry in table):
        _check(torch.tensor(table), torch.tensor(values).reshape(1, -1))
