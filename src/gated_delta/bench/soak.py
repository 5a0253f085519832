"""A long run of random calls: every operator, shape and option mixed, each checked, memory watched."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gated_delta.bench import check
from gated_delta.bench.cases import FORMS, GATES, Case, Heads
from gated_delta.bench.inputs import make_sets
from gated_delta.bench.peers import ours

SETTLED = 0.2
"""Part of the calls after which memory should not grow: everything has been compiled and cached."""
ALLOWED_MIB = {"cuda": 16, "cpu": 256}
"""Growth that is no leak: on a GPU of what is allocated, on a CPU of the process, whose heap is fragmented."""


@dataclass
class Soaked:
    """What a run found."""

    calls: int
    device: str
    faults: list[str] = field(default_factory=list)
    grown_mib: float = 0.0

    @property
    def leaks(self) -> bool:
        return self.grown_mib > ALLOWED_MIB[self.device]

    def words(self) -> str:
        wrong = "".join(f"\\n  {fault}" for fault in self.faults[:20])
        memory = f"memory grew by {self.grown_mib:.1f} MiB (up to {ALLOWED_MIB[self.device]} are no leak)"
        return f"{self.calls} calls on {self.device}: {len(self.faults)} wrong; {memory}{wrong}"


def random_case(choice: random.Random) -> Case:
    """Small enough that checking it takes milliseconds."""
    operation = choice.choice(("prefill", "decode", "verify", "conv", "norm"))
    heads = choice.choice((Heads(2, 8), Heads(3, 3, 96, 192)))  # few, as a GPU compiles for each
    form, gates, state = choice.choice(FORMS[operation]), choice.choice(GATES), choice.choice(("fp32", "bf16"))
    if operation == "prefill" or form == "prefill":
        lengths = "+".join(str(choice.randint(1, 300)) for _ in range(choice.randint(1, 5)))
        return Case("soak", operation, heads, form, sequences=lengths, gates=gates)
    tokens = choice.choice((2, 5)) if operation == "verify" else 1
    return Case("soak", operation, heads, form, batch=choice.randint(1, 33), tokens=tokens, state=state, gates=gates)


@torch.no_grad()
def soak(
    calls: int,
    device: torch.device,
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda words: None,
) -> Soaked:
    """Make ``calls`` random calls and judge each; the same seed makes the same calls."""
    choice, found, settled = random.Random(seed), Soaked(calls, device.type), 0.0
    for number in range(calls):
        if number == int(SETTLED * calls):
            settled = memory_mib(device)
        case = random_case(choice)
        fault = _one(case, device)
        if fault:
            found.faults.append(f"call {number}, {case.operation} {case.name} {case.gates}: {fault}")
            tell(found.faults[-1])
        advance()
    found.grown_mib = memory_mib(device) - settled
    return found


def _one(case: Case, device: torch.device) -> str:
    """What is wrong with one call, "" if nothing."""
    try:
        inputs = make_sets(case, device, 0)[0]
        truth = check.exact(case, inputs)
        bound = ours.contenders(case, device.type)[0].bind(inputs)
        bound.call()
        verdict = check.judge(truth, bound.results(), None)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "" if verdict.ok else verdict.words


def memory_mib(device: torch.device) -> float:
    """Allocated on the GPU, or the most that this process has had in memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
