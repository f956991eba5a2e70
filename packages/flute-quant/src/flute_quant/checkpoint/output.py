"""What every way to make a checkpoint writes: files that resume, an index, a report and a config."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flute_quant.checkpoint.safetensors_writer import SafetensorsWriter, TensorSlot, file_size
from flute_quant.checkpoint.source import INDEX_NAME
from flute_quant.checkpoint.workfolder import WorkFolder, sync_folder, write_synced

__all__ = ["REPORT_NAME", "Progress", "Teller", "write_files", "write_index", "write_json"]

REPORT_NAME = "flute_report.json"


@dataclass(frozen=True)
class Progress:
    """One more module is finished (or a whole file, taken over from an interrupted run).

    Args:
        name: the module, or the file.
        error: its squared error relative to its energy; None for a file taken over.
        done, total: weights finished so far and in all.
    """

    name: str
    error: float | None
    done: int
    total: int


class Teller:
    """Counts weights for whoever follows the progress.

    Args:
        total: weights in all.
        progress: who follows it.
    """

    def __init__(self, total: int, progress: Callable[[Progress], None] | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0

    def __call__(self, name: str, error: float | None, weights: int) -> None:
        self._done += weights
        if self._progress is not None:
            self._progress(Progress(name, error, self._done, self._total))


def write_files(
    work: WorkFolder,
    files: Mapping[str, Sequence[TensorSlot]],
    write: Callable[[str, SafetensorsWriter], dict[str, float]],
    taken_over: Callable[[str], None],
) -> tuple[dict[str, float], int]:
    """Write files of tensors, one after the other, each on disk as a whole or not at all.

    Args:
        work: where.
        files: file name to its tensors.
        write: writes the tensors of a file, and returns the errors of its modules.
        taken_over: is told of a file that an interrupted run has finished.

    Returns:
        Module name to its error, and how many files were taken over.
    """
    errors: dict[str, float] = {}
    resumed = 0
    for name, slots in files.items():
        path = work.out / name
        report = work.report_of(name)
        if report is not None and path.stat().st_size == file_size(slots):
            resumed += 1
            taken_over(name)
        else:
            with SafetensorsWriter(path, slots) as writer:
                report = write(name, writer)
                work.note_report(name, report)
            sync_folder(work.out)
        errors |= report
    return errors, resumed


def write_index(folder: Path, files: Mapping[str, Iterable[TensorSlot]]) -> None:
    """Say which of several files holds which tensor, as Transformers reads it."""
    slots = [(slot, name) for name, of_file in files.items() for slot in of_file]
    weight_map = dict(sorted((slot.name, name) for slot, name in slots))
    metadata = {"total_size": sum(slot.nbytes for slot, _ in slots)}
    write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    """A small file that is on disk, or not there."""
    write_synced(path, (json.dumps(value, indent=2) + "\n").encode())
