"""Checkpoints of upstream FLUTE: a folder with ``flute_config.json`` and packed int16 weights.

``tables2`` is left alone: it repeats ``tables``, as float32 that are really pairs of 16-bit numbers, and
loaders that cast it have corrupted it in some checkpoints.

Source: ``FluteLinear`` in flute/integrations/base.py of github.com/HanGuo97/flute.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from flute_kernels import QuantizedLinear
from flute_quant.checkpoint.source import CheckpointFolder, read_json
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importers.base import Candidate, Imported, Importer, Source, SourceLinear, checked_spec
from flute_quant.importers.folder import folder_source, require_tensors, stems
from flute_quant.importers.scales import group_for, regroup
from flute_quant.importers.tiles import TILES, unpack_tiles

__all__ = ["IMPORTER"]

_CONFIG = "flute_config.json"
_PARTS = (".weight", ".scales", ".tables", ".tables2", "._extra_state")
_FLOATS = ("F16", "BF16")


def _open(found: Candidate) -> Source:
    folder = CheckpointFolder.open(found.path)
    if not (found.path / _CONFIG).is_file():
        raise CheckpointError(f"{folder.path} has no {_CONFIG}, which upstream's checkpoints have.")
    config = read_json(found.path / _CONFIG)
    linears = {f"{m}.weight": _linear(folder, m, config) for m in stems(folder, ".tables")}
    consumed = [t.removesuffix(".weight") + part for t in linears for part in _PARTS]
    return folder_source(folder, linears, consumed, dropped_files=(_CONFIG,))


def _linear(folder: CheckpointFolder, module: str, config: dict[str, Any]) -> SourceLinear:
    require_tensors(
        folder, {f"{module}.weight": ("I16",), f"{module}.scales": _FLOATS, f"{module}.tables": _FLOATS}
    )
    shapes = {part: folder.tensor(module + part).shape for part in _PARTS[:3]}
    bits = {4: 2, 8: 3, 16: 4}.get(folder.tensor(f"{module}.tables").numel, 0)
    rows, k = (*shapes[".weight"], 0, 0)[:2]
    n, groups = (*shapes[".scales"], 0, 0)[:2]
    if not bits or rows * 16 != n * bits or not groups or k % groups:
        raise CheckpointError(
            f"{module} has weight {list(shapes['.weight'])}, scales {list(shapes['.scales'])} and tables "
            f"{list(shapes['.tables'])}; expected [N * b / 16, K], [N, K / g] and [2**b] with 2, 3 or 4 bits."
        )
    tile = _tile(folder, module, config, bits, n)
    group = group_for(k // groups, k, f"{module}.scales")
    spec = checked_spec(f"{module}.weight", n, k, bits=bits, group_size=group)
    scale = torch.float16 if folder.tensor(f"{module}.scales").dtype == "F16" else torch.bfloat16
    table = torch.float16 if folder.tensor(f"{module}.tables").dtype == "F16" else torch.float32
    return SourceLinear(module, n, k, spec, scale, table, partial(_read, folder, module, bits, tile, group))


def _tile(folder: CheckpointFolder, module: str, config: dict[str, Any], bits: int, n: int) -> int:
    """Rows between the codes of one word, which no tensor tells."""
    given = config.get("tile_p")
    if given is not None and given not in TILES:
        raise CheckpointError(f"{folder.path / _CONFIG} has tile_p {given!r}; expected 32 or 64.")
    if bits == 3 or n % (64 * 16 // bits):
        return 32  # the other size cannot be
    if given is None and "num_sms" not in config:
        # The writers that did not note num_sms took the tile that was fastest on their GPU.
        raise QuantizationError(
            f"{module}.weight, {n} outputs of {bits} bits, is packed in tiles of 32 or 64, and "
            f'{folder.path / _CONFIG} does not say which; add "tile_p": 32 or 64 to it '
            "(checkpoints with num_sms have 32)."
        )
    return int(given or 32)


def _read(folder: CheckpointFolder, module: str, bits: int, tile: int, group: int) -> Imported:
    codes = unpack_tiles(folder.read(f"{module}.weight"), bits, tile, f"{module}.weight")
    n, k = codes.shape
    scales = regroup(folder.read(f"{module}.scales"), k, group)
    table = folder.read(f"{module}.tables").reshape(-1)
    spec = checked_spec(module, n, k, bits=bits, group_size=group)
    return Imported(QuantizedLinear.from_codes(codes, scales, table, spec))


IMPORTER = Importer(
    "flute-kernel",
    "checkpoints of upstream FLUTE, with flute_config.json",
    lambda found: (found.path / _CONFIG).is_file(),
    _open,
)
