"""``serve-sim``: a trace of requests through a stack of layers, batched continuously as engines do.

A step has as many tokens as its budget allows: a token, with drafts, of every sequence that decodes, then pieces of
prompts in the order in which they came. What a token's input is and which drafts are right is known ahead, and a step
counts as a fixed time of the trace: so the steps are the same on every machine and with anybody's kernels.
"""

import csv
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.bench import peers
from gated_delta.bench.cases import STATES, Case, Heads
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.conv import causal_conv1d_update
from gated_delta.errors import OptionError
from gated_delta.layer import GatedDeltaNetAttention, Projected
from gated_delta.norm import rms_norm_gated
from gated_delta.reference import l2norm
from gated_delta.state import LayerState, StatePool
from gated_delta.validation.arguments import Arguments

MODELS = {
    "qwen3-next-80b-a3b": (Heads(16, 32), 2048, "interleaved", 36),
    "qwen3.5-4b": (Heads(16, 32), 2560, "merged", 24),
    "qwen3.5-35b-a3b": (Heads(16, 32), 2048, "merged", 30),
    "qwen3.5-397b-a17b": (Heads(16, 64), 4096, "merged", 45),
    "olmo-hybrid-7b": (Heads(30, 30, 96, 192), 3840, "merged", 24),
    "tiny": (Heads(1, 2, 32, 32), 32, "interleaved", 2),
}
"""Heads, hidden size, projections and number of GDN layers of published configs; "tiny" is no model."""
PROFILED, EMBEDDINGS, SIGMA = 16, 4096, 0.7
"""Every so-manieth step is profiled for its parts and not timed; inputs there are; of log-normal lengths."""
PARTS = {
    "aten::linear": "projections", "gated_delta::causal_conv1d": "convolution", "gated_delta::gates": "gates",
    "gated_delta::causal_conv1d_update": "convolution", "gated_delta::prefill": "rule", "rule": "rule",
    "gated_delta::gated_delta_net_step": "fused step", "gated_delta::rms_norm_gated": "norm",
    "translation": "translation", "step": "other",
}  # fmt: skip
"""The part of a step that an operator, or a range that we mark, is. The fused step is convolution, rule and norm."""


class Request(NamedTuple):
    """Comes after ``arrival`` seconds with ``prompt`` tokens, and goes with its ``output``-th new one."""

    arrival: float
    prompt: int
    output: int


def random_trace(count: int, rate: float, prompt: int, output: int, seed: int) -> list[Request]:
    """Poisson arrivals, ``rate`` a second; log-normal lengths with these medians."""
    choice, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += choice.expovariate(rate)
        lengths = (max(1, round(choice.lognormvariate(math.log(median), SIGMA))) for median in (prompt, output))
        found.append(Request(now, *lengths))
    return found


def read_trace(path: Path) -> list[Request]:
    """Of a CSV with the columns arrival, prompt, output, or a JSON list of objects with these keys.

    Raises:
        OptionError: no such file, or a value that is none; its row and column are named.
    """
    try:
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError) as error:
        raise OptionError("serve-sim", "--trace", f"{path} ({error})", "a CSV or JSON file") from error
    if not isinstance(rows, list) or not rows:
        raise OptionError("serve-sim", "--trace", f"{path} without rows", "a list of requests")

    def value(row: int, name: str, kind: Callable[[str], Any], least: int) -> Any:
        was = rows[row].get(name) if isinstance(rows[row], dict) else None
        try:
            found = kind(str(was))
        except ValueError:
            found = math.nan
        if not least <= found < math.inf:
            must = f"a {'whole ' if kind is int else ''}number of at least {least}"
            raise OptionError("serve-sim", f"{path.name}, row {row + 1}, column {name}", repr(was), must)
        return found

    columns = (("arrival", float, 0), ("prompt", int, 1), ("output", int, 1))
    return sorted(Request(*(value(row, *column) for column in columns)) for row in range(len(rows)))


