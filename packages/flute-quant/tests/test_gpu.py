"""On a GPU: the same codes as on a CPU, but for what is a matter of rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant import Recipe, quantize_checkpoint, quantize_model, recipe_method
from flute_quant.allocation import allocate_checkpoint
from flute_quant.codebooks import lloyd_pairs_table, signed_table
from flute_quant.methods.feedback import factorized, feed_back, table_for
from flute_quant.methods.refine import Fitted, cost, sweep_codes

Checkpoints = Callable[[str], Path]

pytestmark = pytest.mark.gpu
TOKENS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
# Of modules' relative squared errors: a weight between two entries may go either way, and those after it
# make up for that.
TOLERANCE = 0.05


def problem(n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    mixed = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    x = torch.randn(4 * k, k, generator=generator) @ mixed
    return weight, weight.view(n, -1, 32).abs().amax(2), x.T @ x / len(x)


@pytest.mark.parametrize("table", [signed_table(3), lloyd_pairs_table(2)], ids=["scalars", "pairs"])
@pytest.mark.parametrize("seed", [0, 1])
def test_columns_one_after_another(table: Tensor, seed: int) -> None:
    """The second seed replays what the first has recorded; blocks are of 128 columns, the last of 64."""
    weight, scales, hessian = problem(96, 320, seed)
    found = []
    for device in ("cpu", "cuda"):
        w, s, h, t = (x.to(device) for x in (weight, scales, hessian, table))
        factor = factorized(h, damping=0.01, by_activation=True, vector_size=table_for(t).vector_size)
        assert factor is not None
        fed = Fitted(feed_back(w, s, table_for(t), factor), s, t)
        swept = sweep_codes(w, fed, h, factor.order)
        found.append([(x.codes.cpu(), float(cost(w, x, h))) for x in (fed, swept)])
    for (on_cpu, cost_on_cpu), (on_gpu, cost_on_gpu) in zip(*found, strict=True):
        assert float((on_cpu == on_gpu).float().mean()) > 0.9
        assert cost_on_gpu == pytest.approx(cost_on_cpu, rel=0.02)


def assert_same_errors(source: Path, folder: Path, spec: QuantSpec, **options: Any) -> None:
    on_cpu, on_gpu = (
        quantize_checkpoint(source, folder / device, spec, device=device, **options).errors
        for device in ("cpu", "cuda")
    )
    assert on_gpu == pytest.approx(on_cpu, rel=TOLERANCE)


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(4, 32), QuantSpec(3, 32, hadamard=32, hadamard_seed=3), QuantSpec(2, 32, 2)],
    ids=["4 bits", "3 bits, rotated", "2 bits, pairs"],
)
@pytest.mark.parametrize("method", ["default", "gptq", "calibrated", "blockwise", "nfl"])
def test_checkpoints(checkpoints: Checkpoints, tmp_path: Path, method: str, spec: QuantSpec) -> None:
    if method == "nfl" and spec.vector_size == 2:
        pytest.skip("NormalFloat is a table of scalars.")
    options = {} if method == "default" else {"calibration": TOKENS}
    assert_same_errors(checkpoints("llama-fp32"), tmp_path, spec, method=method, **options)


def test_mixtures_of_experts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    options = {"method": "calibrated", "calibration": TOKENS, "experts": True}
    assert_same_errors(checkpoints("mixtral"), tmp_path, QuantSpec(3, 32), **options)


def test_a_model_in_memory(checkpoints: Checkpoints) -> None:
    import transformers

    found = []
    for device in ("cpu", "cuda"):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("llama-fp32")).to(device)
        method = recipe_method(Recipe(feedback=False, epochs=2))
        linears, report = quantize_model(model, QuantSpec(3, 32), method=method, calibration=TOKENS)
        assert {linear.qweight.device.type for linear in linears.values()} == {device}
        found.append({name: error.relative for name, error in report.errors.items()})
    assert found[1] == pytest.approx(found[0], rel=TOLERANCE)


def test_bits_by_layer(checkpoints: Checkpoints) -> None:
    found = [
        allocate_checkpoint(
            checkpoints("llama-fp32"),
            3.5,
            QuantSpec(3, 32),
            tokens=TOKENS,
            held_out=TOKENS.flip(1),
            device=device,
        )
        for device in ("cpu", "cuda")
    ]
    assert all(allocation.bits_per_weight <= 3.501 for allocation in found)
    assert found[1].checked == pytest.approx(found[0].checked, rel=0.1)


def test_gpus_share_a_layer(checkpoints: Checkpoints, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    options: Any = {"method": "calibrated", "calibration": TOKENS}
    spec, source = QuantSpec(3, 32), checkpoints("llama-fp32")
    alone = quantize_checkpoint(source, tmp_path / "one", spec, device="cuda:0", **options)
    torch.cuda.reset_peak_memory_stats(1)
    shared = quantize_checkpoint(source, tmp_path / "all", spec, device="cuda", **options)
    assert torch.cuda.max_memory_allocated(1) > 0
    assert shared.errors == pytest.approx(alone.errors, rel=TOLERANCE)
