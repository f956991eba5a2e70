"""What decides about a run's output beside the code: by it a run knows what an interrupted one has left."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute_quant.calibration.text import CalibrationText
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.importance import ImportanceOption
from flute_quant.importance.tokens import LENGTH, SEED, SEQUENCES

__all__ = ["calibration_print", "file_print", "folder_print", "importance_print"]


def file_print(file: Path) -> list[Any]:
    """A file as it is now, without reading it."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def folder_print(folder: CheckpointFolder) -> list[Any]:
    """A checkpoint folder: its tensors' files and what else of it is used."""
    prints: list[Any] = []
    for name, file in sorted(folder.files.items()):
        prints.append([*file_print(file.path)[1:], name, file.header_sha256])
    return [*prints, *map(file_print, [folder.path / "config.json", *folder.side_files()])]


def importance_print(kind: str, importance: ImportanceOption) -> str:
    """What decides about the importance: the pass, or the values themselves."""
    if kind == "random":
        import transformers

        return f"random, {SEQUENCES} x {LENGTH}, seed {SEED}, Transformers {transformers.__version__}"
    if isinstance(importance, str):
        return kind
    digest = hashlib.sha256()
    for name, values in sorted(importance.items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def calibration_print(calibration: CalibrationText | Tensor) -> str:
    """What decides about the calibration beside the model and the method."""
    import transformers

    if isinstance(calibration, CalibrationText):
        what = calibration.digest()
    else:
        values = calibration.detach().cpu().contiguous()
        digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest() if values.ndim else ""
        what = f"{digest}, tokens {list(values.shape)} {values.dtype}"
    return f"{what}, Transformers {transformers.__version__}"
