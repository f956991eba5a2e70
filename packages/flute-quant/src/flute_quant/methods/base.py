"""What a quantization method is: rows of weights in, codes, scales and tables out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant.errors import QuantizationError
from flute_quant.rotation import rotate

__all__ = ["CHANNEL_FLOOR", "Encoded", "InputMoments", "Method", "WeightRows"]

# Weights handled at once: on a CPU the few temporaries then stay in the second-level cache, on a
# GPU the launches are large enough to hide their overhead.
_CHUNK_CPU = 1 << 16
_CHUNK_GPU = 1 << 24
CHANNEL_FLOOR = 1e-3
"""Added to importances whose mean is 1, so that no channel is free."""


class WeightRows:
    """A weight ``[N, K]`` read in chunks of rows, as float32, checked and (if asked for) rotated.

    Args:
        weight: float16, bfloat16, float32 or float64 ``[N, K]``.
        spec: decides on the rotation and the groups.
        name: what errors call this weight.

    Raises:
        QuantizationError: another dtype or rank.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, name: str = "weight") -> None:
        if weight.ndim != 2 or weight.dtype not in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
        ):
            raise QuantizationError(
                f"{name} is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}; "
                "expected float16, bfloat16, float32 or float64 [N, K]."
            )
        self.name = name
        self.rows, self.columns = weight.shape
        self.device = weight.device
        self._weight = weight
        self._spec = spec

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges that together cover the weight."""
        size = _CHUNK_GPU if self.device.type == "cuda" else _CHUNK_CPU
        step = max(1, size // self.columns)
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` as float32 ``[R, K]``.

        Raises:
            QuantizationError: the weight has NaN or infinite values; the whole weight's are counted.
        """
        rows = self._weight[start:stop].to(torch.float32)
        if not bool(torch.isfinite(rows).all()):
            bad = sum(
                int((~torch.isfinite(self._weight[a:b].to(torch.float32))).sum()) for a, b in self.chunks()
            )
            raise QuantizationError(
                f"{self.name} has {bad} of {self._weight.numel()} weights that are NaN or infinite; "
                "expected none."
            )
        if self._spec.hadamard:
            rows = rotate(rows, self._spec.hadamard, self._spec.hadamard_seed)
        return rows


@dataclass
class Encoded:
    """A quantized weight before it is packed.

    Args:
        codes: uint8 ``[N, K / vector_size]``.
        scales: float16 or bfloat16 ``[N, K / g]``.
        codebook: float16 or float32 ``[T, 2**(bits * vector_size), vector_size]``.
        squared_error: sum of squared differences.
        energy: sum of squared weights.
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    squared_error: float
    energy: float


@dataclass(frozen=True)
class InputMoments:
    """What calibration keeps of the inputs ``x`` of a linear module, in the basis of its codes.

    Args:
        hessian: float32 ``[K, K]``, the mean of ``x x^T``.
        drift: float32 ``[K, K]`` or None, the mean of ``x (x16 - x)^T``, where ``x16`` is what the input
            would be if no layer before were quantized.
        tokens: how many inputs there were.
    """

    hessian: Tensor
    drift: Tensor | None
    tokens: int

    def importance(self) -> Tensor:
        """Mean squares of the inputs ``[K]``, in units of their mean; no channel is free."""
        diagonal = self.hessian.diagonal().to(torch.float32)
        return diagonal / diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny) + CHANNEL_FLOOR


class Method(Protocol):
    """A way to choose a weight's codes, scales and tables. Registered in ``flute_quant.methods.registry``."""

    @property
    def name(self) -> str:
        """What ``--method`` and the checkpoint's config call it."""

    @property
    def summary(self) -> str:
        """One line for ``--help``."""

    @property
    def identity(self) -> str:
        """All that decides about its results, as text that is the same in every process."""

    @property
    def wants_importance(self) -> bool:
        """Whether it is made for the importance of input channels, so that ``"auto"`` measures it."""

    def table_dtype(self, spec: QuantSpec) -> torch.dtype:
        """The dtype of the one table that :meth:`encode` will return: known before any weight is read."""

    def encode(
        self, rows: WeightRows, spec: QuantSpec, *, scale_dtype: torch.dtype, importance: Tensor | None
    ) -> Encoded:
        """Quantize one weight.

        Args:
            rows: the weight.
            spec: bits, groups and tables.
            scale_dtype: float16 or bfloat16.
            importance: float32 ``[K]``, what an error in each input channel costs, or None.

        Raises:
            QuantizationError: the weight or the spec cannot be served.
        """
