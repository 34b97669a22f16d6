"""Times of work on the card: medians of replayed CUDA graphs, so that launches do not count."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return a graph of the calls, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(run: Callable[[], object], *, calls: int = 1, rounds: int = 7) -> float:
    """Return the median time of one of the ``calls`` that ``run`` makes."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def graph_microseconds(calls: Sequence[Callable[[], object]], *, rounds: int = 7) -> float:
    """Return the median time of one of the calls within a graph of all of them."""
    graph = captured(calls)
    return microseconds(graph.replay, calls=len(calls), rounds=rounds)


def eager_microseconds(calls: Sequence[Callable[[], object]], *, rounds: int = 7) -> float:
    def run() -> None:
        for call in calls:
            call()

    return microseconds(run, calls=len(calls), rounds=rounds)
