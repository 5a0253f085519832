"""Measures cases in a process of its own, which a peer may end or hang: every step is told to the parent first."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from gated_delta.bench import check, floors, peers, timing
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs, make_sets
from gated_delta.bench.records import Row, row_of

MACHINE = -1
"""Stands for the number of a case where the machine itself is measured."""
MOST_COMPILED_TOKENS = 32768
"""Longer sequences need the same kernels, and many processes share the memory while they compile."""


class Plan(NamedTuple):
    """What a worker is to do."""

    device: str
    peers: list[str]
    cases: dict[int, Case]
    machine: list[Row]
    """the ceilings, if they have been measured"""
    left_out: set[tuple[str, str]]
    """operations, and contenders that do not do them"""


class Step(NamedTuple):
    """What a worker does from now on."""

    number: int
    """of the case"""
    contender: str
    """"" for what is nobody's"""
    what: str


class Done(NamedTuple):
    """What became of a case."""

    number: int
    rows: list[Row]


class Worker:
    """Measures the cases of a plan, and tells its parent through a pipe."""

    def __init__(self, plan: Plan, pipe: Connection) -> None:
        self.plan, self._pipe, self.device = plan, pipe, torch.device(plan.device)
        self._number = MACHINE
        self._rows: dict[str, Row] = {}
        """Of the case that is being measured."""

    def measure(self) -> None:
        """Every case, after the ceilings of the machine where they are not known yet."""
        machine = self.plan.machine
        if not machine:
            self._pipe.send(Step(MACHINE, "", "measuring the machine"))
            machine = list(floors.measure(self.device))
            self._pipe.send(Done(MACHINE, machine))
        ceilings = floors.ceilings(machine)
        for number, case in self.plan.cases.items():
            self._number, self._rows = number, {}
            for name, times in self._time(case, self._ready(case)).items():
                rates = floors.rates(case, times.us, ceilings) if case.group != "host" else {}
                self._rows[name] = replace(self._rows[name], **times._asdict(), **rates)
            self._pipe.send(Done(self._number, list(self._rows.values())))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def compile(self) -> None:
        """Run every contender of every case once, so that what it compiles is on disk."""
        for case in self.plan.cases.values():
            for name in self.plan.peers if sum(case.lengths) <= MOST_COMPILED_TOKENS else ():
                with contextlib.suppress(Exception):
                    bound = peers.bind(name, case, make_sets(case, self.device, 0)[0])
                    if bound is not None:
                        bound.call()
                        self._synchronize()

    def _ready(self, case: Case) -> dict[str, list[timing.Call]]:
        """The calls of the contenders that are right, one for each set of inputs; rows for all that can do the case."""
        ready: dict[str, list[timing.Call]] = {}
        sets, truth, right = [], check.Exact({}), None
        with self._step(case, "", "making inputs and reference"):
            sets = make_sets(case, self.device, 0 if case.group == "host" else timing.cache_bytes(self.device))
            truth = check.exact(case, sets[0])
        for name in self.plan.peers if sets else ():
            if (case.operation, name) in self.plan.left_out:
                continue
            with self._step(case, name, "check"):
                bounds = [bound for x in sets if (bound := peers.bind(name, case, x)) is not None]
                if not bounds:
                    continue
                verdict, right = _check(bounds[0], sets[0], truth, right)
                facts = {"error": verdict.error, "note": verdict.fault, "version": peers.version_of(name)}
                status = "wrong" if verdict.fault else "ok"
                self._rows[name] = row_of(case, name, status=status, sets=len(sets), **facts)
                if not verdict.fault:
                    for bound in bounds[1:]:
                        bound.call()
                    self._synchronize()
                    ready[name] = [bound.call for bound in bounds]
        return ready

    def _time(self, case: Case, ready: dict[str, list[timing.Call]]) -> dict[str, timing.Spread]:
        found: dict[str, timing.Spread] = {}
        timers = {}
        for name, calls in ready.items():
            with self._step(case, name, "preparing to time"):
                if case.group == "host":
                    found[name] = timing.host(calls[0])
                else:
                    timers[name] = timing.prepare(calls, self.device)
                self._synchronize()
        if timers:
            found = timing.in_turns(
                timers, self.device, lambda name: self._pipe.send(Step(self._number, name, "timing"))
            )
        return found

    @contextlib.contextmanager
    def _step(self, case: Case, name: str, what: str) -> Iterator[None]:
        """Tell what happens now; an exception becomes the row of the contender ``name`` (of ours for what is nobody's).
        If it took the device along, the worker ends, and the parent starts another.
        """
        self._pipe.send(Step(self._number, name, what))
        try:
            yield
        except Exception as error:
            where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name
            note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})"
            error.__traceback__ = None  # its frames hold tensors
            try:
                self._synchronize()
                torch.ones(1, device=self.device).add_(1).item()
            except RuntimeError:
                self._pipe.send(Step(self._number, name, note))
                os._exit(3)
            who = name or peers.OURS
            self._rows[who] = row_of(case, who, status="failed", note=note, version=peers.version_of(who))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _check(
    bound: peers.Bound, x: Inputs, truth: check.Exact, right: check.Results | None
) -> tuple[check.Verdict, check.Results | None]:
    """Judge one call, with the states put back afterwards that it wrote in place; the second is what a right one
    wrote.
    """
    saved = {name: x[name].clone() for name in ("state", "conv_states") if name in x}
    for name in {"output", "output_state", "snapshots"} & x.keys():
        x[name].fill_(torch.nan)
    bound.call()
    results = bound.results()
    verdict = check.judge(truth, results, right)
    if not verdict.fault and right is None:
        right = {name: y.clone() for name, y in results.items()}
    for name, state in saved.items():
        x[name].copy_(state)
    return verdict, right


def main(plan: Plan, pipe: Connection, ahead: bool) -> None:
    """What a process runs: measure a plan, or compile what it needs ahead, with all that is printed thrown away."""
    os.setsid()  # the parent can end it with all processes that it starts
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    if ahead:  # what Triton's tuner finds while others use the GPU must not be kept
        os.environ |= {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}
    with torch.no_grad():
        worker = Worker(plan, pipe)
        worker.compile() if ahead else worker.measure()
