"""Quantize a model that is in memory: any torch module, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from flute_hf.config import FluteConfig
from flute_hf.linear import FluteLinear
from flute_hf.modules import Replacer, flute_linears
from flute_hf.quantization import QuantizationError, importance_in_memory, plan, quantize, stored_config
from flute_hf.quantizer import attach, report_importance, report_plan
from flute_hf.rotation import share_rotations
from flute_kernels import QuantizationConfig, QuantSpec

__all__ = ["prepare_model"]


def prepare_model(
    module: nn.Module,
    bits: int = 4,
    group_size: int = 64,
    *,
    vector_size: int = 1,
    hadamard: int = 0,
    hadamard_seed: int = 0,
    method: str = "default",
    ignore: Iterable[str] = (),
    overrides: Mapping[str, QuantSpec | Mapping[str, int]] | None = None,
    importance: str | Mapping[str, Tensor] = "auto",
    fake: bool = False,
) -> QuantizationConfig:
    """Replace the linear layers inside ``module`` by quantized ones, one after another, in place.

    Embeddings, output heads and routers stay as they are, as do layers whose width is no multiple
    of 32. A Transformers model can be saved afterwards with ``save_pretrained``.

    Args:
        module: any torch module, its weights loaded.
        bits, group_size, vector_size, hadamard, hadamard_seed, method, overrides: see
            :class:`~flute_hf.FluteConfig`.
        importance: see there, too. It is measured on the module where it is, if that is a Transformers
            model that takes tokens; else it is guessed from the weights' columns, which is logged.
        ignore: names, or patterns, of layers to leave in 16 bits.
        fake: keep ``nn.Linear`` layers of the weight's dtype that hold the quantized values: the same
            model up to rounding, at its old size and speed, which other tools can take from there.

    Returns:
        What was done: the spec, the layers with another one, and the names of those left in 16 bits.

    Raises:
        QuantizationError: nothing to quantize, a name that matches nothing, NaN or infinite weights.
            Layers before the one that is named have been replaced.
        FormatError: bits, group size or another number that the format does not have.
    """
    asked = FluteConfig(
        bits, group_size, vector_size, hadamard, hadamard_seed, method, list(ignore), overrides, importance
    )
    wanted = asked.stored
    if isinstance(module, nn.Linear):
        raise QuantizationError(
            "prepare_model replaces linear layers inside of a module; this module is itself an nn.Linear. "
            "Put it into an nn.Sequential."
        )
    done = next(flute_linears(module), None)
    if done is not None:
        raise QuantizationError(
            f"{type(module).__name__} is quantized already: {done[0]} has {done[1].spec.bits} bits."
        )
    made = plan(module, wanted)
    report_plan(module, made)
    weighting = importance_in_memory(module, made, wanted.method, asked.importance)
    report_importance(weighting)
    replacer = Replacer(module)
    for planned in made.linears:
        linear = module.get_submodule(planned.name)
        assert isinstance(linear, nn.Linear)
        quantized = quantize(linear.weight, planned.spec, wanted.method, planned.name, weighting)
        layer = FluteLinear.in_place_of(linear, quantized)
        layer.prepare()
        replacer.replace(linear, layer.dequantize() if fake else layer)
    share_rotations(module)
    config = stored_config(made, wanted)
    if isinstance(module, PreTrainedModel) and not fake:
        attach(module, asked.like(config))
    return config
