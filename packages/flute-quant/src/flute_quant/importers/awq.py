"""AWQ checkpoints of AutoAWQ, 4 bits, "gemm" layout.

``qweight`` is int32 ``[K, N / 8]``: the eight 4-bit codes of a word, from its low end, belong to the outputs
0, 2, 4, 6, 1, 3, 5, 7 of its eight. ``qzeros`` ``[K / g, N / 8]`` is packed the same way, and ``scales`` is
``[K / g, N]``. The scales that AWQ gives to input channels are in the weights already.

Source: ``WQLinear_GEMM`` of github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flute_kernels import QuantizedLinear, pack_codes
from flute_quant.checkpoint.source import CheckpointFolder, read_json
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importers.base import Candidate, Imported, Importer, Source, SourceLinear, checked_spec
from flute_quant.importers.folder import folder_source, require_tensors, stems
from flute_quant.importers.grid import IntegerGrid, integer_grid
from flute_quant.importers.scales import group_for, regroup

__all__ = ["IMPORTER"]

_LEGACY = "quant_config.json"
_PARTS = (".qweight", ".qzeros", ".scales")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _recognises(found: Candidate) -> bool:
    return found.method == "awq" or (not found.quantization and (found.path / _LEGACY).is_file())


def _open(found: Candidate) -> Source:
    folder = CheckpointFolder.open(found.path)
    given = found.quantization
    if not given and (found.path / _LEGACY).is_file():
        given = read_json(found.path / _LEGACY)
    version = str(given.get("version") or given.get("format") or "gemm").lower()
    bits = given.get("bits", given.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise QuantizationError(
            f"{folder.path} is AWQ in the layout {version!r} with {bits} bits; supported is 'gemm' with 4."
        )
    linears = {f"{m}.qweight": _linear(folder, m) for m in stems(folder, ".qweight")}
    consumed = [t.removesuffix(".qweight") + part for t in linears for part in _PARTS]
    return folder_source(folder, linears, consumed, dropped_files=(_LEGACY,))


def _linear(folder: CheckpointFolder, module: str) -> SourceLinear:
    require_tensors(
        folder,
        {f"{module}.qweight": ("I32",), f"{module}.qzeros": ("I32",), f"{module}.scales": ("F16", "BF16")},
    )
    shapes = {part: folder.tensor(module + part).shape for part in _PARTS}
    k, words = (*shapes[".qweight"], 0, 0)[:2]
    groups = (*shapes[".scales"], 0)[0]
    if shapes[".scales"] != (groups, words * 8) or shapes[".qzeros"] != (groups, words) or not groups:
        raise CheckpointError(
            f"{module} has qweight {list(shapes['.qweight'])}, qzeros {list(shapes['.qzeros'])} and scales "
            f"{list(shapes['.scales'])}; expected [K, N / 8], [K / g, N / 8] and [K / g, N]."
        )
    if k % groups:
        raise CheckpointError(f"{module} has {groups} groups, which do not divide its {k} inputs.")
    grid = integer_grid(4, _zeros(folder, module), f"{module}.qzeros")
    group = group_for(k // groups, k, f"{module}.scales")
    spec = checked_spec(f"{module}.qweight", words * 8, k, bits=4, group_size=group)
    dtype = torch.float16 if folder.tensor(f"{module}.scales").dtype == "F16" else torch.bfloat16
    read = partial(_read, folder, module, grid, group)
    return SourceLinear(module, words * 8, k, spec, dtype, torch.float16, read)


def _read(folder: CheckpointFolder, module: str, grid: IntegerGrid, group: int) -> Imported:
    codes = _unpack(folder.read(f"{module}.qweight")).t()
    n, k = codes.shape
    scales = regroup(folder.read(f"{module}.scales").t(), k, group)
    spec = checked_spec(module, n, k, bits=4, group_size=group)
    linear = QuantizedLinear(spec, pack_codes(codes, 4), scales, grid.table[None, :, None])
    linear.validate(f"{module}.")
    return Imported(linear)


def _zeros(folder: CheckpointFolder, module: str) -> Tensor:
    return _unpack(folder.read(f"{module}.qzeros"))


def _unpack(words: Tensor) -> Tensor:
    """int32 ``[rows, N / 8]`` to uint8 ``[rows, N]``, outputs in their own order."""
    packed = words.contiguous().view(torch.uint8)
    nibbles = torch.stack([packed & 15, packed >> 4], -1).view(len(words), -1, 8)
    codes = torch.empty_like(nibbles)
    codes[..., list(_ORDER)] = nibbles
    return codes.view(len(words), -1)


IMPORTER = Importer("awq", "symmetric AWQ weights of 4 bits, layout gemm", _recognises, _open)
