"""Read a safetensors file that nobody vouches for.

Everything that the header claims is compared with the file's own size before a byte is allocated
for it. Nothing is mapped into memory: a file that shrinks while it is read is an error, not a crash.

Source: the format section of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from flute_quant.errors import CheckpointError

__all__ = ["DTYPES", "DTYPE_NAMES", "SafetensorsFile", "StoredTensor"]

# The limit of the safetensors library itself.
_MAX_HEADER = 100_000_000
_BLOCK = 16 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: dtype, shape, and the bytes ``[start, stop)`` counted from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return _product(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def is_float(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")


class SafetensorsFile:
    """The checked header of a safetensors file, and its tensors on demand.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, truncated, or not as the format says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                if len(prefix) < 8 or length > min(self.size - 8, _MAX_HEADER):
                    raise CheckpointError(
                        f"{path} has {self.size} bytes and announces a header of {length}; "
                        "it is truncated or not a safetensors file."
                    )
                header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
        if len(header) < length:
            raise CheckpointError(f"{path} shrank while its header of {length} bytes was read.")
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        self.tensors = self._parse(header, 8 + length)

    def _parse(self, header: bytes, origin: int) -> dict[str, StoredTensor]:
        try:
            entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"The header of {self.path} is not JSON: {error}.") from None
        if not isinstance(entries, dict):
            raise CheckpointError(
                f"The header of {self.path} is a {type(entries).__name__}; expected an object."
            )
        entries.pop("__metadata__", None)
        tensors = {name: self._entry(name, entry, origin) for name, entry in entries.items()}
        expected = origin
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if tensor.start != expected:
                raise CheckpointError(
                    f"{name} begins at byte {tensor.start} of {self.path}; expected {expected}, "
                    "where the tensor before it ends."
                )
            expected = tensor.stop
        if expected != self.size:
            what = "truncated" if expected > self.size else "followed by bytes that belong to no tensor"
            raise CheckpointError(
                f"{self.path} has {self.size} bytes and its header describes {expected}; it is {what}."
            )
        return tensors

    def _entry(self, name: str, entry: Any, origin: int) -> StoredTensor:
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
            raise CheckpointError(f"{name} in {self.path} has no valid dtype, shape and data_offsets.")
        if dtype not in DTYPES:
            raise CheckpointError(f"{name} in {self.path} has dtype {dtype}; known are {', '.join(DTYPES)}.")
        start, stop = offsets
        needed = _product(shape) * DTYPES[dtype].itemsize
        if stop - start != needed:
            raise CheckpointError(
                f"{name} in {self.path} is {dtype} {shape}, which is {needed} bytes; "
                f"its offsets span {stop - start}."
            )
        return StoredTensor(dtype, tuple(shape), origin + start, origin + stop)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        stored = self.tensors[name]
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        left = memoryview(data.numpy().data)
        with self._opened_at(stored.start) as file:
            while left:
                count = file.readinto(left[:_BLOCK])
                if not count:
                    raise self._ended(name, len(left))
                left = left[count:]
        return data.view(DTYPES[stored.dtype]).reshape(stored.shape)

    def blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, in blocks of at most 16 MiB."""
        stored = self.tensors[name]
        left = stored.nbytes
        with self._opened_at(stored.start) as file:
            while left:
                block = file.read(min(left, _BLOCK))
                if not block:
                    raise self._ended(name, left)
                left -= len(block)
                yield block

    @contextmanager
    def _opened_at(self, start: int) -> Iterator[FileIO]:
        try:
            with FileIO(self.path) as file:
                file.seek(start)
                yield file
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}.") from None

    def _ended(self, name: str, left: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} ended {left} bytes before the end of {name}; it was changed meanwhile."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _sizes(values: Any) -> TypeGuard[list[int]]:
    """A short list of non-negative integers that fit 63 bits."""
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values)
    )


def _product(shape: Any) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
