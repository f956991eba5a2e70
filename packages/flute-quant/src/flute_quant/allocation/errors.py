"""What each choice of a spec would do to a weight: its error, on a sample of rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant.methods import Method, WeightRows, data_free_method, resolve_method
from flute_quant.tensor import quantize_tensor

__all__ = ["sampled_errors"]

# Rows are alike, and errors are means over many: an eighth of a million weights tells them to a per cent.
_SAMPLE = 1 << 17


def sampled_errors(
    weight: Tensor,
    specs: Iterable[QuantSpec],
    method: Method,
    importance: Tensor | None,
    *,
    name: str,
    scale_dtype: torch.dtype = torch.float16,
) -> dict[QuantSpec, tuple[float, float]]:
    """Squared errors of a weight ``[N, K]`` under each spec, and what they are relative to.

    Args:
        weight: of one module.
        specs: that its K allows, with one rotation.
        method, importance, scale_dtype: see :func:`~flute_quant.quantize_tensor`.
        name: what errors call it.

    Returns:
        Spec to the sum of ``importance[k] * (w - w_hat)**2`` over the whole weight, extrapolated, and to that
        sum relative to the weight's own ``importance[k] * w**2``.
    """
    n, k = weight.shape
    wanted = min(n, max(16, _SAMPLE // k))
    rows = weight[torch.linspace(0, n - 1, wanted, device=weight.device).round().long()]
    found = {}
    for spec in specs:
        # A calibrated method's inputs are not known here: its start stands for it.
        chosen = data_free_method(resolve_method(method, spec), spec)
        linear, _ = quantize_tensor(
            rows, spec, method=chosen, name=name, scale_dtype=scale_dtype, importance=importance
        )
        exact = WeightRows(rows, spec, name).read(0, wanted)  # in the basis of the codes
        squares = torch.stack([(linear.dequantize() - exact).square(), exact.square()]).sum(1).double()
        if importance is not None:
            squares = squares * importance.to(squares.device, torch.float64)
        error, energy = (float(s) for s in squares.sum(1))
        found[spec] = (error * n / wanted, error / energy if energy else 0.0)
    return found
