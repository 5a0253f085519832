"""A long run of random calls: every operator, shape and option mixed, each checked against float64, memory watched.

    python scripts/soak.py 2000

Ends with status 1 if a call is wrong or memory grows.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys

import torch
from rich.progress import track

from gated_delta.bench import peers
from gated_delta.bench.cases import GATES, PLAN, Case, Heads
from gated_delta.bench.inputs import make_sets
from gated_delta.bench.machine import pick_device

SETTLED = 0.2
"""Part of the calls after which memory should not grow: everything has been compiled and cached."""
ALLOWED_MIB = {"cuda": 16, "cpu": 512}
"""Growth that is no leak: on a GPU of what is allocated, on a CPU of the process, whose heap is fragmented."""
FORMS = {
    operation: [form for line in PLAN if line.group == operation for form in line.forms]
    for operation in ("prefill", "decode", "verify", "conv", "norm")
}


def random_case(choice: random.Random) -> Case:
    """Small enough that checking it takes milliseconds."""
    operation = choice.choice(list(FORMS))
    heads = choice.choice((Heads(2, 8), Heads(3, 3, 96, 192)))  # few, as a GPU compiles for each
    form, gates, state = choice.choice(FORMS[operation]), choice.choice(GATES), choice.choice(("fp32", "bf16"))
    if operation == "prefill" or form == "prefill":
        lengths = "+".join(str(choice.randint(1, 300)) for _ in range(choice.randint(1, 5)))
        return Case("soak", operation, heads, form, sequences=lengths, gates=gates)
    tokens = choice.choice((2, 5)) if operation == "verify" else 1
    return Case("soak", operation, heads, form, batch=choice.randint(1, 33), tokens=tokens, state=state, gates=gates)


@torch.no_grad()
def soak(calls: int, device: torch.device) -> bool:
    """Make ``calls`` random calls, the same every time, and judge each: whether all were right and memory did not
    grow. Prints what is wrong, and in the end what was found.
    """
    choice, settled, faults = random.Random(0), 0.0, 0
    for number in track(range(calls), "measuring"):
        if number == int(SETTLED * calls):
            settled = memory_mib(device)
        case = random_case(choice)
        fault = fault_of(case, device)
        if fault:
            faults += 1
            print(f"call {number}, {case.operation} {case.name} {case.gates}: {fault}")
    grown, allowed = memory_mib(device) - settled, ALLOWED_MIB[device.type]
    print(f"{calls} calls on {device}: {faults} wrong; memory grew by {grown:.1f} MiB (up to {allowed} are no leak)")
    return not faults and grown <= allowed


def fault_of(case: Case, device: torch.device) -> str:
    """What is wrong with one call, "" if nothing."""
    try:
        x = make_sets(case, device, 0)[0]
        truth, bound = peers.exact(case, x), peers.ours(case, x)
        bound.call()
        return peers.judge(truth, bound.results())[1]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def memory_mib(device: torch.device) -> float:
    """Allocated on the GPU, or the most that this process has had in memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", type=int)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    sys.exit(not soak(args.calls, torch.device(pick_device(args.device))))
