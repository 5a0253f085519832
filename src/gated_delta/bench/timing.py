"""Time per call: on a GPU CUDA graphs over rotating sets of inputs, on a CPU plain calls; contenders in turns."""

import time
import timeit
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]
Timer = Callable[[], float]
"""Runs the calls of one contender; gives the microseconds that one took."""

GRAPH_US = 1000.0
"""A graph lasts this long at least, or has :data:`MOST_CALLS`."""
LEAST_CALLS, MOST_CALLS = 10, 256
LAUNCH_SHOWS_US = 5000.0
"""A graph shorter than this follows upon another replay of itself, so that the host's part of its launch is hidden."""
REPLAYS, LEAST_REPLAYS = 21, 5
BUDGET_S = {"cuda": 0.6, "cpu": 0.5}
"""All replays of a case together; more than :data:`LEAST_REPLAYS` are made only within it."""
HOST_CALLS = 100
CACHES = 3
"""Times the L2 that rotating sets take."""


class Spread(NamedTuple):
    """Microseconds a call."""

    us: float
    """median"""
    p10: float
    p90: float


def spread(times: Sequence[float]) -> Spread:
    wanted = torch.tensor((0.5, 0.1, 0.9), dtype=torch.float64)
    return Spread(*torch.tensor(times, dtype=torch.float64).quantile(wanted).tolist())


def cache_bytes(device: torch.device) -> int:
    """What the sets of inputs must exceed, so that every call finds the L2 cold; 0 on a CPU, whose caches stay warm."""
    if device.type != "cuda":
        return 0
    return CACHES * torch.cuda.get_device_properties(device).L2_cache_size


def timer(sets: Sequence[Call], device: torch.device) -> Timer:
    """A timer of calls that go round the sets of inputs; each has run before, so nothing compiles any more."""
    if device.type == "cpu":
        return lambda: timeit.timeit(sets[0], number=1) * 1e6
    few = sets[:3]
    one = _between_events(lambda: [call() for call in few]) / len(few)
    calls = max(len(sets), min(MOST_CALLS, int(GRAPH_US / one) + 1), LEAST_CALLS if one <= GRAPH_US else 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            sets[i % len(sets)]()
    graph.replay()  # the first one uploads it
    us = _between_events(graph.replay)

    def replay() -> float:
        if us < LAUNCH_SHOWS_US:
            graph.replay()
        return _between_events(graph.replay) / calls

    return replay


def host(call: Call) -> Timer:
    """A timer of what a call costs the host: many calls one after the other, the device keeping up."""
    many = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return lambda: many.timeit(HOST_CALLS).mean * 1e6


def _between_events(work: Call) -> float:
    """Microseconds that the GPU takes for what ``work`` launches."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3


def in_turns(
    timers: dict[str, Timer], device: torch.device, announce: Callable[[str], None] = lambda name: None
) -> dict[str, Spread]:
    """Replay A, B, A, B: what changes in the machine changes all alike. ``announce`` is told whose turn it is."""

    def turn(name: str) -> float:
        announce(name)
        return timers[name]()

    started = time.monotonic()
    for name in timers:
        turn(name)
    rounds = int(BUDGET_S[device.type] / max(time.monotonic() - started, 1e-9))
    times = [[turn(name) for name in timers] for _ in range(max(LEAST_REPLAYS, min(REPLAYS, rounds)))]
    return {name: spread(own) for name, own in zip(timers, zip(*times, strict=True), strict=True)}
