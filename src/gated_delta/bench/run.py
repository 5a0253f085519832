"""Measuring in a process of its own, the worker, which a peer may end or hang: it tells its parent every step before it
takes it. The parent asks for one case after the other, and starts another worker where one was killed or stopped.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gated_delta.bench import floors, peers, timing
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

    contender: str
    """"" for what is nobody's"""
    what: str


STARTING = Step("", "starting")


@dataclass
class Worker:
    """What measures a case."""

    device: torch.device
    case: Case
    peers: Sequence[str]
    pipe: Connection
    _rows: dict[str, Row] = field(default_factory=dict)

    def measure(self) -> list[Row]:
        """Rows of all contenders that can do the case."""
        timers, host = {}, self.case.group == "host"
        for name, calls in self._ready().items():
            with self._step(name, "preparing to time"):
                timers[name] = timing.host(calls[0]) if host else timing.timer(calls, self.device)
                synchronize(self.device)
        found = timing.in_turns(timers, self.device, lambda name: self.pipe.send(Step(name, "timing")))
        self._rows |= {name: replace(self._rows[name], **times._asdict()) for name, times in found.items()}
        return list(self._rows.values())

    def _ready(self) -> dict[str, list[timing.Call]]:
        """The calls of the contenders that are right, one for each set of inputs; rows for all that can do the case."""
        ready: dict[str, list[timing.Call]] = {}
        sets, truth, case = [], {}, self.case
        with self._step("", "making inputs and reference"):
            sets = make_sets(case, self.device, 0 if case.group == "host" else timing.cache_bytes(self.device))
            truth = peers.exact(case, sets[0])
        for name in self.peers if sets else ():
            with self._step(name, "check"):
                once = peers.bind(name, case, make_sets(case, self.device, 0)[0])  # which it may change
                if once is None:
                    continue
                once.call()
                error, fault = peers.judge(truth, once.results())
                self._rows[name] = row_of(case, name, status="wrong" if fault else "ok", error=error, note=fault)
                if not fault:
                    calls = [bound.call for x in sets if (bound := peers.bind(name, case, x)) is not None]
                    for call in calls:
                        call()
                    synchronize(self.device)
                    ready[name] = calls
        return ready

    @contextlib.contextmanager
    def _step(self, name: str, what: str) -> Iterator[None]:
        """Tell what happens now; an exception becomes the row of the contender ``name`` (of ours for what is nobody's).
        If it took the device along, the worker ends, and the parent starts another.
        """
        self.pipe.send(Step(name, what))
        try:
            yield
        except Exception as error:
            where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name
            note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})"
            error.__traceback__ = None  # its frames hold tensors
            try:
                synchronize(self.device)
                torch.ones(1, device=self.device).add_(1).item()
            except RuntimeError:
                self.pipe.send(Step(name, note))
                os._exit(3)
            self._rows[name] = row_of(self.case, name or peers.OURS, status="failed", note=note)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def work(kind: str, pipe: Connection, ahead: Sequence[tuple[Case, str]]) -> None:
    """What a process runs, with all that is printed thrown away: once each case and contender of ``ahead``, so that
    what is compiled is on disk, or else what the pipe asks for, a case and its contenders (None: the machine).
    """
    os.setsid()  # the parent can end it with all processes that it starts
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    device = torch.device(kind)
    if ahead:  # what Triton's tuner finds while others use the GPU must not be kept
        os.environ |= {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}
    for case, name in ahead:
        with contextlib.suppress(Exception):
            bound = peers.bind(name, case, make_sets(case, device, 0)[0])
            if bound is not None:
                bound.call()
                synchronize(device)
    while not ahead:
        case, names = pipe.recv()
        if case is None:
            pipe.send(Step("", "measuring the machine"))
        pipe.send(list(floors.measure(device)) if case is None else Worker(device, case, names, pipe).measure())
        if device.type == "cuda":
            torch.cuda.empty_cache()


class BenchError(GatedDeltaError, RuntimeError):
    """The measuring process cannot even begin."""


