"""Time on the GPU: medians of CUDA-graph replays, in microseconds a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["Replays", "copy_bandwidth", "in_turns", "microseconds"]

_WARM_UP, _WARM_UP_OF_LONG, _WARM_UP_OF_IDLE = 5e3, 25e3, 60e3
"""Microseconds of replays before the first that counts.

A GPU that idled comes back to its clocks slowly, and one that long calls bring to its limit of power forgets
slowly who was before.
"""

_LONG = 100
"""Microseconds from which a call is long."""

_IDLE = 0.1
"""Seconds without a measurement after which a GPU has idled."""

_last = 0.0


class Replays:
    """A graph that holds ``call(0)``, ``call(1)``, ..., each copy equally often.

    Args:
        call: launches its work with the weight of that number.
        copies: how many weights there are.
    """

    def __init__(self, call: Callable[[int], object], copies: int) -> None:
        once = _roughly(call, copies)
        self._warm_up = _WARM_UP_OF_LONG if once > _LONG else _WARM_UP
        calls = max(copies, min(64, int(600 / once)))
        self._calls = -(-calls // copies) * copies
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(self._calls):
                call(i % copies)

    def measure(self, budget: float = 30e3, most: int = 15) -> list[float]:
        """Microseconds a call of several replays, after some that do not count.

        Args:
            budget: microseconds that the replays may take together; five are made in any case.
            most: replays.
        """
        global _last
        spent, warm_up = 0.0, self._warm_up if time.monotonic() - _last < _IDLE else _WARM_UP_OF_IDLE
        while spent < warm_up:
            spent += _elapsed(self._graph.replay)
        times: list[float] = []
        while len(times) < most and (len(times) < 5 or sum(times) * self._calls < budget):
            times.append(_elapsed(self._graph.replay) / self._calls)
        _last = time.monotonic()
        return times


def microseconds(call: Callable[[int], object], copies: int) -> float:
    """The median over replays of ``call(0)``, ``call(1)``, ...; arguments as those of :class:`Replays`."""
    return statistics.median(Replays(call, copies).measure())


def in_turns(sides: Mapping[str, Replays], rounds: int = 4) -> dict[str, float]:
    """Each side's median over rounds in which all have a turn: a GPU that gets warmer is slower for all.

    Every second round goes backwards, since a GPU at its limit of power also remembers who was before.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, replays in reversed(sides.items()) if number % 2 else sides.items():
            times[name] += replays.measure(budget=30e3 / rounds)
    return {name: statistics.median(of_side) for name, of_side in times.items()}


def copy_bandwidth() -> float:
    """Bytes read and written by an elementwise kernel, in TB/s."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / microseconds(lambda _: torch.mul(source, 1.5, out=target), 1) / 1e6


def _roughly(call: Callable[[int], object], copies: int) -> float:
    call(0)
    return max(1.0, _elapsed(lambda: [call(i % copies) for i in range(3)]) / 3)


def _elapsed(work: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)
