"""Time on the GPU: medians of CUDA-graph replays, in microseconds a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["microseconds"]

_WARM_UP, _WARM_UP_OF_IDLE = 5e3, 60e3
"""Microseconds of replays before the first that counts. A GPU that idled comes back to its clocks slowly."""

_IDLE = 0.1
"""Seconds without a measurement after which a GPU has idled."""

_last = 0.0


def microseconds(
    call: Callable[[int], object], copies: int, *, budget: float = 30e3, replays: int = 15
) -> float:
    """The median over replays of a graph that holds ``call(0)``, ``call(1)``, ..., each copy equally often.

    Args:
        call: launches its work with the weight of that number.
        copies: how many weights there are.
        budget: microseconds that the replays may take together; five are made in any case.
        replays: at most.
    """
    once = _roughly(call, copies)
    calls = max(copies, min(64, int(600 / once)))
    calls = -(-calls // copies) * copies
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    global _last
    spent, warm_up = 0.0, _WARM_UP if time.monotonic() - _last < _IDLE else _WARM_UP_OF_IDLE
    while spent < warm_up:
        spent += _elapsed(graph.replay)
    times: list[float] = []
    while len(times) < replays and (len(times) < 5 or sum(times) * calls < budget):
        times.append(_elapsed(graph.replay) / calls)
    _last = time.monotonic()
    return statistics.median(times)


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
