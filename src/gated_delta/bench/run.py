"""Measuring in a process of its own, the worker, which a peer may end or hang: it tells its parent every step before it
takes it. The parent starts workers, outlives what kills or stops them, and keeps the rows that they send.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gated_delta.bench import check, floors, peers, timing
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import make_sets
from gated_delta.bench.machine import clocks
from gated_delta.bench.records import Row, row_of, with_best_peer
from gated_delta.errors import GatedDeltaError

MOST_COMPILED_TOKENS = 32768
"""Longer sequences need the same kernels, and many processes share the memory while they compile."""
START_S = 90.0
"""Least time limit until a worker says its first word: it imports torch and finds the device."""


class Step(NamedTuple):
    """What a worker does from now on. After the steps of a case it sends the rows."""

    case: Case | None
    """None: it measures the machine itself"""
    contender: str
    """"" for what is nobody's"""
    what: str


@dataclass
class Worker:
    """What is to be measured, and the means to do it. ``machine``: the ceilings, once they have been measured;
    ``left_out``: operations, and contenders that do not do them.
    """

    device: str
    peers: list[str]
    cases: list[Case]
    machine: list[Row]
    left_out: set[tuple[str, str]]
    pipe: Connection = field(init=False)
    _case: Case | None = None
    _rows: dict[str, Row] = field(default_factory=dict)
    """Of ``_case``, which is being measured."""

    def measure(self) -> None:
        """Every case, after the ceilings of the machine where they are not known yet."""
        if not self.machine:
            self._say("", "measuring the machine")
            self.machine = list(floors.measure(torch.device(self.device)))
            self.pipe.send(self.machine)
        ceilings = floors.ceilings(self.machine)
        for case in self.cases:
            self._case, self._rows = case, {}
            for name, times in self._time(case, self._ready(case)).items():
                rates = floors.rates(case, times.us, ceilings) if case.group != "host" else {}
                self._rows[name] = replace(self._rows[name], **times._asdict(), **rates)
            self.pipe.send(list(self._rows.values()))
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def compile(self) -> None:
        """Run every contender of every case once, so that what it compiles is on disk."""
        for case in self.cases:
            for name in self.peers if sum(case.lengths) <= MOST_COMPILED_TOKENS else ():
                with contextlib.suppress(Exception):
                    bound = peers.bind(name, case, make_sets(case, torch.device(self.device), 0)[0])
                    if bound is not None:
                        bound.call()
                        self._synchronize()

    def _ready(self, case: Case) -> dict[str, list[timing.Call]]:
        """The calls of the contenders that are right, one for each set of inputs; rows for all that can do the case."""
        ready: dict[str, list[timing.Call]] = {}
        sets, truth, device = [], {}, torch.device(self.device)
        with self._step(case, "", "making inputs and reference"):
            sets = make_sets(case, device, 0 if case.group == "host" else timing.cache_bytes(device))
            truth = check.exact(case, sets[0])
        for name in self.peers if sets else ():
            if (case.operation, name) in self.left_out:
                continue
            with self._step(case, name, "check"):
                once = peers.bind(name, case, make_sets(case, device, 0)[0])  # which it may change
                if once is None:
                    continue
                once.call()
                error, fault = check.judge(truth, once.results())
                self._rows[name] = row_of(case, name, status="wrong" if fault else "ok", error=error, note=fault)
                if not fault:
                    calls = [bound.call for x in sets if (bound := peers.bind(name, case, x)) is not None]
                    for call in calls:
                        call()
                    self._synchronize()
                    ready[name] = calls
        return ready

    def _time(self, case: Case, ready: dict[str, list[timing.Call]]) -> dict[str, timing.Spread]:
        timers, device = {}, torch.device(self.device)
        for name, calls in ready.items():
            with self._step(case, name, "preparing to time"):
                timers[name] = timing.host(calls[0]) if case.group == "host" else timing.timer(calls, device)
                self._synchronize()
        return timing.in_turns(timers, device, lambda name: self._say(name, "timing"))

    @contextlib.contextmanager
    def _step(self, case: Case, name: str, what: str) -> Iterator[None]:
        """Tell what happens now; an exception becomes the row of the contender ``name`` (of ours for what is nobody's).
        If it took the device along, the worker ends, and the parent starts another.
        """
        self._say(name, what)
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
                self._say(name, note)
                os._exit(3)
            self._rows[name] = row_of(case, name or peers.OURS, status="failed", note=note)

    def _say(self, contender: str, what: str) -> None:
        self.pipe.send(Step(self._case, contender, what))

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def work(worker: Worker, pipe: Connection, ahead: bool) -> None:
    """What a process runs: measure, or compile what that needs ahead, with all that is printed thrown away."""
    os.setsid()  # the parent can end it with all processes that it starts
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    worker.pipe = pipe
    if ahead:  # what Triton's tuner finds while others use the GPU must not be kept
        os.environ |= {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}
        worker.compile()
    else:
        worker.measure()