@dataclass(frozen=True)
class Settings:
    """Of an engine."""

    budget: int = 2048
    """tokens a step"""
    batch: int = 64
    """sequences that run together"""
    drafts: int = 0
    """tokens that every decode verifies, each right with this probability if the one before is:"""
    acceptance: float = 0.7
    tick: float = 0.02
    """seconds of the trace that a step counts as"""
    state: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        args = Arguments("serve-sim")
        args.whole("batch", self.batch, least=1)
        args.whole("drafts", self.drafts, least=0)
        if self.budget < (least := self.batch * (self.drafts + 1)):
            must = f"at least {least}, a token and its drafts of each of {self.batch} sequences"
            raise OptionError(args.where, "budget", self.budget, must)


@dataclass(eq=False)
class Running:
    """A request with slots. Its tokens are prompt and output in a row, the last of which is no input."""

    number: int
    request: Request
    slots: list[int]
    choice: random.Random
    done: int = 0
    accepted: int = 1

    @property
    def left(self) -> int:
        return self.request.prompt + self.request.output - 1 - self.done

    @property
    def decodes(self) -> bool:
        return self.done >= self.request.prompt


class Move(NamedTuple):
    """``tokens`` of a request in a step: ``kept`` of its own, then drafts that are wrong."""

    running: Running
    tokens: int
    kept: int

    def row(self, drafts: int) -> Row | SpecRow:
        running = self.running
        if drafts and running.decodes:
            return SpecRow(self.tokens, running.slots, running.accepted)
        return Row(self.tokens, running.slots[0], fresh=running.done == 0)


@dataclass
class Swap:
    """Whose kernels serve the rule instead of ours, how often who did, and the lengths of a step's prefills."""

    name: str
    served: Counter[str] = field(default_factory=Counter)
    lengths: Sequence[int] = ()


class Swapped(GatedDeltaNetAttention):
    """A layer whose rule is a peer's, in prefills and in decodes that do not speculate; all else is ours.

    What the peer takes otherwise (normalised q and k, states by row) is made for it, and counts as "translation".
    """

    swap: Swap

    def _served(self, x: dict[str, Any], operation: str, form: str = "", **size: Any) -> dict[str, Tensor]:
        c = self.config
        heads = Heads(c.num_k_heads, c.num_v_heads, c.head_k_dim, c.head_v_dim)
        case = Case("serve-sim", operation, heads, form, **size)
        bound = peers.bind(self.swap.name, case, x)
        self.swap.served[f"{case.operation} by {peers.OURS if bound is None else self.swap.name}"] += 1
        bound = bound or peers.bind(peers.OURS, case, x)
        assert bound is not None
        with record_function("rule"):
            bound.call()
        return bound.results()

    def _rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, **rows: Any) -> Tensor:
        slots, known = rows["state_indices"], rows["has_initial_state"][:, None, None, None]
        with record_function("translation"):
            q, k = (l2norm(y.float()).to(y.dtype) for y in (q, k))
            state = torch.where(known, pool[slots].float(), 0.0)
            x = {"q": q, "k": k, "v": v.contiguous(), "log_alpha": g, "alpha": g.exp(), "beta": beta}
            x |= {"initial_state": state, "cu_seqlens": rows["cu_seqlens"]}
            x |= {"output": torch.empty_like(x["v"]), "output_state": torch.empty_like(state)}
        found = self._served(x, "prefill", sequences="+".join(map(str, self.swap.lengths)))
        with record_function("translation"):
            pool[slots] = found["state"].to(pool.dtype)
        return found["output"]

    def _step(self, p: Projected, state: LayerState, output: Tensor, **rows: Any) -> None:
        ours = f"decode by {peers.OURS}"
        if "cu_seqlens" in rows or ours in self.swap.served:  # then the peer has none
            self.swap.served[ours] += "cu_seqlens" not in rows
            super()._step(p, state, output, **rows)
            return
        slots, pool, heads = rows["state_indices"], state.recurrent, p.heads
        mixed = causal_conv1d_update(p.qkv, state.conv, self.conv1d.weight[:, 0], state_indices=slots)
        by_row = pool.dtype == torch.float32  # peers take pools of 16 bits
        with record_function("translation"):
            tokens = (*self.split_heads(mixed), heads.a.flatten(1), heads.b.flatten(1))
            x = {name: y.contiguous()[:, None] for name, y in zip("qkvab", tokens, strict=True)}
            x |= {"state": pool[slots] if by_row else pool, "slots": slots, "A_log": self.A_log}
            x |= {"dt_bias": self.dt_bias.float(), "output": torch.empty_like(x["v"])}
        stored = next(name for name, dtype in STATES.items() if dtype == pool.dtype)
        found = self._served(x, "decode", "V-major" if by_row else "pool", batch=len(slots), state=stored)
        if by_row:
            with record_function("translation"):
                pool[slots] = found["state"].to(pool.dtype)
        core, output = (y.view_as(heads.z) for y in (found["output"], output))
        rms_norm_gated(core, heads.z, self.norm.weight, self.config.norm_eps, self.config.output_gate, output=output)


