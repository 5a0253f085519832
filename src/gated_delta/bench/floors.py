"""What the hardware allows: ceilings measured in the same run, and the bytes and operations that a case needs."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from gated_delta.bench.cases import MODELS, NO_MODEL, STATES, Case
from gated_delta.bench.records import CEILINGS, Row
from gated_delta.bench.timing import Call, in_turns, timer

CHUNK = 64
"""Tokens a chunk in the count of a prefill's operations."""
LARGE_MIB = {"cuda": 512, "cpu": 32}
"""Of the tensor whose bandwidth is the ceiling."""

Ceilings = dict[str, float]
"""What the machine reaches, by what it does: TB/s to "read", "write" and change "in-place" (bytes read and written
together), TFLOP/s of a "product" (bf16 on a GPU, fp32 on a CPU), us of the "smallest" kernel in a graph."""


class Work(NamedTuple):
    """The least that a case has to do, whoever does it."""

    read: int
    written: int
    """bytes"""
    operations: int
    """of matrix products, a multiplication and an addition each counted"""


def measure(device: torch.device) -> Iterator[Row]:
    """Bandwidth and arithmetic of the machine as it is now; on a GPU this is the warm-up, too."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
    for _ in range(500 * gpu):  # a second, which brings the clocks up
        multiply()
    us = _time([multiply], device)
    yield Row(CEILINGS, "product", "machine", us=us, tflop_s=2 * size**3 / us / 1e6)
    one = torch.randn(1, device=device)
    yield Row(CEILINGS, "smallest", "machine", us=_time([partial(one.mul_, 1.0)], device))
    x = torch.randn(LARGE_MIB[device.type] << 18, device=device)
    sums = x.new_empty(x.numel() // 8192)
    read: Call = partial(torch.sum, x.view(-1, 8192), 1, out=sums)
    if gpu:
        from gated_delta.bench.reading import read_all  # noqa: PLC0415

        read = partial(read_all, x, sums)
    turns = [partial(y.mul_, 1.0001) for y in (x, x.clone())]  # the end of one pass must not help the next
    for name, calls in {"read": [read], "in-place": turns, "write": [partial(x.fill_, 1.5)]}.items():
        us, moved = _time(calls, device), x.nbytes * (2 if name == "in-place" else 1)
        yield Row(CEILINGS, name, "machine", us=us, tb_s=moved / us / 1e6)


def _time(calls: Sequence[Call], device: torch.device) -> float:
    for call in calls:
        call()
    return in_turns({"": timer(calls, device)}, device)[""].us


def ceilings(rows: Iterable[Row]) -> Ceilings:
    """What :func:`measure` found."""
    return {row.case: row.tflop_s or row.tb_s or row.us or 0.0 for row in rows}


def work(case: Case) -> Work:
    """Bytes that have to come from memory and go there, and operations that can run on tensor cores.

    Inputs and states are read once, results written once; a chunk of a prefill needs the products of the dense
    algorithm for 64 tokens (docs/bench.md has the count).
    """
    (_, hv, k, v), tokens, rows, channels = case.heads, sum(case.lengths), len(case.lengths), case.heads.conv_dim
    qkv, values, gates = tokens * channels * 2, tokens * hv * v * 2, tokens * hv * 2 * 2
    states = rows * hv * k * v * STATES.get(case.state, torch.float32).itemsize
    windows, copies = rows * channels * 3 * 2, {"outputs": 0, "snapshots": case.tokens, "slots": case.tokens}
    kept = states + windows
    _, hidden = MODELS.get(case.heads, NO_MODEL)
    weights, both = hidden * (channels + 2 * hv * v + 2 * hv), tokens * hidden * 2 + kept
    read, written, products = {
        "prefill": (qkv + 2 * gates + states, values + states, 0),  # whose gates are fp32
        "decode": (qkv + gates + states, values + states, 0),
        "verify": (qkv + gates + states, values + copies.get(case.form, 1) * states, 0),
        "step": (qkv + values + gates + kept, values + kept, 0),
        "conv": (qkv + windows, qkv + windows, 0),
        "norm": (2 * values, values, 0),
        "layer": (weights * 2 + both, both, 2 * tokens * weights),
    }["step" if case.form.endswith(" core") else case.operation]
    if case.operation == "prefill" or (case.operation == "layer" and case.form.startswith("prefill")):
        # K K^T and Q K^T, the inverse, three products with the state, two with values: of a chunk and value head.
        c = CHUNK
        chunk = 2 * (2 * c * c * k) + c**3 // 3 + 3 * (2 * c * k * v) + 2 * (2 * c * c * v)
        products += chunk * hv * sum(-(-length // c) for length in case.lengths)
    return Work(read, written, products)


def floor(needed: Work, most: Ceilings) -> float:
    """Microseconds below which nobody gets: the largest of the smallest kernel, the products, and the traffic, of
    which as much as is both read and written runs at the in-place bandwidth.
    """
    both = min(needed.read, needed.written)
    reading, writing = (needed.read - both) / most["read"], (needed.written - both) / most["write"]
    traffic = 2 * both / most["in-place"] + reading + writing
    return max(most["smallest"], needed.operations / most["product"] / 1e6, traffic / 1e6)


def rates(case: Case, us: float, most: Ceilings) -> dict[str, float]:
    """Columns that relate a time to the hardware."""
    needed = work(case)
    moved, least = needed.read + needed.written, floor(needed, most)
    found = {"bytes": moved, "floor_us": least, "over_floor": us / least, "tb_s": moved / us / 1e6}
    arithmetic = {"operations": needed.operations, "tflop_s": needed.operations / us / 1e6}
    return found | (arithmetic if needed.operations else {})