class BenchError(GatedDeltaError, RuntimeError):
    """The measuring process cannot even begin."""


class Process:
    """A worker in a process of its own."""

    def __init__(self, worker: Worker, *, ahead: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=work, args=(worker, theirs, ahead))
        self._process.start()
        theirs.close()
        self.sentinel = self._process.sentinel
        self.hung = False

    def events(self, limit: float) -> Iterator[Step | list[Row]]:
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
        tell: called with a line that the user should see.
    """

    device: str
    peers: Sequence[str]
    cases: Sequence[Case]
    facts: dict[str, str]
    limit: float = 120.0
    jobs: int = 0
    tell: Callable[[str], None] = lambda words: None
    _rows: dict[Case | None, list[Row]] = field(default_factory=dict)
    """Of the machine (None) and of each case that is done."""
    _ended: dict[Case, list[Row]] = field(default_factory=dict)
    """Of contenders in whose hands a worker ended, until the case is done."""
    _left_out: set[tuple[str, str]] = field(default_factory=set)

    def run(self) -> Iterator[list[Row]]:
        """All rows so far, those of the machine first, whenever a case is done.

        Raises:
            BenchError: a worker ends before it comes to a case.
        """
        if self.jobs:
            self._compile()
        while waiting := [case for case in self.cases if case not in self._rows]:
            for _ in self._measure(waiting):
                found = [row for rows in self._rows.values() for row in with_best_peer(rows)]
                yield [replace(row, **self.facts) for row in found]

    def _worker(self, cases: list[Case], peers: Sequence[str]) -> Worker:
        return Worker(self.device, list(peers), cases, self._rows.get(None, []), self._left_out)

    def _measure(self, waiting: list[Case]) -> Iterator[Case]:
        """Let one worker go on as far as it comes; gives the cases that are done."""
        process, last = Process(self._worker(waiting, self.peers)), Step(None, "", "starting")
        try:
            for event in process.events(self.limit):
                if isinstance(event, Step):
                    last = event
                    continue
                now: dict[str, Any] = clocks(self.device)
                self._rows[last.case] = [replace(row, **now) for row in event]
                if last.case is not None:
                    self._rows[last.case] += self._ended.get(last.case, [])
                    yield last.case
        finally:
            how = process.end()
        if not self._rows.keys() >= set(waiting):
            yield from self._blame(last, "hung" if process.hung else "crashed", f"{how} while: {last.what}")

    def _blame(self, last: Step, status: str, note: str) -> Iterator[Case]:
        """The row of whom a worker ended with; the next one leaves that contender out of the whole operation."""
        case, name, _ = last
        if case is None:
            raise BenchError(f"bench: the measuring process cannot begin ({note})")
        self.tell(f"{case.name}: {name or 'the worker'} {status} ({note})")
        if not name:
            self._rows[case] = [row_of(case, peers.OURS, status="failed", note=note)]
            yield case
        else:
            self._left_out.add((case.operation, name))
            row = row_of(case, name, status=status, note=f"{note}; left out of {case.operation} from here on")
            self._ended.setdefault(case, []).append(row)

    def _compile(self) -> None:
        """Contenders compile for minutes, one kernel after the other: do it in many processes, each of which leaves
        its kernels in the disk caches of their compilers. What goes wrong here goes wrong again where it counts.
        """
        shares: dict[tuple[Any, ...], list[Case]] = {}
        for peer, case in product(self.peers, self.cases):
            shares.setdefault((peer, case.operation, case.heads, case.tokens), []).append(case)
        plans = [self._worker(cases, [peer]) for (peer, *_), cases in shares.items()]
        self.tell(f"compiling ahead in {min(self.jobs, len(plans))} processes")
        running: dict[Any, Process] = {}
        started = time.monotonic()
        try:
            while (plans or running) and (left := started + 2 * self.limit - time.monotonic()) > 0:
                while plans and len(running) < self.jobs:
                    process = Process(plans.pop(0), ahead=True)
                    running[process.sentinel] = process
                for sentinel in wait(list(running), left):
                    running.pop(sentinel).end()
        finally:
            for process in running.values():  # out of time, or the user has had enough
                process.end(0)
        self.tell(f"compiled in {time.monotonic() - started:.0f} s")
