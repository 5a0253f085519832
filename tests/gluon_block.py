"""A program of a Gluon kernel on a CPU: partitions that take turns, their barriers, and shared memory that finds races.

Partitions (``warp_specialize``) are threads, one of which has the turn, so that a run repeats exactly; which one comes
next when it waits at a barrier is drawn from a seed. What a GPU would get wrong now and then is an error here whatever
the order:

* Races. Whatever partitions do to shared memory carries a time on vector clocks, which barriers hand on. Two accesses
  that no barrier orders, one of them a write, are an error, and so is a product, or a tile of the copy engine, on what
  was written without a fence in between. What the copy engine wrote needs none: products read as it writes.
* An asynchronous copy spoils its destination at once and lands later, in no order but that of a barrier. One that a
  program leaves behind is an error: it would land in the memory of the next. A store by the copy engine reads until it
  is waited for.
* A product reads its operands in shared memory, and what it adds to, only when it is waited for; until then its result
  is nothing to compute with, and nothing is allocated: the compiler takes a product's operands for free once it is
  issued.
* Barriers count as the hardware does. An arrival that nobody expects is an error; where all partitions wait, the error
  says for which barriers.

Inside a partition everything happens in order.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from gluon_values import GLUON, KernelError, Value, raw

here = threading.local()
"""``here.partition`` is the one that a thread runs."""


class Agent:
    """Whoever uses shared memory: a partition, or one of its copies, which run beside it.

    ``seen[x]`` is the time of agent x up to which all that it did comes before what this agent does next;
    ``fenced[x]`` the same for what products may read of it, and the copy engine overwrite.
    """

    def __init__(self, name: str, parent: Agent | None = None) -> None:
        self.name = name
        self.seen: Counter[str] = Counter(parent.seen if parent else {})
        self.fenced: Counter[str] = Counter(parent.fenced if parent else {})
        self.tick()

    def tick(self) -> None:
        self.seen[self.name] += 1

    def learn(self, other: Agent) -> None:
        self.seen |= other.seen
        self.fenced |= other.fenced

    def fence(self) -> None:
        self.fenced |= self.seen
        self.tick()


class Place(NamedTuple):
    """What a view covers of its allocation."""

    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def place_of(data: Tensor) -> Place:
    return Place(int(data.storage_offset()), tuple(data.shape), data.stride())


@cache
def elements(place: Place) -> frozenset[int]:
    axes = ([step * i for i in range(size)] for size, step in zip(place.shape, place.stride, strict=True))
    return frozenset(place.first + sum(at) for at in product(*axes))


@cache
def meet(a: Place, b: Place) -> bool:
    return not elements(a).isdisjoint(elements(b))


class Memory:
    """An allocation of shared memory, and when which agent last used which part of it."""

    def __init__(self) -> None:
        self.uses: dict[Place, dict[tuple[str, bool], int]] = {}

    def use(self, data: Tensor, agent: Agent, *, write: bool, fenced: bool = False) -> None:
        own, doing = place_of(data), "writes" if write else "reads"
        for (name, wrote), time in (use for x, uses in self.uses.items() if meet(own, x) for use in uses.items()):
            if name != agent.name and (write or wrote) and agent.seen[name] < time:
                done = "wrote" if wrote else "read"
                raise KernelError(f"race: {agent.name} {doing} {name_of(self)}, which {name} {done} meanwhile")
            if fenced and wrote and agent.fenced[name] < time:
                raise KernelError(f"no fence: {agent.name} {doing} {name_of(self)} of {name} past its caches")
        self.uses.setdefault(own, {})[agent.name, write] = agent.seen[agent.name]


def name_of(memory: Memory | Barriers) -> str:
    """What the kernel calls it, where it is used now."""
    frame = inspect.currentframe()
    while frame is not None:
        for name, x in frame.f_locals.items() if not frame.f_globals["__name__"].startswith("gluon_") else ():
            if isinstance(x, (Shared, Barriers)) and memory in (x, getattr(x, "memory", None)):
                return name
        frame = frame.f_back
    return "shared memory"


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Memory, data: Tensor) -> None:
        self.memory, self.data = memory, data

    dtype = property(lambda self: GLUON[self.data.dtype])
    shape = property(lambda self: tuple(self.data.shape))

    def index(self, i: Any) -> Shared:
        return Shared(self.memory, self.data[int(raw(i))])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory, self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory, self.data.view(*shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory, self.data.narrow(dim, start, length))

    def load(self, layout: object = None) -> Value:
        self.memory.use(self.data, here.partition.agent, write=False)
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        if (value.shape, value.dtype) != (self.shape, self.dtype):
            raise KernelError(f"{value.dtype}{value.shape} is stored as {self.dtype}{self.shape}")
        partition: Partition = here.partition
        if any(product.reads(self) for product in partition.products):
            raise KernelError(f"{name_of(self.memory)} is overwritten while a product reads it")
        self.memory.use(self.data, partition.agent, write=True)
        self.data.copy_(value.data)


class Barriers:
    """An allocation of them."""

    def __init__(self, count: int) -> None:
        self.members = [Barrier(self, i) for i in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.members[int(raw(i))]


class Barrier:
    """An mbarrier. ``phase`` counts those that are complete; a wait for a parity passes when the last one has it."""

    def __init__(self, family: Barriers, i: int) -> None:
        self.family, self.i, self.count, self.pending, self.phase = family, i, 0, 0, 0
        self.bytes = 0
        self.gathered, self.released = Agent(""), Agent("")

    def __str__(self) -> str:
        return f"{name_of(self.family)}[{self.i}]"

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, agent: Agent, number: int) -> None:
        if number > self.pending:
            raise KernelError(f"{self}: {number} arrivals of {agent.name}, and {self.pending} are expected")
        self.pending -= number
        self.gathered.learn(agent)
        agent.tick()
        self.complete()

    def expect(self, agent: Agent, size: int) -> None:
        self.bytes += size
        self.arrive(agent, 1)

    def receive(self, agent: Agent, size: int) -> None:
        self.bytes -= size
        self.gathered.learn(agent)
        agent.tick()
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.released = Agent("", self.gathered)

    def wait(self, parity: Any) -> None:
        partition, parity = here.partition, int(raw(parity))
        partition.give_way(lambda: self.phase % 2 != parity, f"{self}, parity {parity}")
        partition.agent.learn(self.released)


class Partition:
    """Warps that run a function of their own."""

    def __init__(self, block: Block, agent: Agent, warps: int) -> None:
        self.block, self.agent, self.warps = block, agent, warps
        self.copies: list[tuple[Shared, Tensor, Agent]] = []
        self.products: deque[Product] = deque()
        self.stores: deque[tuple[Tensor, Shared, Agent]] = deque()
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for, self.done = "its first turn", False

    def copier(self) -> Agent:
        """Of one copy, which begins after all that the partition has done."""
        self.block.copiers.append(Agent(f"copy {len(self.block.copiers)} of {self.agent.name}", self.agent))
        return self.block.copiers[-1]

    def give_way(self, ready: Callable[[], bool], what: str) -> None:
        """Let others run, until ``ready``."""
        self.ready, self.waits_for = ready, what
        self.block.next_turn()
        self.block.await_turn(self)

    def end(self) -> None:
        for running, what in ((self.products, "products"), (self.stores, "stores")):
            if running:
                raise KernelError(f"{self.agent.name} ends with {what} that nobody waited for")

    def run(self, function: Callable[..., None], args: Sequence[Any]) -> None:
        torch.set_num_threads(1)
        here.partition = self
        try:
            self.block.await_turn(self)
            function(*args)
            self.end()
        except BaseException as error:
            self.block.failure = self.block.failure or error
        self.done = True
        self.block.next_turn()


class Block:
    """A program of the grid: its partitions, one of which has the turn, and copies that have not landed."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], warps: int, seed: int) -> None:
        self.place, self.grid, self.random = place, grid, random.Random(seed)
        self.changed = threading.Condition()
        self.landing: list[Callable[[], None]] = []
        self.copiers: list[Agent] = []
        self.failure: BaseException | None = None
        self.main = self.turn = Partition(self, Agent("the program"), warps)
        self.partitions = [self.main]

    def next_turn(self) -> None:
        with self.changed:
            waiting = [x for x in self.partitions if not x.done]
            able = [x for x in waiting if x.ready()]
            while self.landing and (not able or self.random.random() < 1 / 4) and self.failure is None:
                try:
                    self.landing.pop(self.random.randrange(len(self.landing)))()
                except KernelError as error:
                    self.failure = error
                able = [x for x in waiting if x.ready()]
            if waiting and not able and self.failure is None:
                all_wait = "; ".join(f"{x.agent.name} waits for {x.waits_for}" for x in waiting)
                self.failure = KernelError(f"deadlock: {all_wait}")
            self.turn = self.random.choice(able) if able else None
            self.changed.notify_all()

    def await_turn(self, partition: Partition) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn is partition or self.failure is not None)
        if self.failure is not None:
            raise self.failure

    def specialize(self, parts: Sequence[tuple[Any, Any]], warps: Sequence[int]) -> None:
        names = [function.__name__ for function, _ in parts]
        names = [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
        numbers = self.main.warps, *warps
        self.partitions = [Partition(self, Agent(x, self.main.agent), n) for x, n in zip(names, numbers, strict=True)]
        self.main.agent.tick()
        threads = [
            threading.Thread(target=partition.run, args=part)
            for partition, part in zip(self.partitions, parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        self.next_turn()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        for partition in self.partitions:
            self.main.agent.learn(partition.agent)
        self.partitions, self.turn = [self.main], self.main

    def end(self) -> None:
        self.main.end()
        left = [copier.name for copier in self.copiers if not self.main.agent.seen[copier.name]]
        if left:
            raise KernelError(f"the program ends with copies that nobody waited for: {', '.join(left)}")


class Product:
    """An asynchronous product of tensor cores. It runs, and reads, when it is waited for."""

    def __init__(self, left: Value | Shared, right: Shared, start: Value | Product | None) -> None:
        self.left, self.right, self.start = left, right, start
        self.result: Tensor | None = None

    def touch(self) -> None:
        for x in (self.left, self.right):
            if isinstance(x, Shared):
                x.memory.use(x.data, here.partition.agent, write=False, fenced=True)

    def reads(self, shared: Shared) -> bool:
        operands = [x for x in (self.left, self.right) if isinstance(x, Shared) and x.memory is shared.memory]
        return any(meet(place_of(x.data), place_of(shared.data)) for x in operands)

    def run(self) -> None:
        self.touch()
        result = self.left.data.float() @ self.right.data.float()
        if self.start is not None:
            start: Any = self.start.result if isinstance(self.start, Product) else self.start.data
            result += start
        self.result = result


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False, precision: object = None
) -> Any:
    if not a.dtype == b.dtype in (gl.bfloat16, gl.float16):
        raise KernelError(f"a product of {a.dtype} and {b.dtype}")
    product = Product(a, b, acc if use_acc else None)
    product.touch()
    here.partition.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    products = here.partition.products
    while len(products) > num_outstanding:
        products.popleft().run()
    if any(isinstance(x, Product) and x.result is None for x in deps):
        raise KernelError("a product is taken for done that may still run")
    done = [Value(x.result) if isinstance(x, Product) else x for x in deps]
    return done[0] if len(done) == 1 else tuple(done)


def fence_async_shared() -> None:
    here.partition.agent.fence()
