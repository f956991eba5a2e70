"""What the safetensors files of a quantized model hold for each of its modules, from their headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flute_hf.linear import FluteLinear
from flute_hf.modules import plain_linears
from flute_hf.quantization import parameter_names
from flute_kernels import FormatError, QuantizationConfig, QuantizedLinear, QuantSpec
from flute_quant.checkpoint.safetensors_reader import DTYPES

__all__ = ["StoredModel"]

_CODES = ".qweight"


@dataclass(frozen=True)
class StoredModel:
    """Tensor names of a checkpoint to tensors of their dtype and shape on the meta device.

    Transformers casts what it loads to the dtype of the placeholder that waits for it, accepts other
    shapes, and leaves missing tensors uninitialised. So the placeholders are made from the headers,
    and what is missing or wrong is refused before anything is loaded.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, files: Sequence[str]) -> StoredModel:
        """Read headers.

        Raises:
            FormatError: a file is not safetensors, truncated, or holds a dtype that no layer has.
        """
        tensors = {}
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise FormatError(
                    f"{file} is no .safetensors file; FLUTE loads quantized weights from nothing else."
                )
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a mapping
                        entry = opened.get_slice(name)
                        dtype = DTYPES.get(entry.get_dtype(), torch.complex64)  # stands for any other
                        tensors[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{file} cannot be read as safetensors: {error}.") from None
        return cls(tensors)

    def placeholders(self, model: nn.Module, config: QuantizationConfig) -> dict[str, FluteLinear]:
        """A layer on the meta device for every module that the checkpoint holds quantized.

        Args:
            model: on the meta device, not yet quantized.
            config: its names may be those of a model with or without the base model's prefix.

        Raises:
            FormatError: a tensor is missing, has another shape or dtype, or contradicts the config.
        """
        prefix = getattr(model, "base_model_prefix", "") or ""
        stems = self._stems(model)
        found = {}
        for name, linear in plain_linears(model):
            spec = _spec_for(name, prefix, config)
            stem = stems.pop(name, None)
            if stem is None:
                if spec is None or _is_new_head(name, model):
                    continue
                raise FormatError(
                    f"{name}{_CODES} is missing from the checkpoint; its quantization_config says "
                    f"{spec.bits} bits for {name}, {linear.out_features} x {linear.in_features}."
                )
            if spec is None:
                raise FormatError(
                    f"{stem}{_CODES} is in the checkpoint, but modules_to_not_convert has {name}; "
                    "expected codes or a 16-bit weight, not both."
                )
            found[name] = self._placeholder(stem, spec, linear)
        if stems:
            name, stem = next(iter(stems.items()))
            if name in dict(model.named_parameters()):
                raise FormatError(
                    f"{stem}{_CODES} is of one expert, which Transformers merges with others into {name}; "
                    "only 16-bit experts can be. vLLM runs such a checkpoint."
                )
            raise FormatError(
                f"{stem}{_CODES} belongs to {name}, a {type(model.get_submodule(name)).__name__}; "
                "expected an nn.Linear."
            )
        return found

    def _stems(self, model: nn.Module) -> dict[str, str]:
        """Module name in the model to the name before ``.qweight`` in the checkpoint."""
        stems = [name.removesuffix(_CODES) for name in self.tensors if name.endswith(_CODES)]
        names = parameter_names(model, [f"{stem}.weight" for stem in stems])
        resolved = ((stem, names[f"{stem}.weight"]) for stem in stems)
        return {name.removesuffix(".weight"): stem for stem, name in resolved if name is not None}

    def _placeholder(self, stem: str, spec: QuantSpec, linear: nn.Linear) -> FluteLinear:
        stored = QuantizedLinear.from_tensors(
            self.tensors,
            spec,
            prefix=f"{stem}.",
            out_features=linear.out_features,
            in_features=linear.in_features,
        )
        if "bias" in dict(linear.named_parameters()) and stored.bias is None:
            raise FormatError(f"{stem}.bias is missing; expected [{linear.out_features}].")
        return FluteLinear.in_place_of(linear, stored)


def _spec_for(name: str, prefix: str, config: QuantizationConfig) -> QuantSpec | None:
    for alias in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if alias in config.modules_to_not_convert or alias in config.overrides:
            return config.spec_for(alias)
    return config.spec


def _is_new_head(name: str, model: nn.Module) -> bool:
    """Whether a module that the checkpoint knows nothing of is the task's own, such as a classifier.

    Transformers initialises and reports those; inside the base model a missing module is an error.
    """
    prefix = getattr(model, "base_model_prefix", "")
    return isinstance(getattr(model, prefix, None), nn.Module) and not name.startswith(f"{prefix}.")
