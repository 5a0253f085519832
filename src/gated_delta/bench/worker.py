"""Measures cases in a process of its own, which a peer may end or hang: every step is announced first, and every result
goes to the parent at once, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from gated_delta.bench import check, floors, peers, timing
from gated_delta.bench.cases import MODELS, Case
from gated_delta.bench.inputs import Inputs, make_sets
from gated_delta.bench.records import CEILINGS, OK, Row

FAULTS = (Exception,)
"""What costs a contender its row; anything else ends the worker."""
MOST_COMPILED_TOKENS = 32768
"""Longer sequences need the same kernels, and many processes share the memory while they compile."""


class Worker:
    """Runs a plan of the parent's: adapters, cases, and for each case the contenders to leave out."""

    def __init__(self, plan: dict[str, Any], out: IO[str]) -> None:
        self.device = torch.device(plan["device"])
        self.adapters = [(name, peers.load(name)) for name in plan["adapters"]]
        self.versions = {name: peers.version_of(name) for name in plan["adapters"]}
        self.cases = [Case.load(case) for case in plan["cases"]]
        self.leave_out = {(number, name) for number, name in plan["leave_out"]}
        self.numbers: list[int] = plan["numbers"]
        self.ceilings = floors.Ceilings(*plan["ceilings"]) if plan["ceilings"] else None
        self._out = out

    def say(self, kind: str, **facts: Any) -> None:
        self._out.write(json.dumps({"kind": kind, **facts}) + "\n")
        self._out.flush()

    def measure(self) -> None:
        """Every case, after the ceilings of the machine where the parent does not know them yet."""
        if self.ceilings is None:
            self.say("begin", case=-1, contender="", stage="ceilings")
            self.ceilings, found = floors.measure(self.device)
            self.say("ceilings", values=list(self.ceilings), rows=[asdict(_machine_row(x)) for x in found])
        for number, case in zip(self.numbers, self.cases, strict=True):
            self._measure_case(number, case, self.ceilings)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def compile(self) -> None:
        """Run every contender of every case once, so that what it compiles is on disk."""
        for number, case in zip(self.numbers, self.cases, strict=True):
            if sum(case.lengths) > MOST_COMPILED_TOKENS:
                continue
            for _, contender in self._contenders(number, case):
                with contextlib.suppress(*FAULTS):
                    contender.bind(make_sets(case, self.device, 0)[0]).call()
                    _synchronize(self.device)

    def _contenders(self, number: int, case: Case) -> Iterator[tuple[str, peers.Contender]]:
        for name, adapter in self.adapters:
            self.say("begin", case=number, contender=name, stage="being asked what it can do", adapter=name, asked=True)
            for contender in adapter.contenders(case, self.device.type):
                if (number, contender.name) not in self.leave_out:
                    yield name, contender

    def _measure_case(self, number: int, case: Case, ceilings: floors.Ceilings) -> None:
        contenders = list(self._contenders(number, case))
        self.say("begin", case=number, contender="", stage="inputs and reference")
        try:
            sets = make_sets(case, self.device, 0 if case.group == "host" else timing.cache_bytes(self.device))
            truth = check.exact(case, sets[0])
        except FAULTS as error:
            self._fail(number, case, [(name, c.name) for name, c in contenders], error)
            self._say_done(number)
            return
        bound: dict[str, list[timing.Call]] = {}
        rows: dict[str, dict[str, Any]] = {}
        right: check.Results | None = None
        for name, contender in contenders:
            self.say("begin", case=number, contender=contender.name, adapter=name, stage="check")
            try:
                calls = [contender.bind(inputs) for inputs in sets]
                verdict, right = self._check(calls[0], sets[0], truth, right)
                if verdict.ok and case.group != "host":
                    for each in calls[1:]:
                        each.call()
                _synchronize(self.device)
            except FAULTS as error:
                self._fail(number, case, [(name, contender.name)], error)
                continue
            error = verdict.error if math.isfinite(verdict.error) else None
            facts = {"adapter": name, "error": error, "check": verdict.words, "sets": len(sets)}
            if verdict.ok:
                bound[contender.name], rows[contender.name] = [each.call for each in calls], facts
            else:
                self._say_row(number, case, contender.name, status="wrong", note=verdict.words, **facts)
        for name, found in self._time(number, case, bound, rows).items():
            self._say_row(number, case, name, **rows[name], **_rates(case, found, ceilings))
        self._say_done(number)

    def _check(
        self, bound: peers.Bound, inputs: Inputs, truth: check.Exact | None, right: check.Results | None
    ) -> tuple[check.Verdict, check.Results | None]:
        """Judge one call, with the states put back afterwards that it wrote in place."""
        saved = {name: inputs[name].clone() for name in ("state", "conv_states") if name in inputs}
        for name in ("output", "output_state", "snapshots"):
            if name in inputs:
                inputs[name].fill_(torch.nan)
        bound.call()
        results = bound.results()
        verdict = check.judge(truth, results, right)
        if verdict.ok and right is None:
            right = {name: x.clone() for name, x in results.items()}
        for name, state in saved.items():
            inputs[name].copy_(state)
        return verdict, right

    def _time(
        self, number: int, case: Case, bound: dict[str, list[timing.Call]], rows: dict[str, dict[str, Any]]
    ) -> dict[str, timing.Spread]:
        """Of those that can be timed; a failure is told at once."""
        found: dict[str, timing.Spread] = {}
        timers: dict[str, timing.Timer] = {}
        for name, calls in bound.items():
            adapter = rows[name]["adapter"]
            self.say("begin", case=number, contender=name, adapter=adapter, stage="preparing to time")
            try:
                if case.group == "host":
                    found[name] = timing.host(calls[0], self.device)
                else:
                    timers[name] = timing.Timer(calls, self.device)
                _synchronize(self.device)
            except FAULTS as error:
                self._fail(number, case, [(adapter, name)], error)
        if timers:
            found |= timing.in_turns(
                timers, self.device, lambda name: self.say("begin", case=number, contender=name, stage="timing")
            )
        return found

    def _fail(self, number: int, case: Case, contenders: Sequence[tuple[str, str]], error: BaseException) -> None:
        """Rows for an exception; a device that does not answer any more ends the worker (the parent starts another)."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(where.filename).name})"
        for adapter, name in contenders:
            self._say_row(number, case, name, adapter=adapter, status="failed", note=message)
        error.__traceback__ = None  # its frames hold tensors
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.ones(1, device=self.device).add_(1).item()
        except RuntimeError:
            self.say("sick", case=number)
            os._exit(3)

    def _say_row(self, number: int, case: Case, name: str, *, adapter: str, **facts: Any) -> None:
        self.say("row", case=number, row={"contender": name, "version": self.versions[adapter], **facts})

    def _say_done(self, number: int) -> None:
        self.say("done", case=number)


def describe(case: Case) -> dict[str, Any]:
    """The columns that a case gives to all its rows."""
    needed = floors.work(case) if case.group != "host" else None
    stateful = case.operation in ("prefill", "decode", "verify")
    return {
        "group": case.group,
        "case": case.name if case.group != "host" else f"{case.operation} {case.name}",
        "model": MODELS[case.heads].name if case.heads in MODELS else "", "heads": str(case.heads),
        "head_k": case.heads.k, "head_v": case.heads.v, "form": case.form, "size": case.size,
        "rows": len(case.lengths), "tokens": sum(case.lengths), "state": case.state if stateful else "",
        "gates": case.gates if stateful else "", "bytes": needed and needed.read + needed.written,
        "operations": needed and needed.operations,
    }  # fmt: skip


def _rates(case: Case, found: timing.Spread, ceilings: floors.Ceilings) -> dict[str, Any]:
    times = {"status": OK, "us": found.median, "p10": found.p10, "p90": found.p90, "replays": found.replays}
    times["calls"] = found.calls
    if case.group == "host":
        return times
    needed = floors.work(case)
    least = floors.floor(needed, ceilings)
    rates = {"floor_us": least, "over_floor": found.median / least}
    rates["tb_s"] = (needed.read + needed.written) / found.median / 1e6
    if needed.operations:
        rates["tflop_s"] = needed.operations / found.median / 1e6
    return times | rates


def _machine_row(measured: floors.Measured) -> Row:
    bandwidth = measured.name not in ("product", "smallest")
    return Row(
        CEILINGS, measured.name, "machine", us=measured.us, tb_s=measured.rate / 1e12 if bandwidth else None,
        tflop_s=measured.rate / 1e12 if measured.name == "product" else None,
    )  # fmt: skip


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Arguments: "measure" or "compile", and the file descriptor for what happens; the plan comes on standard input."""
    mode, out = sys.argv[1], os.fdopen(int(sys.argv[2]), "w")
    plan = json.load(sys.stdin)
    with torch.no_grad():
        worker = Worker(plan, out)
        worker.compile() if mode == "compile" else worker.measure()