class Process:
    """A worker in a process of its own."""

    def __init__(self, device: str, ahead: Sequence[tuple[Case, str]] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(device, theirs, ahead))
        self.process.start()
        theirs.close()
        self.last = STARTING
        self.hung = False

    def ask(self, case: Case | None, names: Sequence[str], limit: float) -> list[Row] | None:
        """The rows of a case; None if the worker ends, or is silent for longer than ``limit`` seconds."""
        with contextlib.suppress(EOFError, OSError):  # it has ended, perhaps amid a word
            self._pipe.send((case, names))
            while self._pipe.poll(max(limit, START_S) if self.last == STARTING else limit):
                said = self._pipe.recv()
                if isinstance(said, list):
                    return said
                self.last = said
            self.hung = self.process.is_alive()  # its pipe may live on in a process that it started
        return None

    def end(self, seconds: float = 5.0) -> str:
        """End it, after so many seconds by force, with all processes that it started; says how it ended."""
        self.process.join(0 if self.hung else seconds)
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        self._pipe.close()
        return "did not answer" if self.hung else f"exit status {self.process.exitcode}"


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
    _process: Process | None = None
    _left_out: set[tuple[str, str]] = field(default_factory=set)
    """Operations, and contenders with whom a worker ended there."""

    def run(self) -> Iterator[list[Row]]:
        """All rows so far, those of the machine first, whenever a case is done.

        Raises:
            BenchError: a worker ends before it comes to a case.
        """
        if self.jobs:
            self._compile()
        try:
            rows = self._measure(None)
            ceilings = floors.ceilings(rows)
            for case in self.cases:
                found = self._measure(case)
                if case.group != "host":
                    found = [replace(x, **floors.rates(case, x.us, ceilings)) if x.us else x for x in found]
                rows += with_best_peer(found)
                yield [replace(row, **self.facts) for row in rows]
        finally:
            if self._process is not None:
                self._process.end(0)

    def _measure(self, case: Case | None) -> list[Row]:
        """The machine (None) or a case, by as many workers as that takes: with whom one ended is left out of the whole
        operation from then on.
        """
        ended: list[Row] = []
        while True:
            names = [name for name in self.peers if case and (case.operation, name) not in self._left_out]
            process = self._process = self._process or Process(self.device)
            rows = process.ask(case, names, self.limit)
            if rows is not None:
                now: dict[str, Any] = clocks(self.device)
                return [*(replace(row, **now) for row in rows), *ended]
            self._process, (name, what) = None, process.last
            note = f"{process.end()} while: {what}"
            if case is None or process.last == STARTING:
                raise BenchError(f"bench: the measuring process cannot begin ({note})")
            status = "hung" if process.hung else "crashed"
            self.tell(f"{case.name}: {name or 'the worker'} {status} ({note})")
            if not name:
                return [row_of(case, peers.OURS, status="failed", note=note), *ended]
            self._left_out.add((case.operation, name))
            note += f"; left out of {case.operation} from here on"
            ended.append(row_of(case, name, status=status, note=note))

    def _compile(self) -> None:
        """Contenders compile for minutes, one kernel after the other: do it in many processes, each of which leaves
        its kernels in the disk caches of their compilers. What goes wrong here goes wrong again where it counts.
        """
        shares: dict[tuple[Any, ...], list[tuple[Case, str]]] = {}
        for peer, case in product(self.peers, self.cases):
            if sum(case.lengths) <= MOST_COMPILED_TOKENS:
                shares.setdefault((peer, case.operation, case.heads, case.tokens), []).append((case, peer))
        self.tell(f"compiling ahead in {min(self.jobs, len(shares))} processes")
        started, running = time.monotonic(), list[Process]()

        def share(ahead: list[tuple[Case, str]]) -> None:
            running.append(process := Process(self.device, ahead))
            process.end(max(0.0, started + 2 * self.limit - time.monotonic()))

        with ThreadPoolExecutor(self.jobs) as threads:
            try:
                list(threads.map(share, shares.values()))
            finally:  # the user may have had enough
                for one in running:
                    one.process.kill()
        self.tell(f"compiled in {time.monotonic() - started:.0f} s")