def stack(model: str, layers: int | None, device: str, swap: Swap | None = None) -> list[GatedDeltaNetAttention]:
    """Layers of a model's shape with random weights: bf16 on a GPU, fp32 on a CPU."""
    (h, hv, k, v), hidden, projection, count = MODELS[model]
    config = GatedDeltaNetConfig(
        hidden_size=hidden, num_k_heads=h, num_v_heads=hv, head_k_dim=k, head_v_dim=v, projection=projection
    )
    torch.manual_seed(0)
    dtype, made = torch.float32 if device == "cpu" else torch.bfloat16, list[GatedDeltaNetAttention]()
    for _ in range(layers or count):
        layer = GatedDeltaNetAttention(config) if swap is None else Swapped(config)
        made.append(layer.to(device, dtype).requires_grad_(False))
        if isinstance(layer, Swapped) and swap is not None:
            layer.swap = swap
    return made


class Simulation:
    """An engine with ``layers`` and a pool that is never cleared; ``observe`` gets every step and what came out."""

    def __init__(
        self, layers: Sequence[GatedDeltaNetAttention], trace: Sequence[Request], settings: Settings,
        observe: Callable[[list[Move], Tensor], None] = lambda moves, output: None,
    ) -> None:  # fmt: skip
        self.layers, self.settings, self.observe, weight = layers, settings, observe, layers[0].dt_bias
        self.waiting, self.running, self.now = deque(enumerate(trace)), list[Running](), 0.0
        self.seconds, self.tokens, self.us, self.profiled = list[float](), 0, Counter[str](), 0
        slots, dtypes = settings.batch * (settings.drafts + 1), (weight.dtype, STATES[settings.state])
        self.pool = StatePool(
            layers[0].config, layers=len(layers), slots=slots, num_spec=settings.drafts, conv_dtype=dtypes[0],
            state_dtype=dtypes[1], device=weight.device,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(settings.seed)
        self.embeddings = torch.randn(EMBEDDINGS, layers[0].config.hidden_size, generator=generator).to(weight)

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Serve all requests. Tokens are those of timed steps, without rejected drafts; parts are us of a step."""
        if self.embeddings.is_cuda:
            self.layers[0].warmup(self.pool.layer(0), max_batch=self.settings.batch)
        while self.waiting or self.running:
            self.now = self.now if self.running else max(self.now, self.waiting[0][1].arrival)
            moves = self._moves()
            if (len(self.seconds) + self.profiled + 1) % PROFILED == 0:
                with profile() as profiler, record_function("step"):
                    output = self._forward(moves)
                self.profiled += 1
                self.us.update(parts(profiler))
            else:
                started = time.perf_counter()
                output = self._forward(moves)
                self.seconds.append(time.perf_counter() - started)
                self.tokens += sum(move.kept for move in moves)
            self.observe(moves, output)
            self._finish(moves)
            self.now += self.settings.tick
        p50, p99 = (torch.tensor(self.seconds) * 1e3).quantile(torch.tensor([0.5, 0.99])).tolist()
        found = {"steps": len(self.seconds) + self.profiled, "tokens/s": self.tokens / sum(self.seconds)}
        return {**found, "p50 ms": p50, "p99 ms": p99} | {
            f"{name} us": us / self.profiled for name, us in self.us.items()
        }

    def _moves(self) -> list[Move]:
        """Who takes part in the next step, decodes first."""
        s, found = self.settings, []
        while self.waiting and self.waiting[0][1].arrival <= self.now and len(self.running) < s.batch:
            number, request = self.waiting.popleft()
            choice = random.Random(f"{s.seed} {number}")
            self.running.append(Running(number, request, self.pool.allocate(s.drafts + 1), choice))
        room = s.budget
        for running in sorted(self.running, key=lambda running: not running.decodes):
            tokens = kept = min(room, running.request.prompt - running.done)
            if running.decodes:
                tokens, kept = min(s.drafts + 1, running.left), 1
                while kept < tokens and running.choice.random() < s.acceptance:
                    kept += 1
            if tokens:
                found.append(Move(running, tokens, kept))
            room -= tokens
        return sorted(found, key=lambda move: move.tokens > 1 or move.running.done == 0)

    def _forward(self, moves: list[Move]) -> Tensor:
        rows, ids = [move.row(self.settings.drafts) for move in moves], []
        for running, tokens, kept in moves:
            place = torch.arange(tokens)  # wrong drafts are other inputs than those that come instead
            ids.append(7919 * running.number + running.done + place + (place >= kept) * (EMBEDDINGS // 2))
        device = self.embeddings.device
        batch = GatedDeltaNetBatch.build(rows, num_spec=self.settings.drafts, device=device)
        hidden = self.embeddings[torch.cat(ids).to(device) % EMBEDDINGS]
        if isinstance(first := self.layers[0], Swapped):
            first.swap.lengths = [row.tokens for row in rows if isinstance(row, Row)][batch.num_decodes :]
        for index, layer in enumerate(self.layers):
            normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])
            hidden = hidden + layer(normed, batch, self.pool.layer(index))
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return hidden

    def _finish(self, moves: list[Move]) -> None:
        for running, _, kept in moves:
            running.accepted = kept if running.decodes and self.settings.drafts else 1
            running.done += kept
            if not running.left:
                self.running.remove(running)
                self.pool.free(running.slots)


def parts(profiler: profile) -> Counter[str]:
    """Microseconds on the device by part; what is inside of another part counts there."""
    found: Counter[str] = Counter()
    time_of = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"
    for event in profiler.events() or ():
        if event.name in PARTS and "CPU" in str(event.device_type):  # a GPU shows our ranges once more
            us, above = getattr(event, time_of), event.cpu_parent
            while above is not None and above.name not in PARTS:
                above = above.cpu_parent
            if above is None or above.name == "step":
                found[PARTS[event.name]] += us
                found["other"] -= us if event.name != "step" else 0
    return found


def serve(
    name: str, model: str, layers: int | None, trace: Sequence[Request], settings: Settings, device: str,
    advance: Callable[[int], None],
) -> dict[str, Any]:  # fmt: skip
    """One line of the table: the trace with the rule by ``name``. A peer that raises costs its line."""
    swap = None if name == peers.OURS else Swap(name)
    found: dict[str, Any] = {"rule by": name, "version": peers.version_of(name), "model": model, "requests": len(trace)}
    try:
        own = stack(model, layers, device, swap)
        simulation = Simulation(
            own, trace, settings, lambda moves, _: advance(sum(move.running.left == move.kept for move in moves))
        )
        found |= {"layers": len(own), **simulation.run()}
    except Exception as error:
        if swap is None:
            raise
        found["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found | ({} if swap is None else {"calls": ", ".join(f"{n} {what}" for what, n in swap.served.items())})
