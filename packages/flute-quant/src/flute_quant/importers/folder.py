"""Sources that are Hugging Face folders: their quantized linears are replaced, all else is kept."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flute_quant.checkpoint.safetensors_writer import TensorSlot
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.errors import CheckpointError
from flute_quant.importers.base import PassedTensor, Source, SourceFile, SourceLinear

__all__ = ["folder_source", "require_tensors", "stems"]


def stems(folder: CheckpointFolder, suffix: str) -> list[str]:
    """Names of modules, in the order of the files, that have a tensor ``NAME + suffix``."""
    return [
        t.removesuffix(suffix)
        for name in sorted(folder.files)
        for t in folder.files[name].tensors
        if t.endswith(suffix) and folder.location[t] == name
    ]


def require_tensors(folder: CheckpointFolder, wanted: Mapping[str, tuple[str, ...]]) -> None:
    """Raise CheckpointError for a tensor that is missing or of another dtype than those named."""
    for name, dtypes in wanted.items():
        if name not in folder.location:
            raise CheckpointError(f"{folder.path} lacks {name}, of dtype {' or '.join(dtypes)}.")
        stored = folder.tensor(name)
        if stored.dtype not in dtypes:
            raise CheckpointError(
                f"{name} is {stored.dtype} {list(stored.shape)}; expected {' or '.join(dtypes)}."
            )


def folder_source(
    folder: CheckpointFolder,
    linears: Mapping[str, SourceLinear],
    consumed: Iterable[str],
    *,
    dropped_files: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Source:
    """A source whose other tensors and files stay as they are.

    Args:
        folder: the checkpoint.
        linears: the tensor with the codes to what becomes of it.
        consumed: all tensors that the linears replace, and those that mean nothing without them.
        dropped_files: side files that only described the source's quantization.
    """
    if not linears:
        raise CheckpointError(
            f"{folder.path} has none of the tensors that its quantization_config announces."
        )
    gone = set(consumed)
    files = []
    for name in sorted(folder.files):
        mine = [t for t in folder.files[name].tensors if folder.location[t] == name]
        passed = tuple(
            PassedTensor(
                TensorSlot(t, folder.tensor(t).dtype, folder.tensor(t).shape),
                partial(folder.files[name].blocks, t),
            )
            for t in mine
            if t not in gone
        )
        files.append(SourceFile(name, tuple(linears[t] for t in mine if t in linears), passed))
    side = [f for f in folder.side_files() if f.name not in set(dropped_files)]
    config = copy.deepcopy(folder.config)
    config.pop("quantization_config", None)
    return Source(
        path=folder.path,
        config=config,
        files=tuple(files),
        sharded=folder.sharded,
        identity=_identity(folder, side),
        nbytes=sum(f.size for f in folder.files.values()),
        side_files=_copier(side),
        notes=tuple(notes),
    )


def _identity(folder: CheckpointFolder, side: list[Path]) -> list[Any]:
    prints: list[Any] = []
    for name, file in sorted(folder.files.items()):
        status = file.path.stat()
        prints.append([name, status.st_size, status.st_mtime_ns, file.header_sha256])
    for path in [folder.path / "config.json", *side]:
        status = path.stat()
        prints.append([path.name, status.st_size, status.st_mtime_ns])
    return prints


def _copier(files: list[Path]) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        for file in files:
            shutil.copyfile(file, target / file.name)

    return write
