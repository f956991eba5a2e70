"""One quantized linear layer as it is stored: codes, scales, tables and bias, in the canonical format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flute_kernels.errors import FormatError
from flute_kernels.format.bitstream import pack_codes, unpack_codes
from flute_kernels.format.signs import hadamard_signs
from flute_kernels.format.spec import QuantSpec

__all__ = ["TENSOR_NAMES", "QuantizedLinear"]

TENSOR_NAMES = ("qweight", "scales", "codebook", "bias")
SCALE_DTYPES = (torch.float16, torch.bfloat16)
_TABLE_DTYPES = (torch.float16, torch.float32)


@dataclass
class QuantizedLinear:
    """The canonical tensors of one linear weight ``W[N, K]``; independent of device and kernel.

    ``W_hat[n, k] = scales[n, k // g] * codebook[t(n), code(n, k)]``, where row n uses table
    ``t(n) = n * T // N``. With a Hadamard rotation this is the rotated matrix, to be multiplied
    with the rotated input.

    Args:
        spec: bits, groups and tables.
        qweight: int32 ``[N, K * bits / 32]``, see :func:`~flute_kernels.format.pack_codes`.
        scales: float16 or bfloat16 ``[N, K / g]``.
        codebook: float16 or float32 ``[T, 2**(bits * vector_size), vector_size]``.
        bias: floating point ``[N]``, or None.
    """

    spec: QuantSpec
    qweight: Tensor
    scales: Tensor
    codebook: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.qweight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.qweight.shape[1]) * 32 // self.spec.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, bias left out."""
        return sum(t.numel() * t.element_size() for t in (self.qweight, self.scales, self.codebook))

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, codebook: Tensor, spec: QuantSpec, bias: Tensor | None = None
    ) -> QuantizedLinear:
        """Pack integer codes ``[N, K / vector_size]``; a table without a leading T is taken as T = 1.

        Raises:
            FormatError: a shape, dtype or value does not fit ``spec``.
        """
        table = codebook.to(torch.float32) if codebook.dtype not in _TABLE_DTYPES else codebook
        shape = (spec.table_entries, spec.vector_size)
        if tuple(table.shape) == shape or (spec.vector_size == 1 and tuple(table.shape) == shape[:1]):
            table = table.reshape(1, *shape)
        linear = cls(spec, pack_codes(codes, spec.bits, spec.vector_size), scales, table, bias)
        linear.validate()
        return linear

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        spec: QuantSpec,
        *,
        prefix: str = "",
        out_features: int | None = None,
        in_features: int | None = None,
    ) -> QuantizedLinear:
        """Take ``prefix + 'qweight'`` and its siblings from a state dict, and validate them.

        Args:
            tensors: names to tensors, as read from a checkpoint.
            spec: the layer's spec from its ``quantization_config``.
            prefix: module name with a trailing dot.
            out_features, in_features: the model's own shape, checked where given.

        Raises:
            FormatError: a tensor is missing or not as the format says.
        """
        missing = [prefix + n for n in TENSOR_NAMES[:3] if prefix + n not in tensors]
        if missing:
            raise FormatError(
                f"{missing[0]} is missing; a quantized linear has {', '.join(TENSOR_NAMES[:3])}."
            )
        qweight, scales, codebook = (tensors[prefix + n] for n in TENSOR_NAMES[:3])
        linear = cls(spec, qweight, scales, codebook, tensors.get(prefix + "bias"))
        linear.validate(prefix, out_features=out_features, in_features=in_features)
        return linear

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Names to contiguous tensors, ready for safetensors."""
        tensors = {n: getattr(self, n) for n in TENSOR_NAMES}
        return {prefix + n: t.contiguous() for n, t in tensors.items() if t is not None}

    def validate(
        self, prefix: str = "", *, out_features: int | None = None, in_features: int | None = None
    ) -> None:
        """Raise FormatError, naming the tensor, what was found and what was expected."""
        spec = self.spec
        if self.qweight.dtype != torch.int32 or self.qweight.ndim != 2:
            raise _unexpected(prefix + "qweight", self.qweight, "int32", f"[N, K * {spec.bits} / 32]")
        words = int(self.qweight.shape[1])
        if words % spec.bits:
            raise FormatError(
                f"{prefix}qweight has {words} words a row; "
                f"at {spec.bits} bits expected a multiple of {spec.bits}."
            )
        n = self.out_features if out_features is None else out_features
        k = self.in_features if in_features is None else in_features
        if self.codebook.ndim != 3 or self.codebook.shape[0] < 1:
            raise _unexpected(
                prefix + "codebook",
                self.codebook,
                "float16 or float32",
                f"[T, {spec.table_entries}, {spec.vector_size}]",
            )
        tables = int(self.codebook.shape[0])
        try:
            shapes = spec.shapes(n, k, tables)
        except FormatError as error:
            raise FormatError(f"{prefix}qweight: {error}") from None
        _check(prefix + "qweight", self.qweight, (torch.int32,), shapes["qweight"])
        _check(prefix + "scales", self.scales, SCALE_DTYPES, shapes["scales"])
        _check(prefix + "codebook", self.codebook, _TABLE_DTYPES, shapes["codebook"])
        if tables > n:
            raise FormatError(
                f"{prefix}codebook has {tables} tables for {n} rows; expected at most one a row."
            )
        if self.bias is not None:
            _check(prefix + "bias", self.bias, (torch.float16, torch.bfloat16, torch.float32), (n,))
        for name in ("scales", "codebook"):
            values = getattr(self, name)
            if values.device.type != "meta" and not bool(torch.isfinite(values).all()):
                bad = int((~torch.isfinite(values)).sum())
                raise FormatError(
                    f"{prefix}{name} has {bad} of {values.numel()} values that are NaN or infinite; "
                    "expected none."
                )

    def codes(self) -> Tensor:
        """uint8 ``[N, K / vector_size]``."""
        return unpack_codes(self.qweight, self.spec.bits, self.spec.vector_size)

    def table_of_rows(self) -> Tensor:
        """int64 ``[N]``: the table that each row uses."""
        n, tables = self.out_features, int(self.codebook.shape[0])
        return torch.arange(n, device=self.qweight.device) * tables // n

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``W_hat`` as ``[N, K]``: products in float32, rounded once to ``dtype``. Still rotated.

        This is the definition of the format in plain torch: what every kernel is tested against.
        """
        codes = self.codes().to(torch.int64)
        values = self.codebook.to(torch.float32)[self.table_of_rows()[:, None], codes]
        grouped = values.reshape(self.out_features, self.scales.shape[1], -1)
        return (grouped * self.scales.to(torch.float32)[..., None]).reshape(self.out_features, -1).to(dtype)

    def signs(self) -> Tensor | None:
        """Signs of the input's Hadamard rotation, float32 ``[K]``, or None without one."""
        if not self.spec.hadamard:
            return None
        return hadamard_signs(self.in_features, self.spec.hadamard_seed).to(self.qweight.device)


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise _unexpected(name, tensor, wanted, str(list(shape)))


def _unexpected(name: str, tensor: Tensor, dtype: str, shape: str) -> FormatError:
    found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return FormatError(f"{name} is {found}; expected {dtype} {shape}.")
