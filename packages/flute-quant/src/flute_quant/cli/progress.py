"""Progress of a long run: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from flute_quant.checkpoint.output import Progress
from flute_quant.cli.text import duration

__all__ = ["ProgressView"]

_LINE_EVERY = 10.0  # seconds


class ProgressView:
    """Shows layer name, error and remaining time on standard error."""

    def __init__(self, what: str) -> None:
        self._console = Console(stderr=True)
        self._last = time.monotonic()
        # Time and progress at the first event: what came before (loading, converting) tells no speed.
        self._base: tuple[float, int] | None = None
        self._stage = ""
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.percentage:3.0f}%"),
                BarColumn(bar_width=30),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """One sentence that stays on the screen."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def measuring(self, done: int, total: int) -> None:
        """The pass that measures the importance of input channels has reached some modules."""
        self._begin("measuring")
        self.step("measuring input channels", done, total)

    def learning(self, done: int, total: int, loss: float) -> None:
        """A step that learns scales on the whole model is done."""
        self._begin("learning")
        self.step(f"learning scales  loss {loss:.4f}", done, total)

    def stage(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of one stage of the work are finished."""
        self._begin(what)
        self.step(what, done, total)

    def quantized(self, event: Progress) -> None:
        """A module is finished."""
        self._finished("quantizing", event)

    def imported(self, event: Progress) -> None:
        """A module has been taken over."""
        self._finished("importing", event)

    def _finished(self, stage: str, event: Progress) -> None:
        self._begin(stage)
        if event.error is None:
            self._base = None  # files taken over took no time
            label = f"{event.name} was finished before"
        else:
            label = event.name + (f"  error {event.error:.4f}" if stage == "quantizing" else "")
        self.step(label, event.done, event.total)

    def _begin(self, stage: str) -> None:
        """Forget the speed of another stage."""
        if self._stage != stage:
            self._stage, self._base = stage, None
            if self._bar is not None:
                self._bar.reset(self._task)

    def step(self, label: str, done: int, total: int) -> None:
        """``done`` of ``total`` are finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=label.replace("[", r"\["))
            return
        now = time.monotonic()
        if self._base is None:
            self._base = (now, done)
        if now - self._last < _LINE_EVERY and done < total:
            return
        self._last = now
        since, before = self._base
        left = (
            f"  {duration((now - since) * (total - done) / (done - before))} left"
            if before < done < total
            else ""
        )
        print(f"{done / total:4.0%}  {label}{left}", file=sys.stderr, flush=True)
