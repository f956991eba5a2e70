"""What vLLM asks about a quantized model as a whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from flute_kernels import ACTIVATION_DTYPES, FormatError, QuantSpec, UnsupportedError
from flute_kernels import QuantizationConfig as StoredConfig
from flute_kernels.format import K_MULTIPLE, QUANT_METHOD
from flute_vllm.linear import FluteLinearMethod
from flute_vllm.online import OnlineFluteLinearMethod, OnlineOptions

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

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Module names in the checkpoint's config become vLLM's."""
        if self.stored is None:
            return
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
            return self._linear_method(layer, self._parts(prefix), prefix) or UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            if self._tied or self.stored is None:
                return None  # it is the embedding's matrix; or stays in 16 bits, as heads do by default
            return self._linear_method(layer, [prefix], prefix)
        if type(layer).__name__ in ("RoutedExperts", "FusedMoE"):
            raise UnsupportedError(
                f"{prefix} is a mixture of experts, which flute-vllm cannot run yet. "
                "A 16-bit checkpoint of the model runs without --quantization flute."
            )
        return None

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's modules that a layer of vLLM is made of: itself, or q_proj, k_proj and v_proj."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _linear_method(self, layer: Any, parts: list[str], prefix: str) -> QuantizeMethodBase | None:
        specs: Mapping[str, QuantSpec | None]
        if self.stored is not None:
            specs = {part: self.stored.spec_for(part) for part in parts}
        else:
            assert self.online is not None
            specs = {part: self.online.spec_for(part) for part in parts}
            k = getattr(layer, "input_size_per_partition", layer.input_size)
            if k % K_MULTIPLE:
                _log.warning("%s stays in 16 bits: K = %d is no multiple of %d", prefix, k, K_MULTIPLE)
                return None
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
        return FluteLinearMethod(wanted, prefix)
