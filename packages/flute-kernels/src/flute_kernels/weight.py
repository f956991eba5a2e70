"""A quantized weight made ready for the kernels of one device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flute_kernels import ops
from flute_kernels.checks import DTYPES, check_qgemm, check_qgemm_grouped
from flute_kernels.cpu import kernels as cpu
from flute_kernels.cpu import layout as cpu_layout
from flute_kernels.cuda import kernels as cuda
from flute_kernels.cuda import layout as cuda_layout
from flute_kernels.errors import FormatError, UnsupportedError
from flute_kernels.format import QuantizedLinear, QuantSpec
from flute_kernels.packed import PackedWeight
from flute_kernels.plain import is_plain, refuse_forward_mode

__all__ = ["LutWeight"]

_SEGMENT = 16
"""Rows that use one table come in multiples of this: a kernel's block of rows uses one table."""


class LutWeight:
    """A linear weight ``[N, K]`` in the layout that the kernels of its device read.

    Only that layout is kept, not the canonical tensors beside it; :meth:`to_linear` turns it back into
    them, bit for bit. Make one with :meth:`from_linear`.

    Attributes:
        spec: bits, groups, tables and rotation.
        out_features, in_features: N and K.
        device: where the weight lies.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        tables: Tensor,
        codebook: Tensor,
        signs: Tensor | None,
    ) -> None:
        self.spec = spec
        self.out_features, self.in_features = shape
        self.device = codes.device
        self._codebook, self._signs = codebook, signs
        self._packed = PackedWeight(
            codes,
            scales,
            tables,
            _table_of_block(self.out_features, codebook.shape[0], codes.device),
            *shape,
            spec.bits,
            spec.vector_size,
            spec.group_size_for(self.in_features),
        )
        self._is_cuda = codes.is_cuda
        self._handle = (cuda if self._is_cuda else cpu).weight_handle(self._packed)

    @classmethod
    @torch.inference_mode(False)  # a weight that is laid out under it can be trained on later
    def from_linear(cls, linear: QuantizedLinear, device: torch.device | str | None = None) -> LutWeight:
        """Lay out a stored linear for ``device`` (default: where its tensors are). Its bias is not taken.

        Raises:
            FormatError: the tensors do not follow the format, or tables change inside 16 rows.
            UnsupportedError: this build has no kernels for the device.
        """
        linear.validate()
        target = torch.device(device) if device is not None else linear.qweight.device
        if target.type == "cuda":
            cuda_layout.check_device(target)
        elif target.type != "cpu":
            raise UnsupportedError(f"device is {target}; there are kernels for cpu and cuda.")
        linear = QuantizedLinear(
            linear.spec, linear.qweight.to(target), linear.scales.to(target), linear.codebook.to(target)
        )
        codes, scales, tables = (cuda_layout if target.type == "cuda" else cpu_layout).pack(linear)
        shape = (linear.out_features, linear.in_features)
        return cls(linear.spec, shape, codes, scales, tables, linear.codebook.clone(), linear.signs())

    def to_linear(self, bias: Tensor | None = None) -> QuantizedLinear:
        """The canonical tensors again, exactly those that :meth:`from_linear` was given."""
        qweight, scales = (cuda_layout if self._is_cuda else cpu_layout).unpack(self._packed)
        return QuantizedLinear(self.spec, qweight, scales, self._codebook.clone(), bias)

    def __reduce__(self) -> tuple[Callable[[QuantizedLinear], LutWeight], tuple[QuantizedLinear]]:
        # Copies and pickles travel as the canonical tensors: the layout is the machine's own matter.
        return LutWeight.from_linear, (self.to_linear(),)

    @property
    def packed(self) -> PackedWeight:
        """What :func:`flute_kernels.ops.qgemm` takes of the weight, its rotation left out."""
        return self._packed

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes on its device."""
        parts = (*self._packed[:3], self._codebook, self._signs)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias``, like :func:`torch.nn.functional.linear`.

        Args:
            x: float32, float16 or bfloat16 ``[..., K]``, any strides.
            bias: floating-point ``[N]`` or None.

        Returns:
            ``[..., N]`` in the dtype of ``x``; gradients flow to ``x`` and ``bias``.

        Raises:
            FormatError, UnsupportedError: see :func:`flute_kernels.ops.qgemm`.
        """
        if self._signs is not None:
            x = self.rotate(x)
        return self.linear_rotated(x, bias)

    def rotate(self, x: Tensor) -> Tensor:
        """``x`` in the basis of the codes, for :meth:`linear_rotated`; ``x`` itself without a rotation.

        Weights that see the same input (q, k, v; gate, up) and have the same rotation need it once.

        Raises:
            FormatError, UnsupportedError: see :func:`flute_kernels.ops.qgemm`.
        """
        if self._signs is None:
            return x
        refuse_forward_mode(x, None)
        check_qgemm(x, self._packed, None)
        return ops.hadamard(x, self._signs, self.spec.hadamard)

    def linear_rotated(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As :meth:`linear`, for an ``x`` that :meth:`rotate` of a weight with the same rotation gave."""
        refuse_forward_mode(x, bias)
        if is_plain(x, bias):
            if self._is_cuda:
                return cuda.plain_qgemm(self._handle, x, self._packed, bias)
            if x.is_cpu:
                return cpu.plain_qgemm(self._handle, x, self._packed, bias)
        return ops.qgemm(x, *self._packed, bias)

    def linear_grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """The product of a mixture of experts whose weights are stacked in this one, expert by expert.

        Args:
            x: float32, float16 or bfloat16 ``[M, K]``, rows sorted by expert, any strides.
            counts: int32 ``[experts]`` on the device of ``x``: how many rows each expert has. Rows after
                those of the last expert give zeros.

        Returns:
            ``[M, out_features // experts]`` in the dtype of ``x``; not differentiable. Where the weight
            is rotated, one rotation of ``x`` serves all experts.

        Raises:
            FormatError, UnsupportedError: see :func:`flute_kernels.ops.qgemm_grouped`.
        """
        refuse_forward_mode(x, None)
        if self._signs is not None:
            check_qgemm_grouped(x, counts, self._packed)
            x = ops.hadamard(x, self._signs, self.spec.hadamard)
        return ops.qgemm_grouped(x, counts, *self._packed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that :meth:`linear` multiplies with, ``[N, K]``, any rotation undone."""
        if self._signs is None or dtype not in DTYPES:
            return self._stored(dtype)
        return ops.hadamard(self._stored(torch.float32), self._signs, self.spec.hadamard, True).to(dtype)

    def _stored(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(*self._packed, dtype)

    def __repr__(self) -> str:
        return f"LutWeight(out_features={self.out_features}, in_features={self.in_features}, {self.spec})"


def _table_of_block(rows: int, tables: int, device: torch.device) -> Tensor | None:
    if tables == 1:
        return None
    of_row = torch.arange(rows, device="cpu") * tables // rows
    borders = (torch.nonzero(of_row[1:] != of_row[:-1]).flatten() + 1).tolist()
    uneven = [b for b in borders if b % _SEGMENT]
    if uneven:
        raise FormatError(
            f"{tables} tables for {rows} rows change at row {uneven[0]}; "
            f"kernels need table borders at multiples of {_SEGMENT} rows."
        )
    return of_row[::_SEGMENT].to(device=device, dtype=torch.int32)
