"""The importers by name. To add one: write its file, and it in a line here."""

from __future__ import annotations

from pathlib import Path

import torch

from flute_kernels.format import QUANT_METHOD
from flute_quant.checkpoint.gguf import find_gguf
from flute_quant.checkpoint.source import read_json
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importers import awq, bitsandbytes, gguf, gptq, higgs, upstream
from flute_quant.importers.base import Candidate, Importer

__all__ = ["candidate", "find_importer", "importer_names", "importers"]

_IMPORTERS = (
    bitsandbytes.IMPORTER,
    gptq.IMPORTER,
    awq.IMPORTER,
    gguf.IMPORTER,
    upstream.IMPORTER,
    higgs.IMPORTER,
)


def importers() -> dict[str, Importer]:
    """All of them by name, in the order in which they are asked."""
    return {importer.name: importer for importer in _IMPORTERS}


def importer_names() -> tuple[str, ...]:
    """Names for ``--from``."""
    return tuple(importers())


def candidate(src: Path, dtype: torch.dtype = torch.bfloat16) -> Candidate:
    """What a path tells at first sight.

    Raises:
        CheckpointError: a config that is no JSON, or several GGUF files.
    """
    gguf_file = find_gguf(src)
    config = src / "config.json"
    content = read_json(config) if gguf_file is None and config.is_file() else {}
    return Candidate(src, content, gguf_file, dtype)


def find_importer(found: Candidate, name: str | None = None) -> Importer:
    """The importer for a source: the named one, or the first that recognises it.

    Raises:
        QuantizationError: no importer of that name.
        CheckpointError: nothing recognises the source, or it is a FLUTE checkpoint already.
    """
    known = importers()
    if name is not None:
        if name not in known:
            raise QuantizationError(f"There is no importer {name!r}; known are {', '.join(known)}.")
        return known[name]
    if found.method == QUANT_METHOD and "format_version" in found.quantization:
        raise CheckpointError(f"{found.path} is a FLUTE checkpoint already; there is nothing to import.")
    for importer in known.values():
        if importer.recognises(found):
            return importer
    if not found.path.exists():
        raise CheckpointError(f"{found.path} does not exist.")
    what = f"is quantized by {found.method!r}" if found.method else "does not say how it is quantized"
    raise CheckpointError(f"{found.path} {what}; importers exist for {', '.join(known)}.")
