"""The folder in which an output grows: beside its destination, resumable, and gone when it failed.

``.NAME.partial/`` holds ``fingerprint.json`` (what the run was asked), ``out/`` (finished files),
``reports/`` (their errors) and ``lock``. When all is done ``out/`` is renamed to the destination:
the one step that makes the folder appear, whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flute_kernels.format import QUANT_METHOD
from flute_quant.checkpoint.source import read_json
from flute_quant.errors import CheckpointError

try:
    import fcntl
except ImportError:  # no lock on Windows: two runs into one folder are the user's to avoid there
    fcntl = None  # type: ignore[assignment]

__all__ = ["WorkFolder", "check_destination", "partial_path"]


def partial_path(dst: Path) -> Path:
    """Where the output of an unfinished run lies."""
    return dst.with_name(f".{dst.name}.partial")


def check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    """Refuse a destination that exists, has no parent, or overlaps with the source.

    ``overwrite`` permits to replace a folder, but only one that holds a FLUTE checkpoint.
    """
    source, target = src.resolve(), dst.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise CheckpointError(f"{dst} and the source {src} overlap; choose another output folder.")
    if not dst.parent.is_dir():
        raise CheckpointError(f"{dst.parent}, in which {dst.name} is to be written, is no folder.")
    if not (dst.exists() or dst.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{dst} exists already; choose another output folder, or allow to overwrite it."
        )
    config = read_json(dst / "config.json") if (dst / "config.json").is_file() else {}
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{dst} exists and is no FLUTE checkpoint; it will not be overwritten.")


class WorkFolder:
    """See the module. Use it as a context: an error removes it, an interruption keeps it.

    Args:
        dst: the destination.
        fingerprint: all that decides about the output's bytes, as JSON.
        say: receives one sentence when an older partial folder is resumed or discarded.
    """

    def __init__(self, dst: Path, fingerprint: dict[str, Any], say: Callable[[str], None]) -> None:
        self.dst = dst
        self.path = partial_path(dst)
        self.out = self.path / "out"
        self.reports = self.path / "reports"
        self._fingerprint = fingerprint
        self._say = say
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> WorkFolder:
        with self.disk_errors(0):
            self.path.mkdir(exist_ok=True)
            self._take_lock()
            try:
                self._begin()
            except BaseException:
                self._discard()
                raise
        return self

    def _begin(self) -> None:
        note = self.path / "fingerprint.json"
        found = _read_or_none(note)
        wanted = json.loads(json.dumps(self._fingerprint))
        if found == wanted:
            self._say(f"Resuming the interrupted run in {self.path}.")
            return
        leftovers = [p for p in self.path.iterdir() if p.name != "lock"]
        if leftovers:
            changed = sorted(k for k in wanted if not isinstance(found, dict) or found.get(k) != wanted[k])
            self._say(
                f"Discarding {self.path}, which belongs to another run (different: {', '.join(changed)})."
            )
        for entry in leftovers:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.out.mkdir()
        self.reports.mkdir()
        write_synced(note, json.dumps(wanted, indent=1).encode())

    def _take_lock(self) -> None:
        if fcntl is None:
            return  # type: ignore[unreachable]
        lock = (self.path / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise CheckpointError(
                f"Another run is writing {self.dst} (it holds {self.path / 'lock'})."
            ) from None
        self._lock = lock

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # An interruption (SIGINT arrives as KeyboardInterrupt) is no failure of what is already finished.
        if kind is None or issubclass(kind, Exception):
            self._discard()
        elif self._lock is not None:
            self._lock.close()

    def _discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def disk_errors(self, needed: int) -> Iterator[None]:
        """Turn the operating system's refusals into one sentence with the numbers."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EFBIG:
                reason += " (a limit on the size of one file)"
            try:
                free = f"{shutil.disk_usage(self.dst.parent).free:,} are free"
            except OSError:
                free = "the free space is unknown"
            raise CheckpointError(
                f"{self.dst} cannot be written: {reason}; it needs {needed:,} bytes and {free}."
            ) from None

    def require_space(self, needed: int) -> None:
        """Refuse before the first byte what the disk cannot hold."""
        free = shutil.disk_usage(self.path).free
        done = sum(f.stat().st_size for f in self.out.iterdir())
        if needed - done > free:
            raise CheckpointError(
                f"{self.dst} needs {needed - done:,} more bytes and {free:,} are free on its disk."
            )

    def report_of(self, file: str) -> dict[str, Any] | None:
        """What a finished file's run noted, or None where the file is not finished."""
        return _read_or_none(self.reports / f"{file}.json") if (self.out / file).exists() else None

    def note_report(self, file: str, report: dict[str, Any]) -> None:
        """Note it before the file gets its name, so that a finished file always has one."""
        write_synced(self.reports / f"{file}.json", json.dumps(report).encode())

    def finish(self) -> None:
        """Give the output its name."""
        sync_folder(self.out)
        replaced = self.path / "replaced"
        if self.dst.exists():
            self.dst.rename(replaced)
        try:
            self.out.rename(self.dst)
        except OSError:
            if replaced.exists():
                replaced.rename(self.dst)
            raise
        sync_folder(self.dst.parent)


def write_synced(path: Path, data: bytes) -> None:
    """A small file that is on disk, or not there."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows has no such thing
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CheckpointError:
        return None
