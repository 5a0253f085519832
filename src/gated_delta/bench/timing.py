"""Time per call: on a GPU CUDA graphs over rotating sets of inputs, on a CPU plain calls; contenders in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]

GRAPH_US = 1000.0
"""A graph lasts this long at least, or has :data:`MOST_CALLS`."""
LEAST_CALLS, MOST_CALLS = 10, 256
LAUNCH_SHOWS_US = 5000.0
"""A graph shorter than this follows upon another replay of itself, so that the host's part of its launch is hidden."""
REPLAYS, LEAST_REPLAYS = 21, 5
BUDGET_S = {"cuda": 0.6, "cpu": 0.5}
"""All replays of a case together; more than :data:`LEAST_REPLAYS` are made only within it."""
CACHES = 3
"""Times the L2 that rotating sets take."""


class Spread(NamedTuple):
    """Microseconds a call."""

    median: float
    p10: float
    p90: float
    replays: int
    calls: int
    """Calls a replay."""


def cache_bytes(device: torch.device) -> int:
    """What the sets of inputs must exceed, so that every call finds the L2 cold; 0 on a CPU, whose caches stay warm."""
    if device.type != "cuda":
        return 0
    return CACHES * torch.cuda.get_device_properties(device).L2_cache_size


class Timer:
    """One contender, ready to be timed: its calls go round the sets of inputs.

    Args:
        calls: one for each set; each has run before, so that nothing compiles any more.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls, self._device = calls, device
        self.calls = len(calls) if device.type == "cpu" else self._enough(calls)
        self._graph = None if device.type == "cpu" else self._capture()
        self._last = 0.0
        """us of the last replay"""

    def _enough(self, calls: Sequence[Call]) -> int:
        """Calls in a graph, from how long one takes when launched alone."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for call in calls[:3]:
            call()
        last.record()
        torch.cuda.synchronize()
        one = first.elapsed_time(last) * 1e3 / len(calls[:3])
        count = max(len(calls), min(MOST_CALLS, int(GRAPH_US / one) + 1))
        return count if one > GRAPH_US else max(count, LEAST_CALLS)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(self.calls):
                self._calls[i % len(self._calls)]()
        return graph

    def replay(self) -> float:
        """Microseconds a call, once round."""
        if self._graph is None:
            started = time.perf_counter()
            for call in self._calls:
                call()
            return (time.perf_counter() - started) * 1e6 / self.calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._last < LAUNCH_SHOWS_US:
            self._graph.replay()
        first.record()
        self._graph.replay()
        last.record()
        last.synchronize()
        self._last = first.elapsed_time(last) * 1e3
        return self._last / self.calls


def in_turns(
    timers: dict[str, Timer], device: torch.device, announce: Callable[[str], None] = lambda name: None
) -> dict[str, Spread]:
    """Replay A, B, A, B, ... so that what changes in the machine meanwhile changes all alike. ``announce`` is told
    whose turn it is.
    """
    found: dict[str, list[float]] = {name: [] for name in timers}

    def round_of_all() -> float:
        total = 0.0
        for name, timer in timers.items():
            announce(name)
            found[name].append(timer.replay())
            total += found[name][-1] * timer.calls / 1e6
        return total

    seconds = round_of_all()
    if device.type == "cuda":
        seconds = min(round_of_all() for _ in range(2))  # the first of a graph uploads it
    for times in found.values():
        times.clear()
    rounds = max(LEAST_REPLAYS, min(REPLAYS, int(BUDGET_S[device.type] / max(seconds, 1e-9))))
    for _ in range(rounds):
        round_of_all()
    return {name: spread(times, timers[name].calls) for name, times in found.items()}


def spread(times: Sequence[float], calls: int) -> Spread:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(times), calls)


def host(call: Call, device: torch.device) -> Spread:
    """What a call costs the host, in microseconds: many calls one after the other, the device keeping up."""
    rounds, calls = [], 1
    call()
    while True:  # as many calls as take 20 ms
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - started
        if seconds > 0.02 or calls >= 2000:
            break
        calls = min(2000, 1 + int(calls * 0.03 / max(seconds, 1e-6)))
    for _ in range(9):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - started) / calls * 1e6)
    _synchronize(device)
    return spread(rounds, calls)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
