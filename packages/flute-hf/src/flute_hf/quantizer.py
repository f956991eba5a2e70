"""Transformers' side: what ``from_pretrained`` and ``save_pretrained`` ask of a quantizer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from flute_hf.config import FluteConfig
from flute_hf.linear import FluteLinear
from flute_hf.modules import Replacer, describe, flute_linears, fused_experts
from flute_hf.quantization import (
    ChannelImportance,
    QuantizationPlan,
    importance_on_disk,
    plan,
    quantize,
    stored_config,
)
from flute_hf.rotation import share_rotations
from flute_hf.size import count_quantized, stop_counting
from flute_hf.stored import StoredModel
from flute_kernels import ACTIVATION_DTYPES, FluteError, FormatError, QuantSpec, UnsupportedError
from flute_kernels.format import QUANT_METHOD, TENSOR_NAMES

__all__ = ["FluteQuantizer", "attach", "first_gpu", "report_importance", "report_plan"]

_log = logging.getLogger("flute_hf")


@register_quantizer(QUANT_METHOD)
class FluteQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads quantized models, and quantizes 16-bit ones weight by weight while they load.

    Args:
        quantization_config: the checkpoint's, or the user's.
    """

    requires_calibration = False

    def __init__(self, quantization_config: FluteConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: FluteConfig = quantization_config
        # Modules that still wait for the 16-bit weight that is to be quantized.
        self._waiting: dict[str, QuantSpec] = {}
        self._importance = ChannelImportance()
        self._replacer: Replacer | None = None
        self._failure: FluteError | None = None

    # --- loading ----------------------------------------------------------------------------------

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in ACTIVATION_DTYPES:
            raise UnsupportedError(f"dtype is {dtype}; FLUTE computes in float32, float16 and bfloat16.")
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        wanted = self.quantization_config.stored
        replacer = Replacer(model)
        if not self.pre_quantized:
            made = plan(model, wanted)
            report_plan(model, made)
            self._importance = importance_on_disk(
                checkpoint_files or [],
                made,
                wanted.method,
                self.quantization_config.importance,
                first_gpu(device_map),
            )
            report_importance(self._importance)
            self._waiting = {planned.name: planned.spec for planned in made.linears}
            self._replacer = replacer
            # Not in the user's object: what fits this model need not fit the next.
            self.quantization_config = self.quantization_config.like(stored_config(made, wanted))
            return
        if not checkpoint_files:
            raise FormatError(
                "from_pretrained was given a quantized model as a state_dict; it is loaded from .safetensors "
                "files. For tensors in memory there is model.load_state_dict."
            )
        placeholders = StoredModel.read(checkpoint_files).placeholders(model, wanted)
        for name, placeholder in placeholders.items():
            _shield(placeholder)
            replacer.replace(model.get_submodule(name), placeholder)
        self.quantization_config = FluteConfig.of(describe(model, wanted))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and module in self._waiting

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight that will be held, for ``device_map="auto"``."""
        if self.param_needs_quantization(model, param_name):
            n, k = param.shape
            return self._waiting[param_name.removesuffix(".weight")].bits_per_weight(n, k) / 8
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnArrival(self)

    def take_weight(self, model: Any, name: str, weight: Tensor) -> None:
        """Quantize the weight that module ``name`` waits for, and put the quantized layer in its place."""
        if self._failure is not None:
            return  # the model will not be used; save the rest of the time
        try:
            quantized = quantize(
                weight, self._waiting[name], self.quantization_config.method, name, self._importance
            )
        except FluteError as error:
            # Transformers would make it a traceback inside a table; raised after loading it is a sentence.
            self._failure = error
            return
        assert self._replacer is not None
        linear = model.get_submodule(name)
        layer = FluteLinear.in_place_of(linear, quantized)
        _shield(layer)
        self._replacer.replace(linear, layer)
        del self._waiting[name]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._replacer = None
        self._importance = ChannelImportance()  # its tensors are of no more use
        if self._failure is not None:
            raise self._failure
        if self._waiting:
            name = next(iter(self._waiting))
            raise FormatError(
                f"{name}.weight is missing from the checkpoint, as are {len(self._waiting) - 1} more of the "
                "weights that were to be quantized."
            )
        # Accelerate's moves between devices lose Transformers' marks; the headers were checked anyway.
        moved = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        marked = TENSOR_NAMES if self.pre_quantized else ("bias",)
        for name, module in flute_linears(model):
            _unshield(module)
            _check_loaded(name, module, marked=() if moved else marked)
            module.prepare()
        share_rotations(model)
        count_quantized(model)
        return model

    # --- the model in use -------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Called by ``save_pretrained`` first: bring the config up to date with the modules."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapters are saved
        adapted = [name for name, _ in flute_linears(model) if name.endswith(".base_layer")]
        if adapted:
            raise FormatError(
                f"{len(adapted)} quantized layers, such as {adapted[0].removesuffix('.base_layer')}, carry "
                "adapters; save those with the PeftModel's save_pretrained, or the model after "
                "merge_and_unload() or unload()."
            )
        self.quantization_config = FluteConfig.of(describe(model, self.quantization_config.stored))
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained leaves a string in the model's config, from which dtype comes.
        chosen: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        replacer = Replacer(model)
        for _, module in list(flute_linears(model)):
            replacer.replace(module, module.dequantize(chosen))
        stop_counting(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, config: FluteConfig) -> None:
    """Make a Transformers model that was quantized in memory one that saves itself as such."""
    quantizer = FluteQuantizer(config, pre_quantized=False)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, QUANT_METHOD
    model.config.quantization_config = config
    count_quantized(model)


class _QuantizeOnArrival(ConversionOps):  # type: ignore[misc]
    """Called by Transformers with each weight that is to be quantized, as it is read."""

    def __init__(self, quantizer: FluteQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns what is left for Transformers to put into the model."""
        rest = {}
        for name, value in input_dict.items():
            if not self._quantizer.param_needs_quantization(model, name):
                rest[name] = value
                continue
            weight = value[0] if isinstance(value, list) else value
            self._quantizer.take_weight(model, name.removesuffix(".weight"), weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        return rest

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("Quantization is not undone on saving.")


def _shield(layer: FluteLinear) -> None:
    """Let Transformers' initialisers pass by: some reach from a parent into its layers' ``weight``.

    They run over every model that was loaded, and leave alone what bears this mark.
    """
    nothing = torch.empty(0, device="meta")
    nothing._is_hf_initialized = True  # type: ignore[attr-defined]
    layer.__dict__["weight"] = nothing


def _unshield(layer: FluteLinear) -> None:
    layer.__dict__.pop("weight", None)


def report_plan(model: nn.Module, made: QuantizationPlan) -> None:
    """Log what a reader of the numbers would stumble over: smaller groups, and experts left in 16 bits."""
    notes: dict[str, list[str]] = {}
    for planned in made.linears:
        if planned.note:
            notes.setdefault(planned.note, []).append(planned.name)
    for note, names in notes.items():
        _log.warning("%d of %d layers, such as %s, take %s.", len(names), len(made.linears), names[0], note)
    experts = fused_experts(model)
    if experts:
        weights, total = sum(experts.values()), sum(p.numel() for p in model.parameters())
        _log.warning(
            "%d fused expert parameters, such as %s, stay in 16 bits: %d of the model's %d weights "
            "(%.0f %%). %d weights are quantized.",
            len(experts),
            next(iter(experts)),
            weights,
            total,
            100 * weights / total,
            sum(planned.weights for planned in made.linears),
        )


def first_gpu(device_map: Any) -> torch.device:
    """The first GPU that a device map names; the CPU where it names none."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    for place in places:
        if isinstance(place, int) and not isinstance(place, bool):
            return torch.device("cuda", place)
        if isinstance(place, str | torch.device) and str(place).startswith("cuda"):
            return torch.device(place)
    return torch.device("cpu")


def report_importance(importance: ChannelImportance) -> None:
    """Log where less was measured than asked for."""
    if importance.note is not None:
        _log.warning("%s", importance.note)


def _check_loaded(name: str, module: FluteLinear, *, marked: tuple[str, ...]) -> None:
    stored = module.quantized()
    for tensor_name, tensor in stored.to_tensors(f"{name}.").items():
        if tensor.is_meta:
            raise UnsupportedError(
                f"{tensor_name} was left on disk; quantized weights stay in memory. "
                "Load with offload_buffers=False."
            )
    # Transformers marks what it loads. What it did not find is uninitialised memory.
    for tensor_name in marked:
        tensor = getattr(module, tensor_name)
        if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
            raise FormatError(f"{name}.{tensor_name} is missing from the checkpoint.")
    stored.validate(f"{name}.", out_features=module.out_features, in_features=module.in_features)
