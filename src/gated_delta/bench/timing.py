"""Time per call: on a GPU CUDA graphs over rotating sets of inputs, on a CPU plain calls; contenders in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]

GRAPH_US = 1000.0
"""A graph lasts this long at least, or has :data:`MOST_CALLS`."""
LEAST_CALLS, MOST_CALLS = 10, 256
LAUNCH_SHOWS_US = 5000.0
"""A graph shorter than this follows upon another replay of itself, so that the host's part of its launch is hidden."""
REPLAYS, LEAST_REPLAYS = 21, 5
BUDGET_S = {"cuda": 0.6, "cpu": 0.5}
"""All replays of a case together; more than :data:`LEAST_REPLAYS` are made only within it."""
HOST_S = 0.2
CACHES = 3
"""Times the L2 that rotating sets take."""


class Spread(NamedTuple):
    """Microseconds a call."""

    us: float
    """median"""
    p10: float
    p90: float


def spread(times: Sequence[float]) -> Spread:
    p10, *_, p90 = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else (times[0],) * 2
    return Spread(statistics.median(times), p10, p90)


def cache_bytes(device: torch.device) -> int:
    """What the sets of inputs must exceed, so that every call finds the L2 cold; 0 on a CPU, whose caches stay warm."""
    if device.type != "cuda":
        return 0
    return CACHES * torch.cuda.get_device_properties(device).L2_cache_size


class Plain:
    """One contender on a CPU: its calls one by one."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._call, self.calls = calls[0], 1

    def replay(self) -> float:
        """Microseconds a call."""
        started = time.perf_counter()
        self._call()
        return (time.perf_counter() - started) * 1e6


class Graph:
    """One contender on a GPU: a graph of calls that go round the sets of inputs.

    Args:
        calls: one for each set; each has run before, so that nothing compiles any more.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = _enough(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(self.calls):
                calls[i % len(calls)]()
        self._last = 0.0
        """us of the last replay"""

    def replay(self) -> float:
        """Microseconds a call, once round."""
        if self._last < LAUNCH_SHOWS_US:
            self._graph.replay()
        self._last = _between_events(self._graph.replay)
        return self._last / self.calls


def _enough(calls: Sequence[Call]) -> int:
    """Calls in a graph, from how long one takes when launched alone."""
    some = calls[:3]
    one = _between_events(lambda: [call() for call in some]) / len(some)
    count = max(len(calls), min(MOST_CALLS, int(GRAPH_US / one) + 1))
    return count if one > GRAPH_US else max(count, LEAST_CALLS)


def _between_events(work: Call) -> float:
    """Microseconds that the GPU takes for what ``work`` launches."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3


def prepare(calls: Sequence[Call], device: torch.device) -> Plain | Graph:
    """A contender, ready to be timed."""
    return Graph(calls) if device.type == "cuda" else Plain(calls)


def in_turns(
    timers: dict[str, Plain | Graph], device: torch.device, announce: Callable[[str], None] = lambda name: None
) -> dict[str, Spread]:
    """Replay A, B, A, B, ... so that what changes in the machine meanwhile changes all alike. ``announce`` is told
    whose turn it is.
    """

    def round_of_all() -> dict[str, float]:
        times = {}
        for name, timer in timers.items():
            announce(name)
            times[name] = timer.replay()
        return times

    for _ in range(2 if device.type == "cuda" else 0):  # the first replay of a graph uploads it
        round_of_all()
    seconds = sum(us * timers[name].calls / 1e6 for name, us in round_of_all().items())
    count = max(LEAST_REPLAYS, min(REPLAYS, int(BUDGET_S[device.type] / max(seconds, 1e-9))))
    rounds = [round_of_all() for _ in range(count)]
    return {name: spread([times[name] for times in rounds]) for name in timers}


def host(call: Call) -> Spread:
    """What a call costs the host: many calls one after the other, the device keeping up."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return spread([seconds * 1e6 for seconds in timer.blocked_autorange(min_run_time=HOST_S).times])
