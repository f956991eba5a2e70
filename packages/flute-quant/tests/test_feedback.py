"""Error feedback and alternating least squares, against dense references on small matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flute_quant.codebooks import lloyd_pairs_table, normalfloat_table, signed_table
from flute_quant.methods.feedback import damped, factorized, feed_back, table_for
from flute_quant.methods.nearest import nearest_for
from flute_quant.methods.refine import Fitted, cost, refit_scales, refit_table, sweep_codes

TABLES = {
    "signed-3": signed_table(3),
    "nf-2": normalfloat_table(2),
    "descending": signed_table(3).flip(0),
    "pairs-2": lloyd_pairs_table(2),
}
tables = pytest.mark.parametrize("name", TABLES)


def problem(n: int = 12, k: int = 64, group: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, scales of both signs, and the Hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    mixed = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    x = torch.randn(4 * k, k, generator=generator) @ mixed * torch.linspace(0.2, 2, k)
    scales = weight.view(n, -1, group).abs().amax(2).half().float()
    scales[::2] *= -1
    return weight, scales, x.T @ x / len(x)


def rounded(weight: Tensor, scales: Tensor, table: Tensor) -> Fitted:
    """Every weight to its nearest entry: what there is without feedback."""
    groups = (weight.view(*scales.shape, -1) / scales[..., None]).flatten(0, 1)
    return Fitted(nearest_for(table).codes(groups).long().view(len(weight), -1), scales, table)


def dense_feedback(weight: Tensor, scales: Tensor, table: Tensor, hessian: Tensor, order: Tensor) -> Tensor:
    """The definition: before each step, the free columns solve their least squares anew, in float64."""
    size = 1 if table.ndim == 1 else 2
    entries = table.view(-1, size).double()
    w, h = weight.double(), hessian.double()
    spread = scales.double().repeat_interleave(w.shape[1] // scales.shape[1], 1)
    error = torch.zeros_like(w)
    codes = torch.zeros(len(w), w.shape[1] // size, dtype=torch.int64)
    for step in range(0, len(order), size):
        done, free, now = order[:step], order[step:], order[step : step + size]
        best = error.clone()
        best[:, free] = -error[:, done] @ h[done][:, free] @ torch.linalg.inv(h[free][:, free])
        target = w[:, now] - best[:, now]
        # What an error of these columns costs once all behind them make up for it: a Schur complement.
        metric = torch.linalg.inv(torch.linalg.inv(h[free][:, free])[:size, :size])
        away = target[:, None] - spread[:, None, now] * entries
        codes[:, now[0] // size] = torch.einsum("nei,ij,nej->ne", away, metric, away).argmin(1)
        error[:, now] = w[:, now] - spread[:, now] * entries[codes[:, now[0] // size]]
    return codes


# --- error feedback ------------------------------------------------------------------------------


@tables
@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("block", [8, 24, 128])
def test_a_step_is_the_least_squares_solution_of_all_free_columns(
    name: str, by_activation: bool, block: int
) -> None:
    table = TABLES[name]
    weight, scales, hessian = problem()
    coder = table_for(table)
    factor = factorized(hessian, damping=0.01, by_activation=by_activation, vector_size=coder.vector_size)
    assert factor is not None
    found = feed_back(weight, scales, coder, factor, block=block)
    assert torch.equal(found, dense_feedback(weight, scales, table, damped(hessian, 0.01), factor.order))


@tables
def test_feedback_costs_less_than_rounding(name: str) -> None:
    table = TABLES[name]
    weight, scales, hessian = problem(64)
    factor = factorized(hessian, damping=0.01, by_activation=True, vector_size=table_for(table).vector_size)
    assert factor is not None
    fed = Fitted(feed_back(weight, scales, table_for(table), factor), scales, table)
    assert cost(weight, fed, hessian) < 0.8 * cost(weight, rounded(weight, scales, table), hessian)


@tables
def test_with_inputs_that_do_not_depend_on_each_other_it_is_rounding(name: str) -> None:
    table = TABLES[name]
    weight, scales, _ = problem()
    size = table_for(table).vector_size
    factor = factorized(torch.eye(64), damping=0.01, by_activation=True, vector_size=size)
    assert factor is not None
    plain = rounded(weight, scales, table)
    fed = Fitted(feed_back(weight, scales, table_for(table), factor), scales, table)
    torch.testing.assert_close(fed.weight(), plain.weight())


def test_columns_of_large_inputs_come_first_and_pairs_stay_together() -> None:
    diagonal = torch.tensor([1.0, 5.0, 3.0, 3.0, 9.0, 0.0])
    for size, order in ((1, [4, 1, 2, 3, 0, 5]), (2, [4, 5, 0, 1, 2, 3])):
        factor = factorized(diagonal.diag(), damping=0.01, by_activation=True, vector_size=size)
        assert factor is not None
        assert factor.order.tolist() == order
    plain = factorized(diagonal.diag(), damping=0.01, by_activation=False, vector_size=1)
    assert plain is not None
    assert plain.order.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_factor_is_that_of_the_inverse() -> None:
    _, _, hessian = problem()
    factor = factorized(hessian, damping=0.01, by_activation=True, vector_size=1)
    assert factor is not None
    assert torch.equal(factor.upper, factor.upper.triu())
    inverse = torch.linalg.inv(damped(hessian, 0.01)[factor.order][:, factor.order].double())
    torch.testing.assert_close((factor.upper.T @ factor.upper).double(), inverse, rtol=1e-4, atol=1e-4)


def test_damping_escalates_until_a_factor_exists_and_then_gives_up() -> None:
    singular = torch.ones(32, 32)
    zero = factorized(singular, damping=0.0, by_activation=False, vector_size=1)
    assert zero is None
    # Symmetric but with negative eigenvalues, as rounding can leave it: -1 and 5 times the mean diagonal.
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    factor = factorized(indefinite, damping=0.01, by_activation=False, vector_size=1)
    assert factor is not None
    assert factor.damping == pytest.approx(0.1)
    indefinite[0, 1] = indefinite[1, 0] = 100.0
    assert factorized(indefinite, damping=0.01, by_activation=False, vector_size=1) is None


def test_a_channel_without_inputs_is_rounded_to_its_nearest_entry() -> None:
    weight, scales, hessian = problem()
    hessian[5] = hessian[:, 5] = 0
    factor = factorized(hessian, damping=0.01, by_activation=True, vector_size=1)
    assert factor is not None
    found = feed_back(weight, scales, table_for(TABLES["signed-3"]), factor)
    assert torch.equal(found[:, 5], rounded(weight, scales, TABLES["signed-3"]).codes[:, 5])


def test_a_group_of_scale_zero_is_all_zero_and_its_error_is_made_up_for() -> None:
    weight, scales, hessian = problem()
    scales[:, 0] = 0
    factor = factorized(hessian, damping=0.01, by_activation=False, vector_size=1)
    assert factor is not None
    table = TABLES["signed-3"]
    found = Fitted(feed_back(weight, scales, table_for(table), factor), scales, table)
    assert not bool(found.weight()[:, :16].any())
    assert cost(weight, found, hessian) < cost(weight, rounded(weight, scales, table), hessian)


# --- alternating least squares -------------------------------------------------------------------


def start(name: str, seed: int = 0) -> tuple[Tensor, Fitted, Tensor, Tensor]:
    weight, scales, hessian = problem(24, seed=seed)
    table = TABLES[name].half().float()
    factor = factorized(hessian, damping=0.01, by_activation=True, vector_size=table_for(table).vector_size)
    assert factor is not None
    return weight, rounded(weight, scales, table), damped(hessian, 0.01), factor.order


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 20), name=st.sampled_from(sorted(TABLES)))
def test_no_step_raises_the_cost(seed: int, name: str) -> None:
    weight, fitted, hessian, order = start(name, seed)
    before = first = cost(weight, fitted, hessian)
    for _ in range(2):
        for step in (
            lambda f: refit_scales(weight, f, hessian, torch.float16),
            lambda f: refit_table(weight, f, hessian, torch.float16),
            lambda f: sweep_codes(weight, f, hessian, order),
        ):
            fitted = step(fitted)
            after = cost(weight, fitted, hessian)
            assert after <= before * (1 + 1e-5)
            before = after
    assert before < 0.8 * first


@tables
def test_scales_are_the_solution_of_their_least_squares_problem(name: str) -> None:
    weight, fitted, hessian, _ = start(name)
    for _ in range(200):
        fitted = refit_scales(weight, fitted, hessian, torch.float32)
    root = torch.linalg.cholesky(hessian.double())
    values = fitted.looked_up().double().view(*fitted.scales.shape, -1)
    for n in range(len(weight)):
        # One column a group.
        columns = torch.block_diag(*values[n][:, None]).T
        best = torch.linalg.lstsq(root.T @ columns, root.T @ weight[n].double()).solution
        torch.testing.assert_close(fitted.scales[n].double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["signed-3", "nf-2", "descending"])
def test_the_table_is_the_solution_of_its_least_squares_problem(name: str) -> None:
    weight, fitted, hessian, _ = start(name)
    found = refit_table(weight, fitted, hessian, torch.float32)
    root = torch.linalg.cholesky(hessian.double())
    scale = fitted.scales.double().repeat_interleave(16, 1)
    chosen = torch.nn.functional.one_hot(fitted.codes, len(fitted.table)).double() * scale[..., None]
    rows = torch.einsum("kj,nke->nje", root, chosen).flatten(0, 1)
    best = torch.linalg.lstsq(rows, (weight.double() @ root).flatten()).solution
    torch.testing.assert_close(found.table.double(), best, rtol=1e-3, atol=1e-3)


def test_an_entry_that_no_code_names_stays() -> None:
    weight, fitted, hessian, _ = start("signed-3")
    fitted.codes[fitted.codes == 2] = 3
    assert refit_table(weight, fitted, hessian, torch.float16).table[2] == fitted.table[2]


@tables
def test_a_sweep_ends_where_no_single_code_can_be_better(name: str) -> None:
    weight, fitted, hessian, order = start(name)
    for _ in range(30):
        fitted = sweep_codes(weight, fitted, hessian, order)
    least = cost(weight, fitted, hessian)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        row, place = (int(torch.randint(n, (1,), generator=generator)) for n in fitted.codes.shape)
        other = fitted.codes.clone()
        other[row, place] = torch.randint(len(fitted.table), (1,), generator=generator)
        assert cost(weight, Fitted(other, fitted.scales, fitted.table), hessian) >= least * (1 - 1e-6)
