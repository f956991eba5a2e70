"""Time on the GPU: medians of CUDA-graph replays, in microseconds a call."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

__all__ = ["microseconds"]

_WARM_UP = 5e3
"""Microseconds of replays before the first that counts: a GPU that idled comes back to its clocks."""


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
    spent = 0.0
    while spent < _WARM_UP:
        spent += _elapsed(graph.replay)
    times: list[float] = []
    while len(times) < replays and (len(times) < 5 or sum(times) * calls < budget):
        times.append(_elapsed(graph.replay) / calls)
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
