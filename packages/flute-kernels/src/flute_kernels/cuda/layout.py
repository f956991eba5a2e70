"""The CUDA rooms' layout of a weight, made on the GPU from the canonical tensors and turned back exactly.

``csrc/qgemm/common/layout.h`` says what each tensor is and why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute_kernels import _C
from flute_kernels.checks import check_tensors
from flute_kernels.errors import FormatError, UnsupportedError
from flute_kernels.format import QuantizedLinear, QuantSpec
from flute_kernels.format.linear import SCALE_DTYPES
from flute_kernels.format.spec import GROUP_SIZES, PER_ROW
from flute_kernels.packed import PackedWeight

__all__ = ["check_device", "check_layout", "current_stream", "pack", "pad_rows", "unpack"]

_TILE = 16
_UNIT = 64


def current_stream(device: torch.device) -> int:
    """The address of torch's current stream on ``device``."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def check_device(device: torch.device) -> None:
    """Raise UnsupportedError unless this build has kernels for the GPU."""
    if not _C.CUDA_ARCHITECTURES:
        raise UnsupportedError(f"device is {device}; this build of flute-kernels has kernels for cpu alone.")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"device is {device}, but torch finds no GPU here; there is cpu.")
    with torch.cuda.device(device):  # "cuda" alone is the current one
        refusal = _C.refusal_of_gpu(torch.cuda.current_device())
    if refusal:
        raise UnsupportedError(
            f"device is {device}, {torch.cuda.get_device_name(device)}: {refusal[:-1]}; "
            "install a flute-kernels wheel that has it."
        )


def pack(linear: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 ``[units, tiles, 32*bits]``, scales ``[lines, tiles, 8, 1 or 2, 2]``, tables of pairs."""
    n, k, bits = linear.out_features, linear.in_features, linear.spec.bits
    qweight = linear.qweight.contiguous()
    device = qweight.device
    codes = torch.empty(_codes_shape(n, k, bits), dtype=torch.int32, device=device)
    _C.pack_cuda(qweight.data_ptr(), codes.data_ptr(), n, k, bits, device.index, current_stream(device))
    return codes, _pack_scales(linear.scales, k), _pair_tables(linear.codebook, linear.spec)


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """The canonical ``qweight`` and ``scales`` again."""
    n, k, bits, device = weight.out_features, weight.in_features, weight.bits, weight.codes.device
    qweight = torch.empty((n, k * bits // 32), dtype=torch.int32, device=device)
    _C.unpack_cuda(
        weight.codes.data_ptr(), qweight.data_ptr(), n, k, bits, device.index, current_stream(device)
    )
    return qweight, _unpack_scales(weight.scales, n, k // weight.group_size)


def pad_rows(rows: Tensor) -> Tensor:
    """x as the kernels want it, with zeros where K ends inside a unit of 64."""
    missing = -rows.shape[1] % _UNIT
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _codes_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    return -(-k // _UNIT), -(-n // _TILE), 32 * bits


def _per_unit(k: int, group_size: int) -> int:
    """Scales of 64 weights along K, which lie together."""
    return 2 if group_size == 32 and k > 32 else 1


def _pack_scales(scales: Tensor, k: int) -> Tensor:
    n, groups = scales.shape
    tiles, together = -(-n // _TILE), _per_unit(k, k // groups)
    lines = -(-groups // together)
    padded = scales.new_zeros(tiles * _TILE, lines * together)
    padded[:n, :groups] = scales
    return padded.view(tiles, 2, 8, lines, together).permute(3, 0, 2, 4, 1).contiguous()


def _unpack_scales(packed: Tensor, n: int, groups: int) -> Tensor:
    lines, tiles, _, together, _ = packed.shape
    rows = packed.permute(1, 4, 2, 0, 3).reshape(tiles * _TILE, lines * together)
    return rows[:n, :groups].clone(memory_format=torch.contiguous_format)


def _pair_tables(codebook: Tensor, spec: QuantSpec) -> Tensor:
    """float32 ``[T, 4**bits, 2]``: the Cartesian square of a table of single weights."""
    tables = codebook.to(torch.float32)
    if spec.vector_size == 2:
        return tables.contiguous()
    entry = torch.arange(4**spec.bits, device=tables.device)
    values = tables[..., 0]
    return torch.stack([values[:, entry % 2**spec.bits], values[:, entry // 2**spec.bits]], -1).contiguous()


def check_layout(weight: PackedWeight) -> None:
    """The weight is what a kernel will read: an operator's caller may have made it by hand."""
    n, k, bits = weight.out_features, weight.in_features, weight.bits
    spec = QuantSpec(bits=bits, vector_size=weight.vector_size, group_size=PER_ROW)
    spec.check_in_features(k)
    group = weight.group_size
    if group != k and (group not in GROUP_SIZES or k % group):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise FormatError(f"group_size is {group}; expected {sizes} or all of in_features = {k}.")
    tiles, together = -(-n // _TILE), _per_unit(k, group)
    count = weight.tables.shape[0] if weight.tables.ndim else 0
    if count < 1 or tiles % count:
        raise FormatError(
            f"tables holds {count} tables for {tiles} tiles of {_TILE} rows; expected a divisor."
        )
    expected = {
        "codes": (weight.codes, (torch.int32,), list(_codes_shape(n, k, bits))),
        "scales": (weight.scales, SCALE_DTYPES, [-(-(k // group) // together), tiles, 8, together, 2]),
        "tables": (weight.tables, (torch.float32,), [count, 4**bits, 2]),
    }
    check_tensors(expected, weight.codes.device)
    for name, (tensor, *_) in expected.items():
        if tensor.data_ptr() % 16:
            raise FormatError(
                f"{name} begins at an address that 16 does not divide; kernels need one that it does."
            )
