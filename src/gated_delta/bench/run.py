"""The parent: starts workers, outlives what kills or stops them, and keeps the rows that they make."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

from gated_delta.bench import worker
from gated_delta.bench.cases import Case
from gated_delta.bench.machine import clocks
from gated_delta.bench.peers import OURS
from gated_delta.bench.records import Row, row_of, with_best_peer
from gated_delta.bench.worker import MACHINE, Done, Plan, Step
from gated_delta.errors import GatedDeltaError

START_S = 90.0
"""Least time limit until a worker says its first word: it imports torch and finds the device."""


class BenchError(GatedDeltaError, RuntimeError):
    """The measuring process cannot even begin."""


class Process:
    """A worker in a process of its own."""

    def __init__(self, plan: Plan, *, ahead: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=worker.main, args=(plan, theirs, ahead))
        self._process.start()
        theirs.close()
        self.sentinel = self._process.sentinel
        self.hung = False

    def events(self, limit: float) -> Iterator[Step | Done]:
        """What it says, until it ends or is silent for longer than ``limit`` seconds."""
        allowed = max(limit, START_S)
        with contextlib.suppress(EOFError, OSError):  # it has ended, perhaps amid a word
            while self._pipe.poll(allowed):
                yield self._pipe.recv()
                allowed = limit
            self.hung = self._process.is_alive()  # its pipe may live on in a process that it started

    def end(self, seconds: float = 5.0) -> str:
        """End it, after so many seconds by force, with all processes that it started; says how it ended."""
        self._process.join(0 if self.hung else seconds)
        self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        self._pipe.close()
        return "did not answer" if self.hung else f"exit status {self._process.exitcode}"


@dataclass
class Bench:
    """One run.

    Args:
        device: "cpu" or "cuda".
        peers: the contenders, of :data:`gated_delta.bench.peers.PEERS`.
        cases: what to measure, in this order.
        facts: columns of every row: date, device, versions.
        limit: seconds that a step of a contender (to compile and be checked, to be timed once) may take.
        jobs: processes that compile ahead; 0 for none.
        advance: called when a case is done.
        tell: called with a line that the user should see.
    """

    device: str
    peers: Sequence[str]
    cases: Sequence[Case]
    facts: dict[str, str]
    limit: float = 120.0
    jobs: int = 0
    advance: Callable[[], None] = lambda: None
    tell: Callable[[str], None] = lambda words: None
    _rows: dict[int, list[Row]] = field(default_factory=dict)
    """Of each case that is done."""
    _ended: dict[int, list[Row]] = field(default_factory=dict)
    """Of contenders in whose hands a worker ended, by the number of the case."""
    _left_out: set[tuple[str, str]] = field(default_factory=set)

    def run(self) -> list[Row]:
        """All rows, those of the machine first.

        Raises:
            BenchError: a worker ends before it comes to a case.
        """
        if self.jobs:
            self._compile()
        with clocks(self.device) as now:
            while waiting := [number for number in range(len(self.cases)) if number not in self._rows]:
                self._measure(waiting, now)
        return self.rows()

    def rows(self) -> list[Row]:
        """What is known so far."""
        found = [row for number in sorted(self._rows) for row in with_best_peer(self._rows[number])]
        return [replace(row, **self.facts) for row in found]

    def _plan(self, numbers: Sequence[int], peers: Sequence[str]) -> Plan:
        cases = {number: self.cases[number] for number in numbers}
        return Plan(self.device, list(peers), cases, self._rows.get(MACHINE, []), self._left_out)

    def _measure(self, waiting: Sequence[int], now: Callable[[], dict[str, Any]]) -> None:
        """Let one worker go on as far as it comes."""
        process, last = Process(self._plan(waiting, self.peers)), Step(MACHINE, "", "starting")
        try:
            for event in process.events(self.limit):
                if isinstance(event, Step):
                    last = event
                else:
                    clock = now()
                    self._keep(event.number, [replace(row, **clock) if row.us else row for row in event.rows])
        finally:
            how = process.end()
        if any(number not in self._rows for number in waiting):
            self._blame(last, "hung" if process.hung else "crashed", f"{how} while: {last.what}")

    def _keep(self, number: int, rows: list[Row]) -> None:
        """The rows of a case that is done."""
        self._rows[number] = [*rows, *self._ended.get(number, [])]
        if number != MACHINE:
            self.advance()

    def _blame(self, last: Step, status: str, note: str) -> None:
        """The row of whom a worker ended with; the next one leaves that contender out of the whole operation."""
        if last.number == MACHINE:
            raise BenchError(f"bench: the measuring process cannot begin ({note})")
        case, name = self.cases[last.number], last.contender
        self.tell(f"{case.name}: {name or 'the worker'} {status} ({note})")
        if not name:
            self._keep(last.number, [row_of(case, OURS, status="failed", note=note)])
            return
        self._left_out.add((case.operation, name))
        row = row_of(case, name, status=status, note=f"{note}; left out of {case.operation} from here on")
        self._ended.setdefault(last.number, []).append(row)

    def _compile(self) -> None:
        """Contenders compile for minutes, one kernel after the other: do it in many processes, each of which leaves
        its kernels in the disk caches of their compilers. What goes wrong here goes wrong again where it counts.
        """
        shares: dict[tuple[Any, ...], list[int]] = {}
        for number, case in enumerate(self.cases):
            for peer in self.peers:
                shares.setdefault((peer, case.operation, case.heads, case.tokens), []).append(number)
        plans = [self._plan(numbers, [peer]) for (peer, *_), numbers in shares.items()]
        self.tell(f"compiling ahead in {min(self.jobs, len(plans))} processes")
        running: dict[Any, Process] = {}
        started = time.monotonic()
        left = 2 * self.limit
        try:
            while (plans or running) and left > 0:
                while plans and len(running) < self.jobs:
                    process = Process(plans.pop(0), ahead=True)
                    running[process.sentinel] = process
                for sentinel in wait(list(running), left):
                    running.pop(sentinel).end()
                left = started + 2 * self.limit - time.monotonic()
        finally:
            for process in running.values():  # out of time, or the user has had enough
                process.end(0)
        self.tell(f"compiled in {time.monotonic() - started:.0f} s")
