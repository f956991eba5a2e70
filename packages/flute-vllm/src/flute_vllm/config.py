"""What vLLM asks about a quantized model as a whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.transformers_utils.config import get_safetensors_params_metadata

from flute_kernels import ACTIVATION_DTYPES, FormatError, QuantSpec
from flute_kernels import QuantizationConfig as StoredConfig
from flute_kernels.format import K_MULTIPLE, QUANT_METHOD
from flute_vllm.linear import FluteLinearMethod
from flute_vllm.moe import FluteMoEMethod, OnlineFluteMoEMethod
from flute_vllm.online import OnlineFluteLinearMethod, OnlineOptions
from flute_vllm.parameters import STORED_DTYPES
from flute_vllm.plain import PlainEmbeddingMethod, PlainLinearMethod

__all__ = ["FluteConfig"]

_log = logging.getLogger("flute_vllm")


@register_quantization_config(QUANT_METHOD)
class FluteConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a checkpoint, or how a 16-bit one is to be quantized.

    Args:
        stored: the checkpoint's, or None where the checkpoint has 16 bits.
    """

    def __init__(self, stored: StoredConfig | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.online = OnlineOptions.from_environment() if stored is None else None
        self._tied = False
        self._plain: set[str] = set()
        self._without_bias: set[str] = set()

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(ACTIVATION_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # so that vLLM makes a FluteConfig() for a 16-bit checkpoint

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FluteConfig:
        return cls(StoredConfig.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self._tied = bool(getattr(text, "tie_word_embeddings", False))
        if self.online is not None:
            self.online = self.online.updated(getattr(hf_config, QUANT_METHOD, None))
        else:
            tensors = get_safetensors_params_metadata(model_name, revision=revision)
            self._plain = _plain_modules(tensors)
            quantized = {module for module, _, kind in map(_split, tensors) if kind == "qweight"}
            self._without_bias = {module for module in quantized if f"{module}.bias" not in tensors}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Module names in the checkpoint's config become vLLM's."""
        if self.stored is None:
            return
        self._plain = set(hf_to_vllm_mapper.apply_list(list(self._plain)))
        self._without_bias = set(hf_to_vllm_mapper.apply_list(list(self._without_bias)))
        names = list(self.stored.overrides)
        renamed = {name: (hf_to_vllm_mapper.apply_list([name]) or [name])[0] for name in names}
        self.stored = StoredConfig(
            self.stored.spec,
            tuple(hf_to_vllm_mapper.apply_list(list(self.stored.modules_to_not_convert))),
            {renamed[name]: spec for name, spec in self.stored.overrides.items()},
            self.stored.method,
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, self._parts(prefix), prefix) or PlainLinearMethod(prefix)
        if isinstance(layer, ParallelLMHead):
            if self._tied:
                return None  # it is the embedding's matrix
            if self.stored is None:
                return PlainEmbeddingMethod(prefix)  # as heads by default
            return self._linear_method(layer, [prefix], prefix) or PlainEmbeddingMethod(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return PlainEmbeddingMethod(prefix or "the embedding")  # some of vLLM's models do not name it
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        return None

    def _spec_for(self, name: str) -> QuantSpec | None:
        """The spec of a matrix, or None where it has 16 bits."""
        if self.online is not None:
            return self.online.spec_for(name)
        assert self.stored is not None
        return None if name in self._plain else self.stored.spec_for(name)

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's modules that a layer of vLLM is made of: itself, or q_proj, k_proj and v_proj."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _linear_method(self, layer: Any, parts: list[str], prefix: str) -> QuantizeMethodBase | None:
        if self.online is not None:
            k = getattr(layer, "input_size_per_partition", layer.input_size)
            if _stays(prefix, k):
                return None
        specs = {part: self._spec_for(part) for part in parts}
        wanted = [spec for spec in specs.values() if spec is not None]
        if not wanted:
            return None
        left = [part for part, spec in specs.items() if spec is None]
        if left:
            raise FormatError(
                f"vLLM runs {', '.join(specs)} as one layer, of which {', '.join(left)} is to stay in "
                "16 bits; quantize all of them or none."
            )
        if self.online is not None:
            return OnlineFluteLinearMethod(wanted[0], self.online.method, prefix)
        without = [part for part in parts if part in self._without_bias]
        if getattr(layer, "has_bias", False) and without:
            raise FormatError(f"{without[0]}: bias is missing from the checkpoint.")
        return FluteLinearMethod(wanted, prefix)

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        config = layer.moe_config
        if self._spec_for(prefix) is None:
            return None
        if self.online is not None and _stays(
            prefix, config.hidden_dim, config.intermediate_size_per_partition
        ):
            return None
        names = {
            "w13": (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name),
            "w2": (layer.ckpt_down_proj_name,),
        }
        specs = {
            stack: {
                name: self._spec_for(name)
                for expert in range(config.num_logical_experts)
                for name in (f"{prefix}.{expert}.{matrix}" for matrix in matrices)
            }
            for stack, matrices in names.items()
        }
        found = {name: spec for of_stack in specs.values() for name, spec in of_stack.items()}
        left = [name for name, spec in found.items() if spec is None]
        if len(left) == len(found):
            return None
        if left:
            raise FormatError(
                f"vLLM runs the experts of {prefix} as one layer, of which {left[0]} is to stay in 16 bits; "
                "quantize all of them or none."
            )
        one = {stack: _common(of_stack) for stack, of_stack in specs.items()}
        if self.online is not None:
            return OnlineFluteMoEMethod(layer, one, prefix, self.online.method)
        return FluteMoEMethod(layer, one, prefix)


def _stays(name: str, *columns: int) -> bool:
    """Whether a layer of a 16-bit checkpoint stays so, because the format has no place for its K."""
    odd = [k for k in columns if k % K_MULTIPLE]
    if odd:
        _log.warning("%s stays in 16 bits: K = %d is no multiple of %d", name, odd[0], K_MULTIPLE)
    return bool(odd)


def _common(specs: Mapping[str, QuantSpec | None]) -> QuantSpec:
    """The one spec of matrices that become one weight."""
    first, *others = specs.items()
    for name, spec in others:
        if spec != first[1]:
            raise FormatError(
                f"{first[0]} is {first[1]}, {name} is {spec}; vLLM runs the gate and up projections of all "
                "experts as one weight, and the down projections as another, so these must be alike."
            )
    assert first[1] is not None
    return first[1]


def _split(tensor: str) -> tuple[str, str, str]:
    """A tensor's module, a dot, and its name there."""
    return tensor.rpartition(".")


def _plain_modules(tensors: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Modules whose weights a quantized checkpoint has in 16 bits, whether its config lists them or not.

    The config names modules as Transformers does, for which routers and experts are no linear layers.
    """
    plain = set()
    for name, tensor in tensors.items():
        module, _, kind = _split(name)
        if kind == "weight" or (kind not in STORED_DTYPES and len(tensor.get("shape", ())) > 2):
            plain.add(module)
    return plain
