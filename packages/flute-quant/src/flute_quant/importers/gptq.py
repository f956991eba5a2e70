"""GPTQ checkpoints of AutoGPTQ, GPTQModel and Transformers: integer codes, scales and zero points.

``qweight`` is int32 ``[K * b / 32, N]``: every column is one little-endian bit stream along K, so its
transpose is our own layout. ``qzeros`` holds zero points the same way along N, each minus one in the first
version of the format ("gptq") and as they are in the second ("gptq_v2"). ``scales`` is ``[K / g, N]``, and
``g_idx`` names the group of every input.

Source: ``QuantLinear.pack`` of AutoGPTQ; ``convert_gptq_v1_to_v2_format`` of github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flute_kernels import QuantizedLinear, pack_codes, unpack_codes
from flute_kernels.format.spec import BITS
from flute_quant.checkpoint.source import CheckpointFolder, read_json
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importers.base import Candidate, Imported, Importer, Source, SourceLinear, checked_spec
from flute_quant.importers.folder import folder_source, require_tensors, stems
from flute_quant.importers.grid import IntegerGrid, integer_grid
from flute_quant.importers.scales import FittedScales, constant_groups, fit_scales, rounding_error

__all__ = ["IMPORTER"]

_LEGACY = "quantize_config.json"
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def _recognises(found: Candidate) -> bool:
    return found.method == "gptq" or (not found.quantization and (found.path / _LEGACY).is_file())


def _open(found: Candidate) -> Source:
    folder = CheckpointFolder.open(found.path)
    given = found.quantization
    if not given and (found.path / _LEGACY).is_file():
        given = read_json(found.path / _LEGACY)
    version = str(given.get("checkpoint_format") or given.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise QuantizationError(
            f"{folder.path} is GPTQ in the format {version!r}; supported are 'gptq' and 'gptq_v2'."
        )
    bits = given.get("bits")
    linears = {
        f"{module}.qweight": _linear(folder, module, bits, offset=1 if version == "gptq" else 0)
        for module in stems(folder, ".qweight")
    }
    consumed = [t.removesuffix(".qweight") + part for t in linears for part in _PARTS]
    return folder_source(folder, linears, consumed, dropped_files=(_LEGACY,))


@dataclass(frozen=True)
class _Small:
    """All of a linear but its codes."""

    bits: int
    zeros: Tensor  # uint8 [G, N]
    grid: IntegerGrid
    groups: Tensor  # int64 [K / g], the source's group of each of ours
    group_size: int
    fitted: FittedScales  # [N, K / g]


def _linear(folder: CheckpointFolder, module: str, announced: object, *, offset: int) -> SourceLinear:
    floats = ("F16", "BF16", "F32")
    require_tensors(
        folder, {f"{module}.qweight": ("I32",), f"{module}.qzeros": ("I32",), f"{module}.scales": floats}
    )
    words, n = _two(folder, f"{module}.qweight")
    small = _small(folder, module, announced, offset)
    k = words * 32 // small.bits
    spec = checked_spec(f"{module}.qweight", n, k, bits=small.grid.bits, group_size=small.group_size)
    notes = [small.grid.note, None if small.fitted.exact else "32-bit scales rounded to float16"]
    return SourceLinear(
        module,
        n,
        k,
        spec,
        small.fitted.scales.dtype,
        torch.float16 if small.fitted.factor == 1 else torch.float32,
        partial(_read, folder, module, announced, offset),
        " and ".join(note for note in notes if note) or None,
    )


def _read(folder: CheckpointFolder, module: str, announced: object, offset: int) -> Imported:
    small = _small(folder, module, announced, offset)
    grid, fitted = small.grid, small.fitted
    qweight = folder.read(f"{module}.qweight").t().contiguous()
    if grid.zero is None:
        codes = unpack_codes(qweight, small.bits)
        qweight = pack_codes(grid.move(codes, small.zeros.t()[:, small.groups]), grid.bits)
    table = grid.table if fitted.factor == 1 else grid.table.float() * fitted.factor
    n, k = qweight.shape[0], qweight.shape[1] * 32 // grid.bits
    spec = checked_spec(module, n, k, bits=grid.bits, group_size=small.group_size)
    linear = QuantizedLinear(spec, qweight, fitted.scales, table[None, :, None])
    linear.validate(f"{module}.")
    if fitted.exact:
        return Imported(linear)
    wanted = folder.read(f"{module}.scales").t()[:, small.groups]
    return Imported(linear, rounding_error(fitted, wanted, linear.codes(), grid.table))


def _small(folder: CheckpointFolder, module: str, announced: object, offset: int) -> _Small:
    words, n = _two(folder, f"{module}.qweight")
    groups, columns = _two(folder, f"{module}.scales")
    if columns != n:
        raise CheckpointError(f"{module}.scales is {[groups, columns]}; expected [K / g, {n}].")
    g_idx = folder.read(f"{module}.g_idx") if f"{module}.g_idx" in folder.location else None
    if g_idx is not None and (g_idx.ndim != 1 or g_idx.dtype not in (torch.int32, torch.int64)):
        raise CheckpointError(f"{module}.g_idx is {g_idx.dtype} {list(g_idx.shape)}; expected int32 [K].")
    bits = _bits(module, words, g_idx, announced)
    k = words * 32 // bits
    if g_idx is not None and len(g_idx) != k:
        raise CheckpointError(f"{module}.g_idx names the groups of {len(g_idx)} inputs; there are {k}.")
    zeros_shape = _two(folder, f"{module}.qzeros")
    if zeros_shape != (groups, n * bits // 32):
        raise CheckpointError(
            f"{module}.qzeros is {list(zeros_shape)}; expected {[groups, n * bits // 32]} for {groups} "
            f"groups of {n} zero points of {bits} bits."
        )
    if g_idx is None:
        if k % groups:
            raise CheckpointError(f"{module} has {groups} groups, which do not divide its {k} inputs.")
        g_idx = torch.arange(k) // (k // groups)
    zeros = unpack_codes(folder.read(f"{module}.qzeros"), bits)
    if offset and bool((zeros == (1 << bits) - 1).any()) and len(torch.unique(zeros)) > 1:
        # 2**bits to some readers, and 0 to others, whose addition runs over into the next zero point.
        raise QuantizationError(
            f"{module}.qzeros has the zero point {(1 << bits) - 1} in the format 'gptq', which readers take "
            f"for {1 << bits} or for 0; expected less, or the format 'gptq_v2'."
        )
    zeros = zeros + offset
    size, group_of = constant_groups(g_idx, groups, f"{module}.g_idx")
    grid = integer_grid(bits, zeros, f"{module}.qzeros")
    scales = folder.read(f"{module}.scales").t()[:, group_of].contiguous()
    return _Small(bits, zeros, grid, group_of, size, fit_scales(scales, f"{module}.scales"))


def _bits(module: str, words: int, g_idx: Tensor | None, announced: object) -> int:
    """Bits of a code: what the shapes say, since a config may give modules different ones."""
    bits = words * 32 / len(g_idx) if g_idx is not None and len(g_idx) else announced
    for known in BITS:
        if bits == known and words % known == 0:
            return known
    raise QuantizationError(
        f"{module}.qweight has {words} words along its inputs, {bits} bits a weight; "
        "supported are 2, 3 and 4."
    )


def _two(folder: CheckpointFolder, name: str) -> tuple[int, int]:
    shape = folder.tensor(name).shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{name} is {list(shape)}; expected two dimensions.")
    return shape[0], shape[1]


IMPORTER = Importer(
    "gptq",
    "symmetric GPTQ weights of 2, 3 and 4 bits, formats gptq and gptq_v2",
    _recognises,
    _open,
)
