"""Quantize one weight matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flute_kernels import FormatError, QuantizedLinear, QuantSpec, pack_codes
from flute_kernels.format import GROUP_SIZES, PER_ROW
from flute_quant.errors import QuantizationError
from flute_quant.methods import CalibratedMethod, InputMoments, Method, WeightRows, resolve_method
from flute_quant.methods.parallel import map_chunks, ordinary_tensors

__all__ = ["ErrorStats", "fit_spec", "quantize_tensor"]

_MULTIPLE = 32
_PACK_CHUNK = 1 << 18
_SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ErrorStats:
    """How far a quantized weight is from the original.

    Args:
        weights: number of weights.
        squared_error: sum of squared differences.
        energy: sum of squared weights.
    """

    weights: int
    squared_error: float
    energy: float

    @property
    def relative(self) -> float:
        """Squared error relative to the weights' own energy; 0 for a weight of zeros."""
        return self.squared_error / self.energy if self.energy else 0.0

    @property
    def mean(self) -> float:
        """Mean squared error of a weight, in squared units of the weight."""
        return self.squared_error / self.weights if self.weights else 0.0


def fit_spec(spec: QuantSpec, in_features: int) -> tuple[QuantSpec, str | None]:
    """The spec that a layer of ``in_features`` inputs can have, and what was changed, in words.

    A group size that does not divide K becomes the largest smaller one that does, a Hadamard block
    likewise the largest power of two.

    Raises:
        QuantizationError: K is no multiple of 32, so the format cannot hold it at all.
    """
    k = in_features
    if k <= 0 or k % _MULTIPLE:
        raise QuantizationError(f"K = {k} is no positive multiple of {_MULTIPLE}.")
    notes = []
    if spec.group_size != PER_ROW and k % spec.group_size:
        group = max(g for g in GROUP_SIZES if g < spec.group_size and k % g == 0)
        notes.append(f"group size {group} instead of {spec.group_size}")
        spec = replace(spec, group_size=group)
    if spec.hadamard and k % spec.hadamard:
        block = k & -k
        notes.append(f"Hadamard block {block} instead of {spec.hadamard}")
        spec = replace(spec, hadamard=block)
    return spec, f"{' and '.join(notes)}, because K = {k}" if notes else None


def quantize_tensor(
    weight: Tensor,
    spec: QuantSpec,
    *,
    method: str | Method = "default",
    name: str = "weight",
    bias: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    importance: Tensor | None = None,
    inputs: InputMoments | None = None,
    noted: Callable[[str], None] | None = None,
) -> tuple[QuantizedLinear, ErrorStats]:
    """Quantize a weight ``[N, K]`` on the device that it is on.

    Args:
        weight: float16, bfloat16, float32 or float64 ``[N, K]``; it is read in chunks of rows, so
            beside it only one byte a weight and the result are held.
        spec: bits, groups, tables and rotation. With ``spec.hadamard`` the rotated weight ``W H`` is
            what is quantized.
        method: a name from :func:`~flute_quant.methods.method_names`, or a method.
        name: what errors call this weight.
        bias: stored along, unchanged.
        scale_dtype: float16 or bfloat16. The scales are searched among values of that type.
        importance: float32 ``[K]`` or None, what an error in each input channel costs. It is in the
            rotated basis where the spec rotates.
        inputs: moments of the layer's inputs, for methods that are calibrated. Others take the diagonal of
            their Hessian as ``importance``.
        noted: receives a clause where a calibrated method could not do all that it does.

    Returns:
        The stored tensors, which share no memory with anything but ``bias``, and the error (which a
        rotation does not change).

    Raises:
        QuantizationError: NaN or infinite weights (counted), a scale beyond ``scale_dtype``, an
            unknown method.
        FormatError: the format has no place for such a K or spec.
    """
    if scale_dtype not in _SCALE_DTYPES:
        raise QuantizationError(f"scale_dtype is {scale_dtype}; supported are float16 and bfloat16.")
    rows = WeightRows(weight.detach(), spec, name)
    if weight.numel() == 0:
        raise QuantizationError(f"{name} has shape {list(weight.shape)}; there is nothing to quantize.")
    try:
        spec.check_in_features(rows.columns)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    with ordinary_tensors():
        chosen = resolve_method(method, spec)
        if inputs is not None and isinstance(chosen, CalibratedMethod):
            encoded, note = chosen.encode_inputs(rows, spec, inputs, scale_dtype=scale_dtype)
            if note is not None and noted is not None:
                noted(note)
        else:
            if inputs is not None:
                importance = inputs.importance()
            elif isinstance(chosen, CalibratedMethod):
                raise QuantizationError(
                    f"The method {chosen.name!r} is calibrated; it needs the moments of the inputs of {name}."
                )
            encoded = chosen.encode(rows, spec, scale_dtype=scale_dtype, importance=importance)
        qweight = _pack(encoded.codes, spec)
    linear = QuantizedLinear(spec, qweight, encoded.scales, encoded.codebook, bias)
    linear.validate(name.removesuffix("weight"))
    return linear, ErrorStats(weight.numel(), encoded.squared_error, encoded.energy)


def _pack(codes: Tensor, spec: QuantSpec) -> Tensor:
    """``pack_codes`` by chunks of rows, for the reason that ``map_chunks`` has."""
    n, k = codes.shape[0], codes.shape[1] * spec.vector_size
    qweight = torch.empty(spec.shapes(n, k)["qweight"], dtype=torch.int32, device=codes.device)
    step = max(1, _PACK_CHUNK // k)

    def work(start: int, stop: int) -> None:
        qweight[start:stop] = pack_codes(codes[start:stop], spec.bits, spec.vector_size)

    map_chunks(work, [(i, min(i + step, n)) for i in range(0, n, step)], codes.device)
    return qweight
