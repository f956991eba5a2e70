"""HIGGS checkpoints of Transformers: rotated weights in upstream FLUTE's packing, scalar or pair tables.

A pair of neighbouring inputs has one code of twice the bits, whose high half is packed as the code of the
first input. ``tables2`` holds the pairs ``[2**b, 2**b, 2]`` as 16-bit numbers of the model's dtype, always
labelled float16. Inputs are rotated by a Hadamard matrix without signs, in blocks of ``hadamard_size``.

Source: ``quantize_with_higgs`` in transformers/integrations/higgs.py; flute/integrations/higgs.py and the
tuned configurations of github.com/HanGuo97/flute.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flute_kernels import QuantizedLinear
from flute_kernels.format import NO_SIGNS
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importers.base import Candidate, Imported, Importer, Source, SourceLinear, checked_spec
from flute_quant.importers.folder import folder_source, require_tensors, stems
from flute_quant.importers.scales import group_for, regroup
from flute_quant.importers.tiles import unpack_tiles

__all__ = ["IMPORTER", "tile_of"]

_PARTS = (".weight", ".scales", ".tables", ".tables2")
_FLOATS = ("F16", "BF16")


def _open(found: Candidate) -> Source:
    folder = CheckpointFolder.open(found.path)
    given = found.quantization
    numbers = {k: given.get(k, v) for k, v in (("bits", 4), ("p", 2), ("hadamard_size", 512))}
    if numbers["bits"] not in (2, 3, 4) or numbers["p"] not in (1, 2):
        raise QuantizationError(
            f"{folder.path} is HIGGS with bits {numbers['bits']} and p {numbers['p']}; supported are 2, 3 "
            "and 4 bits with p 1 or 2."
        )
    tuned = given.get("tune_metadata")
    linears = {
        f"{m}.weight": _linear(folder, m, numbers, tuned if isinstance(tuned, dict) else {})
        for m in stems(folder, ".tables2")
    }
    consumed = [t.removesuffix(".weight") + part for t in linears for part in _PARTS]
    return folder_source(folder, linears, consumed)


def _linear(
    folder: CheckpointFolder, module: str, numbers: dict[str, Any], tuned: dict[str, Any]
) -> SourceLinear:
    floats = {f"{module}{part}": _FLOATS for part in _PARTS[1:]}
    require_tensors(folder, {f"{module}.weight": ("I16",), **floats})
    bits, pair = numbers["bits"], numbers["p"]
    shapes = {part: folder.tensor(module + part).shape for part in _PARTS}
    rows, k = (*shapes[".weight"], 0, 0)[:2]
    n, groups = (*shapes[".scales"], 0, 0)[:2]
    size = 1 << bits
    wanted = ((rows, k), (n, groups), (size,), (size, size, 2))
    if tuple(shapes.values()) != wanted or rows * 16 != n * bits or not groups or k % groups:
        raise CheckpointError(
            f"{module} has weight {list(shapes['.weight'])}, scales {list(shapes['.scales'])}, tables "
            f"{list(shapes['.tables'])} and tables2 {list(shapes['.tables2'])}; expected "
            f"[N * {bits} / 16, K], [N, K / g], [{size}] and [{size}, {size}, 2]."
        )
    metadata = tuned.get(module)
    template = metadata.get("template_id") if isinstance(metadata, dict) else None
    if bits != 3 and not isinstance(template, int):
        raise CheckpointError(
            f"{folder.path} has no tune_metadata with a template_id for {module}; without it the order of "
            f"its {n} outputs is unknown."
        )
    spec = checked_spec(
        f"{module}.weight",
        n,
        k,
        bits=bits,
        group_size=group_for(k // groups, k, f"{module}.scales"),
        vector_size=pair,
        hadamard=numbers["hadamard_size"],
        hadamard_seed=NO_SIGNS,
    )
    half = folder.tensor(f"{module}.scales").dtype == "F16"
    read = partial(_read, folder, module, numbers, 32 if bits == 3 else tile_of(bits, template))
    dtype = torch.float16 if half else torch.bfloat16
    return SourceLinear(module, n, k, spec, dtype, torch.float16 if half else torch.float32, read)


def tile_of(bits: int, template: int | None) -> int:
    """Rows between the codes of one word of 2 or 4 bits, from the number of the kernel that was tuned."""
    # Kernels are numbered with the tile as an outer loop of three: 64 first, then 32 twice.
    kernels = 16 if bits == 4 else 4
    return 64 if int(template or 0) // kernels % 3 == 0 else 32


def _read(folder: CheckpointFolder, module: str, numbers: dict[str, Any], tile: int) -> Imported:
    bits, pair = numbers["bits"], numbers["p"]
    codes = unpack_tiles(folder.read(f"{module}.weight"), bits, tile, f"{module}.weight")
    n, k = codes.shape
    scales = folder.read(f"{module}.scales")
    table = folder.read(f"{module}.tables")[:, None]
    if pair == 2:
        codes = codes[:, 0::2] << bits | codes[:, 1::2]
        table = _pairs(folder.read(f"{module}.tables2"), scales.dtype, bits, f"{module}.tables2")
    group = group_for(k // scales.shape[1], k, f"{module}.scales")
    spec = checked_spec(
        module,
        n,
        k,
        bits=bits,
        group_size=group,
        vector_size=pair,
        hadamard=numbers["hadamard_size"],
        hadamard_seed=NO_SIGNS,
    )
    return Imported(QuantizedLinear.from_codes(codes, regroup(scales, k, group), table, spec))


def _pairs(stored: Tensor, dtype: torch.dtype, bits: int, name: str) -> Tensor:
    """The pairs ``[4**b, 2]`` in the model's dtype, compared with Transformers' own."""
    from transformers.integrations.higgs import get_higgs_grid

    grid: Tensor = get_higgs_grid(2, 1 << 2 * bits).to(dtype)
    for values in (stored.view(dtype), stored.to(dtype)):
        if torch.equal(values.reshape(grid.shape), grid):
            return grid
    raise CheckpointError(
        f"{name} is none of Transformers' grids of {1 << 2 * bits} pairs as {dtype}; loaders that cast it "
        "corrupt it."
    )


IMPORTER = Importer(
    "higgs",
    "HIGGS weights of Transformers, p 1 and 2",
    lambda found: found.method == "higgs",
    _open,
)
