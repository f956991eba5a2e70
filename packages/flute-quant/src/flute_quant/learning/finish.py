"""The last step of a recipe: scales that are learned on the whole model, of all layers together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeGuard

from torch import Tensor, nn

from flute_kernels import QuantizedLinear
from flute_quant.learning.scales import learn_scales
from flute_quant.methods import CalibratedMethod, Method
from flute_quant.stored import stored_error
from flute_quant.tensor import ErrorStats

__all__ = ["NOT_LEARNED", "finish_scales", "learns"]

NOT_LEARNED = "experts are no modules of the model, so that their scales are not learned"
"""Why a matrix keeps the scales that it had, as a clause."""


def learns(method: Method) -> TypeGuard[CalibratedMethod]:
    """Whether a method has this step, for which the whole model is in memory."""
    return isinstance(method, CalibratedMethod) and method.recipe.learn != "none"


def finish_scales(
    model: nn.Module,
    linears: Mapping[str, QuantizedLinear],
    tokens: Tensor,
    method: CalibratedMethod,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[dict[str, QuantizedLinear], dict[str, ErrorStats]]:
    """Learn the scales of a model's quantized modules as a recipe says.

    Args:
        model: a causal language model of Transformers in 16 or 32 bits, on one device; it is not changed.
        linears: stored tensors by name; those that are no linear modules of the model are left out.
        tokens: int64 ``[S, L]``.
        method: whose recipe learns.
        progress: see :func:`~flute_quant.learning.learn_scales`.

    Returns:
        By name of the modules that were learned, the stored tensors and their errors.

    Raises:
        QuantizationError: see :func:`~flute_quant.learning.learn_scales`.
    """
    recipe = method.recipe
    known = dict(model.named_modules())
    mine = {name: linear for name, linear in linears.items() if isinstance(known.get(name), nn.Linear)}
    found = learn_scales(
        model,
        mine,
        tokens,
        loss=recipe.learn,
        nearest_codes=not recipe.keeps_codes,
        learning_rate=recipe.learning_rate,
        epochs=recipe.learn_epochs,
        progress=progress,
    )
    errors = {
        name: stored_error(known[name].get_parameter("weight").detach(), linear)
        for name, linear in found.items()
    }
    return found, errors
