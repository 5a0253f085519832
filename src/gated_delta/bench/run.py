"""The parent: starts workers, outlives what kills or stops them, and turns what they say into rows."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from typing import Any

from gated_delta.bench.cases import Case
from gated_delta.bench.machine import Monitor
from gated_delta.bench.peers import OURS
from gated_delta.bench.records import Row, with_best_peer
from gated_delta.bench.worker import describe
from gated_delta.errors import GatedDeltaError

MOST_STRIKES = 2
"""How often the worker may end in a contender's hands, in one operation, before that is asked no more there."""
START_S = 90.0
"""Least time limit until a worker says its first word: it imports torch and finds the device."""

Event = dict[str, Any]


class BenchError(GatedDeltaError, RuntimeError):
    """The measuring process cannot even begin."""


class Process:
    """A worker: its plan goes in through a file, what happens comes out of a pipe, what it prints is kept apart."""

    def __init__(self, plan: Event, mode: str, **environment: str) -> None:
        self._printed = TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        with TemporaryFile("w+") as given:
            json.dump(plan, given)
            given.seek(0)
            self._out, theirs = os.pipe() if mode == "measure" else (-1, os.open(os.devnull, os.O_WRONLY))
            command = [sys.executable, "-c", "from gated_delta.bench.worker import main; main()", mode, str(theirs)]
            self._process = subprocess.Popen(
                command, stdin=given, stdout=self._printed, stderr=subprocess.STDOUT, pass_fds=(theirs,),
                start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            )  # fmt: skip
            os.close(theirs)
        self.hung = False

    def events(self, limit: float) -> Iterator[Event]:
        """What it says, until it ends or is silent for longer than ``limit`` seconds (and is ended)."""
        rest, heard, allowed = b"", time.monotonic(), max(limit, START_S)
        while True:
            ended = self.has_ended()  # its pipe may live on in a child of its own
            if select.select([self._out], [], [], 0 if ended else min(1.0, limit))[0]:
                read = os.read(self._out, 1 << 16)
                *lines, rest = (rest + read).split(b"\n")
                yield from (json.loads(line) for line in lines)
                heard, allowed = time.monotonic(), limit
                ended = not read
            if ended:
                return
            if time.monotonic() - heard > allowed:
                self.hung = True
                return

    def end(self, seconds: float = 5.0) -> int:
        """Its exit status, after so many seconds by force, with all processes that it started."""
        try:
            return self._process.wait(0 if self.hung else max(0.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def printed(self) -> str:
        """The end of what it printed, in one line."""
        self._printed.seek(0)
        return " ".join(self._printed.read()[-600:].split())

    def close(self) -> None:
        self.end(0)
        self._printed.close()
        if self._out >= 0:
            os.close(self._out)


@dataclass
class Bench:
    """One run.

    Args:
        device: "cpu" or "cuda".
        adapters: names that :func:`gated_delta.bench.peers.load` knows.
        cases: what to measure, in this order.
        facts: columns of every row: date, device, versions.
        limit: seconds that a step of a contender (to compile and be checked, to be timed once) may take.
        jobs: processes that compile ahead; 0 for none.
        advance: called when a case is done.
        tell: called with a line that the user should see.
    """

    device: str
    adapters: Sequence[str]
    cases: Sequence[Case]
    facts: dict[str, str]
    limit: float = 120.0
    jobs: int = 0
    advance: Callable[[], None] = lambda: None
    tell: Callable[[str], None] = lambda words: None
    _rows: dict[int, dict[str, Row]] = field(default_factory=dict)
    _machine: list[Row] = field(default_factory=list)
    _ceilings: list[float] | None = None
    _leave_out: set[tuple[int, str]] = field(default_factory=set)
    _strikes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def run(self) -> list[Row]:
        """All rows, those of the machine first.

        Raises:
            BenchError: the worker ends twice before it comes to a case.
        """
        if self.jobs:
            self._compile()
        waiting, false_starts, said = list(range(len(self.cases))), 0, ""
        with Monitor(self.device) as monitor:
            while waiting and false_starts < 2:
                process = Process(self._plan(waiting, self.adapters), "measure")
                try:
                    done, last = self._listen(process, monitor)
                    if len(done) < len(waiting):
                        words = f"{'did not answer' if process.hung else f'exit status {process.end()}'}"
                        done |= self._blame(process.hung, words, last, set(waiting) - done)
                    false_starts = 0 if done or last.get("case", -1) >= 0 else false_starts + 1
                    said = process.printed()
                finally:
                    process.close()
                waiting = [number for number in waiting if number not in done]
        if waiting:
            raise BenchError(f"bench: the measuring process cannot start: {said}")
        return self.rows()

    def rows(self) -> list[Row]:
        """What is known so far."""
        cases = (with_best_peer(list(self._rows.get(n, {}).values()), OURS) for n in range(len(self.cases)))
        return [replace(row, **self.facts) for row in (*self._machine, *(row for case in cases for row in case))]

    def _plan(self, numbers: Sequence[int], adapters: Sequence[str]) -> Event:
        return {
            "device": self.device, "adapters": list(adapters), "numbers": list(numbers),
            "cases": [self.cases[n].dump() for n in numbers], "ceilings": self._ceilings,
            "leave_out": sorted(self._leave_out),
        }  # fmt: skip

    def _compile(self) -> None:
        """Contenders compile for minutes, one kernel after the other: do it in many processes, each of which leaves
        its kernels in the disk caches of their compilers. What goes wrong here goes wrong again where it counts.
        """
        shares: dict[tuple[str, str, Any, int], list[int]] = {}
        for number, case in enumerate(self.cases):
            for adapter in self.adapters:
                shares.setdefault((adapter, case.operation, case.heads, case.tokens), []).append(number)
        plans = [self._plan(numbers, [adapter]) for (adapter, *_), numbers in shares.items()]
        self.tell(f"compiling ahead in {min(self.jobs, len(plans))} processes")
        running: list[Process] = []
        started = time.monotonic()
        deadline = started + 2 * self.limit
        try:
            for plan in plans:
                if len(running) == self.jobs:
                    running = _still_running(running, deadline)
                # What Triton's tuner finds while others use the GPU must not be kept.
                running.append(Process(plan, "compile", FLA_CACHE_RESULTS="0", TRITON_CACHE_AUTOTUNING="0"))
            while running:
                running = _still_running(running, deadline)
        finally:
            for process in running:  # the user has had enough
                process.close()
        self.tell(f"compiled in {time.monotonic() - started:.0f} s")

    def _listen(self, process: Process, monitor: Monitor) -> tuple[set[int], Event]:
        """The cases that a worker finishes, and what it began last."""
        done: set[int] = set()
        last: Event = {}
        for event in process.events(self.limit):
            kind = event["kind"]
            if kind == "begin":
                last = event
            elif kind == "row":
                self._keep(event["case"], **event["row"], **monitor.latest())
            elif kind == "ceilings":
                self._ceilings = event["values"]
                self._machine = [replace(Row(**row), **monitor.latest()) for row in event["rows"]]
            elif kind == "sick":
                self._leave_out.add((event["case"], last["contender"]))
            elif kind == "done":
                done.add(event["case"])
                self.advance()
        return done, last

    def _keep(self, number: int, **facts: Any) -> None:
        row = Row(**describe(self.cases[number]), **{name: x for name, x in facts.items() if name != "adapter"})
        self._rows.setdefault(number, {})[row.contender] = row

    def _blame(self, hung: bool, words: str, last: Event, waiting: set[int]) -> set[int]:
        """Whose hands a worker ended in: its row says so, the next worker leaves it out. Returns cases given up."""
        number, name = last.get("case", -1), last.get("contender", "")
        if number < 0:
            return set()
        note = f"{words} while: {last['stage']}"
        self.tell(f"{self.cases[number].name}: {name or 'the worker'} {'hung' if hung else 'ended'} ({note})")
        if not name:
            self._keep(number, contender=OURS, status="failed", note=note)
            self.advance()
            return {number}
        if last.get("asked"):  # it could not even say what it can do
            self.adapters = [adapter for adapter in self.adapters if adapter != name]
        if (number, name) in self._leave_out:  # a failure that took the device along, told before
            return set()
        self._keep(number, contender=name, status="hung" if hung else "crashed", note=note)
        self._leave_out.add((number, name))
        operation = self.cases[number].operation
        self._strikes[operation, name] += 1
        if self._strikes[operation, name] >= MOST_STRIKES:
            for other in sorted(waiting - {number}):
                if self.cases[other].operation == operation:
                    self._leave_out.add((other, name))
                    self._keep(other, contender=name, status="skipped", note=f"as in {self.cases[number].name}")
        return set()


def _still_running(processes: list[Process], deadline: float) -> list[Process]:
    """Those that still run when the next has ended; none of them once time's monotonic is ``deadline``."""
    while not any(process.has_ended() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [process for process in processes if not process.has_ended() and time.monotonic() < deadline]
    for process in processes:
        if process not in left:
            process.close()
    return left
