"""Write a safetensors file tensor by tensor, its header first: no more than one tensor is in memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from flute_quant.checkpoint.safetensors_reader import DTYPE_NAMES, DTYPES

__all__ = ["SafetensorsWriter", "TensorSlot", "file_size"]


@dataclass(frozen=True)
class TensorSlot:
    """Name, dtype (as in the format) and shape of a tensor to come."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = DTYPES[self.dtype].itemsize
        for extent in self.shape:
            size *= extent
        return size


class SafetensorsWriter:
    """A file that appears under its name only when it is complete and on disk.

    Until then it is ``.NAME.writing`` beside it, which a failure leaves to the owner of the folder.

    Args:
        path: the final name.
        slots: all tensors, in any order. Wider types are laid out first, as the format's own
            library does, so that every tensor is aligned.
    """

    def __init__(self, path: Path, slots: Iterable[TensorSlot]) -> None:
        self.path = path
        header, self._slots = _layout(slots)
        self._temporary = path.with_name(f".{path.name}.writing")
        self._file = self._temporary.open("wb")
        self._file.write(header)
        self._missing = set(self._slots)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its slot."""
        slot, _ = self._slots[name]
        found = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        if found != (slot.dtype, slot.shape):  # a method's result differs from what its spec says
            raise ValueError(f"{name} is {found}; announced was {(slot.dtype, slot.shape)}.")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.write_blocks(name, [flat.numpy().data])

    def write_blocks(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Put a tensor's bytes into its slot."""
        slot, start = self._slots[name]
        self._file.seek(start)
        written = sum(self._file.write(block) for block in blocks)
        if written != slot.nbytes:
            raise ValueError(f"{name} has {written} bytes; announced were {slot.nbytes}.")
        self._missing.remove(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or self._missing:
            # Closing flushes what a full disk has just refused; the first error is the one to tell.
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            if error is not None:
                return
            raise ValueError(f"{self.path} lacks {len(self._missing)} tensors, one is {min(self._missing)}.")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self.path)


def file_size(slots: Iterable[TensorSlot]) -> int:
    """Bytes of a file with these tensors."""
    slots = list(slots)
    return len(_layout(slots)[0]) + sum(s.nbytes for s in slots)


def _layout(slots: Iterable[TensorSlot]) -> tuple[bytes, Mapping[str, tuple[TensorSlot, int]]]:
    """The header's bytes, and every slot with its position in the file."""
    ordered = sorted(slots, key=lambda s: -DTYPES[s.dtype].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in ordered:
        entries[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.nbytes],
        }
        offset += slot.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed, start = {}, len(header)
    for slot in ordered:
        placed[slot.name] = (slot, start)
        start += slot.nbytes
    return header, placed
