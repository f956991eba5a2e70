"""Killed, interrupted and repeated runs: a finished folder is complete or absent, and the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flute_kernels import QuantSpec
from flute_quant import CheckpointError, Progress, quantize_checkpoint
from flute_quant.checkpoint.workfolder import WorkFolder, partial_path

Checkpoints = Callable[[str], Path]

# Quantizes like the command line, but stops for long after each module, to be killed there.
SLOW = """
import sys, time
from flute_quant import quantize_checkpoint
quantize_checkpoint(sys.argv[1], sys.argv[2], method="lloyd", progress=lambda event: time.sleep(0.4))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def start(program: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen([sys.executable, *program], env=environment, stderr=subprocess.PIPE)


def wait_for_a_finished_file(partial: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not list((partial / "out").glob("*.safetensors")):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_resumes_and_gives_the_same_bytes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    process = start(["-c", SLOW, str(source), str(out)])
    wait_for_a_finished_file(partial_path(out), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    said: list[str] = []
    seen: list[Progress] = []
    report = quantize_checkpoint(source, out, method="lloyd", say=said.append, progress=seen.append)
    assert said == [f"Resuming the interrupted run in {partial_path(out)}."]
    assert report.resumed >= 1
    assert seen[0].error is None
    assert seen[-1].done == seen[-1].total
    quantize_checkpoint(source, tmp_path / "whole", method="lloyd")
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_ctrl_c_keeps_finished_files_says_so_and_leaves_no_output(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    slow = (
        "import signal, sys, time, flute_quant.cli.progress as p\n"
        # What a background job of a shell starts ignores it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "p.ProgressView.quantized = lambda self, event: time.sleep(0.4)\n"
        "from flute_quant.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = start(["-c", slow, "quantize", str(source), str(out)])
    wait_for_a_finished_file(partial_path(out), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().splitlines()[-1:] == [
        f"flute-quant: Interrupted; {out} was not written, "
        f"and the same command resumes from {partial_path(out)}."
    ]
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    assert not list((partial_path(out) / "out").glob(".*"))
    assert quantize_checkpoint(source, out).resumed >= 1


class Stop(BaseException):
    """Like KeyboardInterrupt: no failure."""


def interrupted(source: Path, out: Path, modules: int, **options: object) -> None:
    """A run that stops after some modules, as Ctrl-C would stop it."""
    count = 0

    def progress(event: Progress) -> None:
        nonlocal count
        count += 1
        if count == modules:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, out, progress=progress, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "lloyd"}, "options"),
        ({"spec": QuantSpec(3)}, "options"),
        ({"ignore": ["down_proj"]}, "options"),
        ({"dtype": "keep"}, "options"),
        ({"importance": "columns", "method": "lloyd"}, "importance, options"),
    ],
)
def test_another_run_does_not_continue_where_one_stopped(
    checkpoints: Checkpoints, tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    interrupted(source, out, 9, method="nf")
    heard: list[str] = []
    options = {"method": "nf", **changed}
    report = quantize_checkpoint(source, out, say=heard.append, **options)  # type: ignore[arg-type]
    assert report.resumed == 0
    assert heard == [f"Discarding {partial_path(out)}, which belongs to another run (different: {said})."]
    quantize_checkpoint(source, tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "whole")


def test_a_resumed_run_goes_on_with_the_importance_that_was_measured(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    passes: list[int] = []
    interrupted(source, out, 9, measuring=lambda done, total: passes.append(done))
    assert passes == list(range(1, 15))
    report = quantize_checkpoint(source, out, measuring=lambda done, total: passes.append(done))
    assert len(passes) == 14
    assert report.resumed >= 1
    assert report.importance == "random tokens"
    quantize_checkpoint(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_measurement_is_made_again(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    interrupted(source, out, 9)
    kept = partial_path(out) / "importance.safetensors"
    kept.write_bytes(kept.read_bytes()[:-4])
    quantize_checkpoint(source, out)
    quantize_checkpoint(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_changed_source_is_quantized_anew(copy_of: Checkpoints, tmp_path: Path) -> None:
    source, out = copy_of("llama-sharded"), tmp_path / "out"
    interrupted(source, out, 9)
    first = sorted(source.glob("*.safetensors"))[0]
    os.utime(first, ns=(0, first.stat().st_mtime_ns + 1))
    heard: list[str] = []
    assert quantize_checkpoint(source, out, say=heard.append).resumed == 0
    assert "different: source" in heard[0]


def test_a_finished_file_that_was_cut_meanwhile_is_written_again(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    interrupted(source, out, 9)
    finished = sorted((partial_path(out) / "out").glob("*.safetensors"))
    with finished[0].open("r+b") as file:
        file.truncate(100)
    assert quantize_checkpoint(source, out).resumed == len(finished) - 1
    quantize_checkpoint(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_partial_folder_full_of_garbage_is_discarded(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = partial_path(out)
    partial.mkdir()
    (partial / "fingerprint.json").write_bytes(b"\xff{")
    (partial / "out").write_text("not a folder")
    quantize_checkpoint(checkpoints("llama"), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_runs_into_one_folder_do_not_meet(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with WorkFolder(out, {"a": 1}, lambda message: None):
        with pytest.raises(CheckpointError, match="Another run is writing"):
            quantize_checkpoint(checkpoints("llama"), out)
        assert partial_path(out).exists()
