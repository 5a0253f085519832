"""What the hardware allows: ceilings measured in the same run, and the bytes and operations that a case needs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from gated_delta.bench.cases import MODELS, STATES, Case
from gated_delta.bench.timing import Call, Timer, cache_bytes, in_turns

CHUNK = 64
"""Tokens a chunk in the count of a prefill's operations."""
IN_PLACE_MIB = (2, 8, 32, 128, 512, 1024)
LARGE = 512
"""MiB of the tensors whose bandwidth is the ceiling."""


class Ceilings(NamedTuple):
    """Bytes a second, operations a second, microseconds."""

    read: float
    write: float
    in_place: float
    """Bytes read and written together."""
    product: float
    """Of a bf16 matrix product on a GPU, an fp32 one on a CPU."""
    smallest: float
    """The shortest kernel in a graph, the shortest operation on a CPU."""


class Measured(NamedTuple):
    """One measurement of the machine."""

    name: str
    us: float
    rate: float
    """Bytes or operations a second."""


class Work(NamedTuple):
    """The least that a case has to do, whoever does it."""

    read: int
    written: int
    """bytes"""
    operations: int
    """of matrix products, a multiplication and an addition each counted"""


def measure(device: torch.device) -> tuple[Ceilings, list[Measured]]:
    """Bandwidth and arithmetic of the machine as it is now; on a GPU this is the warm-up, too."""
    found = list(_measure(device))
    rates: dict[str, float] = {}
    for row in found:
        rates[row.name] = max(rates.get(row.name, 0.0), row.rate)
    large = f"in-place {LARGE if device.type == 'cuda' else 32} MiB"
    smallest = next(row.us for row in found if row.name == "smallest")
    return Ceilings(rates["read"], rates["write"], rates[large], rates["product"], smallest), found


def _measure(device: torch.device) -> Iterator[Measured]:
    gpu = device.type == "cuda"
    size = 4096 * 2 if gpu else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    product = torch.empty_like(a)
    multiply = partial(torch.mm, a, b, out=product)
    for _ in range(500 * gpu):  # a second, which brings the clocks up
        multiply()
    us = _time([multiply], device)
    yield Measured("product", us, 2 * size**3 / us * 1e6)
    one = torch.randn(1, device=device)
    yield Measured("smallest", _time([partial(one.mul_, 1.0)], device), 0.0)
    for mib in IN_PLACE_MIB if gpu else (2, 32):
        sets = -(-cache_bytes(device) // (mib << 20)) + 1
        tensors = [torch.randn(mib << 18, device=device) for _ in range(min(64, sets))]
        us = _time([partial(x.mul_, 1.0001) for x in tensors], device)
        yield Measured(f"in-place {mib} MiB", us, 2 * (mib << 20) / us * 1e6)
    x = torch.randn((LARGE if gpu else 32) << 18, device=device)
    us = _time([partial(x.fill_, 1.5)], device)
    yield Measured("write", us, x.nbytes / us * 1e6)
    x.normal_()
    for read in _reads(x):
        us = _time([read], device)
        yield Measured("read", us, x.nbytes / us * 1e6)


def _reads(x: torch.Tensor) -> list[Call]:
    """Ways to read a tensor and write next to nothing; the fastest counts."""
    rows = x.view(-1, 8192)
    sums, vector = rows.new_empty(len(rows)), rows.new_ones(8192)
    calls: list[Call] = [partial(torch.sum, rows, 1, out=sums), partial(torch.mv, rows, vector, out=sums)]
    if x.is_cuda:
        from gated_delta.bench.reading import read_all  # noqa: PLC0415

        calls.append(partial(read_all, x, sums))
    return calls


def _time(calls: list[Call], device: torch.device) -> float:
    for call in calls:
        call()
    return in_turns({"": Timer(calls, device)}, device)[""].median


def work(case: Case) -> Work:
    """Bytes that have to come from memory and go there, and operations that can run on tensor cores.

    Inputs and states are read once, results written once; a chunk of a prefill needs the products of the dense
    algorithm for 64 tokens (docs/bench.md has the count).
    """
    (h, hv, k, v), tokens, rows = case.heads, sum(case.lengths), len(case.lengths)
    state = hv * k * v
    if case.operation == "prefill":
        states = rows * state * 4
        read = tokens * (2 * h * k + hv * v) * 2 + 2 * tokens * hv * 4 + states
        return Work(read, tokens * hv * v * 2 + states, _prefill_operations(case))
    if case.operation in ("decode", "verify"):
        states = rows * state * STATES[case.state].itemsize
        copies = {"outputs": 0, "snapshots": case.tokens, "slots": case.tokens}.get(case.form, 1)
        read = tokens * (2 * h * k + hv * v + 2 * hv) * 2 + states
        return Work(read, tokens * hv * v * 2 + copies * states, 0)
    if case.operation == "conv":
        inputs, states = tokens * case.heads.conv_dim * 2, rows * case.heads.conv_dim * 3 * 2
        return Work(inputs + states, inputs + states, 0)
    if case.operation == "norm":
        return Work(2 * tokens * hv * v * 2, tokens * hv * v * 2, 0)
    hidden = MODELS[case.heads].hidden if case.heads in MODELS else 256
    weights = hidden * (case.heads.conv_dim + 2 * hv * v + 2 * hv)
    states = rows * (state * 4 + case.heads.conv_dim * 3 * 2)
    operations = 2 * tokens * weights + (_prefill_operations(case) if case.form == "prefill" else 0)
    return Work(weights * 2 + tokens * hidden * 2 + states, tokens * hidden * 2 + states, operations)


def _prefill_operations(case: Case) -> int:
    """A chunk and value head: K K^T and Q K^T, the inverse, three products with the state, two with values."""
    c, k, v = CHUNK, case.heads.k, case.heads.v
    chunk = 2 * (2 * c * c * k) + c**3 // 3 + 3 * (2 * c * k * v) + 2 * (2 * c * c * v)
    return chunk * case.heads.hv * sum(-(-length // c) for length in case.lengths)


def floor(needed: Work, ceilings: Ceilings) -> float:
    """Microseconds below which nobody gets: the largest of the smallest kernel, the products, and the traffic, of
    which as much as is both read and written runs at the in-place bandwidth.
    """
    both = min(needed.read, needed.written)
    traffic = (
        2 * both / ceilings.in_place + (needed.read - both) / ceilings.read + (needed.written - both) / ceilings.write
    )
    return max(ceilings.smallest, needed.operations / ceilings.product * 1e6, traffic * 1e6)
