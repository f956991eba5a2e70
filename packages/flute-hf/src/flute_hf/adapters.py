"""LoRA on quantized layers: PEFT's own adapter layer for linear weights, over a quantized base.

PEFT knows linear layers by their type, and lets others add a type only per LoraConfig. :func:`register`
wraps the two functions that look at types, so that any LoraConfig will do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from flute_hf.linear import FluteLinear
from flute_hf.modules import flute_linears
from flute_kernels import UnsupportedError

__all__ = ["FluteLoraLinear", "register"]

_log = logging.getLogger("flute_hf")

# Initialisations that leave the base weight as it is. The others move a part of it into the adapter.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


class FluteLoraLinear(LoraLinear):  # type: ignore[misc]
    """A low-rank adapter beside a quantized layer.

    Merging makes an ``nn.Linear`` of the base: an adapter changes a weight by less than the distance
    between two codes, and rounding to codes again would undo most of it. So ``merge_and_unload()``
    leaves 16- or 32-bit layers where adapters were, and ``save_pretrained`` stores them as that.
    Unmerging puts the quantized base back, bit for bit.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        # The quantized base while a merged one stands in its place; a list hides it from torch's submodules.
        self._quantized: list[FluteLinear] = []
        super().__init__(base_layer, adapter_name, **kwargs)
        # PEFT reads base_layer.qweight a dozen times while it sets up, which a prepared layer makes anew
        # each time. The stored tensors stay until set_adapter, PEFT's last call.
        base = self.get_base_layer()
        if isinstance(base, FluteLinear):
            base.restore()

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA: DoRA and the others compute with the base weight, or were not tried."""
        return {(): None}

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        try:
            return super().resolve_lora_variant(**kwargs)
        except ValueError as error:
            raise UnsupportedError(f"{error}. Quantized layers take plain LoRA.") from None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if config.init_lora_weights not in _INITS:
            raise UnsupportedError(
                f"init_lora_weights is {config.init_lora_weights!r}, which changes the base weight; "
                f"quantized layers take {', '.join(repr(init) for init in _INITS)}."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        base = self.get_base_layer()
        if isinstance(base, FluteLinear) and base.device.type != "meta":
            base.prepare()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to a dequantized copy of the base, which takes its place."""
        names = check_adapters_to_merge(self, adapter_names)
        base = self.get_base_layer()
        if names and isinstance(base, FluteLinear):
            _say_what_merging_does(base.dtype)
            self._quantized = [base]
            self.base_layer: nn.Module = base.dequantize()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=names)
        finally:
            self._put_back_unless_merged()

    def unmerge(self) -> None:
        """Put the quantized base back."""
        super().unmerge()
        self._put_back_unless_merged()

    def _put_back_unless_merged(self) -> None:
        if self._quantized and not self.merged:
            weight = self.get_base_layer().weight
            self.base_layer = self._quantized.pop().to(weight.device, weight.dtype)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT's own way warns that it does not know the type.
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


@cache  # once a process, not once a layer
def _say_what_merging_does(dtype: object) -> None:
    _log.warning(
        "Merging adapters into quantized layers: those layers become %s, because codes are too coarse to "
        "hold an adapter's changes.",
        dtype,
    )


def register() -> None:
    """Make LoRA work for a :class:`~flute_hf.FluteLinear` as for an ``nn.Linear``."""
    if hasattr(LoraModel._create_new_module, "knows_flute"):
        return
    LoraModel._create_new_module = staticmethod(_choosing_flute(LoraModel._create_new_module))
    tuners_utils._maybe_include_all_linear_layers = _including_flute(
        tuners_utils._maybe_include_all_linear_layers
    )


def _choosing_flute(choose: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's function from a layer to its adapter layer, knowing ours."""

    @wraps(choose)
    def choose_with_flute(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, FluteLinear):
            lora_config._register_custom_module({FluteLinear: FluteLoraLinear})
        return choose(lora_config, adapter_name, target, **kwargs)

    choose_with_flute.knows_flute = True  # type: ignore[attr-defined]
    return choose_with_flute


def _including_flute(include: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's reading of ``target_modules="all-linear"``, counting quantized layers among them."""

    @wraps(include)
    def include_with_flute(peft_config: Any, model: nn.Module) -> Any:
        asked = str(getattr(peft_config, "target_modules", "")).lower() == "all-linear"
        peft_config = include(peft_config, model)
        if asked:
            adapted = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
            inside = tuple(f"{name}." for name in adapted)
            found = {name for name, _ in flute_linears(model) if not name.startswith(inside)}
            peft_config.target_modules = set(peft_config.target_modules) | found
        return peft_config

    return include_with_flute
