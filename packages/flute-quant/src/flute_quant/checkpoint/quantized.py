"""A quantized checkpoint folder, as any reader should take it: header first, everything compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flute_kernels import QuantizationConfig, QuantizedLinear
from flute_kernels.format import TENSOR_NAMES
from flute_quant.checkpoint.safetensors_reader import DTYPES
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.errors import CheckpointError

__all__ = ["QuantizedFolder"]


@dataclass(frozen=True)
class QuantizedFolder:
    """A checked folder that :func:`~flute_quant.quantize_checkpoint` wrote.

    Args:
        folder: its files.
        config: its ``quantization_config``.
        modules: names of the quantized modules, as in the checkpoint, in the order of the files.
    """

    folder: CheckpointFolder
    config: QuantizationConfig
    modules: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> QuantizedFolder:
        """Check the folder, its config and every quantized module's tensors (the codes by their header).

        Raises:
            CheckpointError: no checkpoint folder, or not quantized.
            FormatError: an unknown ``format_version``, or tensors that do not fit the config.
        """
        folder = CheckpointFolder.open(path)
        given = folder.config.get("quantization_config")
        if given is None:
            raise CheckpointError(
                f"{folder.path} is not quantized: its config.json has no quantization_config."
            )
        config = QuantizationConfig.from_dict(given)
        modules = tuple(
            name.removesuffix(".qweight")
            for file in folder.files.values()
            for name in file.tensors
            if name.endswith(".qweight")
        )
        if not modules:
            raise CheckpointError(f"{folder.path} is marked as quantized and has no tensor named *.qweight.")
        result = cls(folder, config, modules)
        for module in modules:
            result.linear(module, codes=False)
        return result

    def linear(self, module: str, *, codes: bool = True) -> QuantizedLinear:
        """One module's stored tensors, validated; without ``codes`` its qweight stays on the meta device."""
        tensors: dict[str, Tensor] = {}
        for part in TENSOR_NAMES:
            name = f"{module}.{part}"
            if name not in self.folder.location:
                continue
            if part == "qweight" and not codes:
                stored = self.folder.tensor(name)
                tensors[name] = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")
            else:
                tensors[name] = self.read(name)
        spec = self.config.spec_for(self.module_name(module))
        if spec is None:
            raise CheckpointError(
                f"{self.folder.path} has {module}.qweight, but its config leaves {module} in 16 bits."
            )
        return QuantizedLinear.from_tensors(tensors, spec, prefix=f"{module}.")

    def module_name(self, module: str) -> str:
        """The config's name of a module: a checkpoint may lack or add the base model's prefix."""
        known = self.config.overrides
        for candidate in (module, f"model.{module}", module.removeprefix("model.")):
            if candidate in known:
                return candidate
        return module

    def read(self, name: str) -> Tensor:
        """Any tensor of the folder."""
        return self.folder.files[self.folder.location[name]].read(name)
