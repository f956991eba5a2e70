"""What is in a quantized checkpoint: sizes, bits and errors by layer."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flute_quant.checkpoint.output import REPORT_NAME
from flute_quant.checkpoint.quantized import QuantizedFolder
from flute_quant.checkpoint.source import read_json

__all__ = ["Inspection", "LayerInfo", "inspect_checkpoint"]


@dataclass(frozen=True)
class LayerInfo:
    """One quantized module.

    Args:
        name: as in the checkpoint.
        shape: of the weight, ``(N, K)``.
        bits, group_size, vector_size, hadamard: its spec.
        nbytes: of codes, scales and tables.
        error: squared error relative to the weight's energy, as noted by the run; None where it was not.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    vector_size: int
    hadamard: int
    nbytes: int
    error: float | None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Inspection:
    """A quantized checkpoint.

    Args:
        path: the folder.
        method: how its codes were chosen.
        layers: the quantized modules.
        other_parameters: parameters in tensors that are not quantized.
        file_bytes: size of the weight files.
    """

    path: Path
    method: str
    layers: tuple[LayerInfo, ...]
    other_parameters: int
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and tables of the quantized weights, in bits a weight."""
        return 8 * sum(x.nbytes for x in self.layers) / sum(x.weights for x in self.layers)

    @property
    def bits_per_parameter(self) -> float:
        """The weight files, in bits a parameter of the whole model."""
        return 8 * self.file_bytes / (sum(x.weights for x in self.layers) + self.other_parameters)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "method": self.method,
            "quantized_weights": sum(x.weights for x in self.layers),
            "other_parameters": self.other_parameters,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
            "file_bytes": self.file_bytes,
            "layers": [asdict(layer) for layer in self.layers],
        }


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Read a quantized checkpoint's headers, scales and tables, checking them; codes are not read.

    Raises:
        CheckpointError: no quantized checkpoint, or damaged files.
        FormatError: an unknown ``format_version``, or tensors that do not fit it.
    """
    quantized = QuantizedFolder.open(path)
    folder = quantized.folder
    report = folder.path / REPORT_NAME
    noted = read_json(report).get("layers") if report.is_file() else None
    layers = []
    for name in sorted(quantized.modules, key=_as_people_count):
        linear = quantized.linear(name, codes=False)
        entry = noted.get(quantized.module_name(name)) if isinstance(noted, dict) else None
        error = entry.get("relative_squared_error") if isinstance(entry, dict) else None
        layers.append(
            LayerInfo(
                name,
                (linear.out_features, linear.in_features),
                linear.spec.bits,
                linear.spec.group_size_for(linear.in_features),
                linear.spec.vector_size,
                linear.spec.hadamard,
                linear.nbytes,
                float(error) if isinstance(error, int | float) else None,
            )
        )
    parts = {f"{m}.{part}" for m in quantized.modules for part in ("qweight", "scales", "codebook")}
    other = sum(folder.tensor(t).numel for t in folder.location if t not in parts)
    size = sum(f.size for f in folder.files.values())
    return Inspection(folder.path, quantized.config.method, tuple(layers), other, size)


def _as_people_count(name: str) -> list[tuple[int, str]]:
    """Layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
