"""A trace of requests through a stack of layers, batched continuously as engines do: docs/bench.md.

    python scripts/serve_sim.py qwen3-next-80b-a3b --requests 64 --rate 0.25

A step has as many tokens as its budget allows: a token, with drafts, of every sequence that decodes, then pieces of
prompts in the order in which they came. Time is counted in steps, and what a token's input is and which drafts are
right is known ahead: so the steps are the same on every machine and with anybody's kernels.
"""

from __future__ import annotations

import csv
import math
import random
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, record_function

from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.bench import machine, peers
from gated_delta.bench.cases import STATES, Case, Heads
from gated_delta.cli import among, parsed, wide
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.conv import causal_conv1d_update
from gated_delta.errors import GatedDeltaError, OptionError
from gated_delta.layer import GatedDeltaNetAttention, Projected
from gated_delta.norm import rms_norm_gated
from gated_delta.reference import l2norm
from gated_delta.state import LayerState, StatePool
from serve_trace import Request, random_trace, read_trace

MODELS = {
    "qwen3-next-80b-a3b": (Heads(16, 32), 2048, "interleaved", 36),
    "qwen3.5-4b": (Heads(16, 32), 2560, "merged", 24),
    "qwen3.5-397b-a17b": (Heads(16, 64), 4096, "merged", 45),
    "tiny": (Heads(1, 2, 32, 32), 32, "interleaved", 2),
}
"""Heads, hidden size, projections and GDN layers by the published configs; "tiny" is no model."""
PROFILED, EMBEDDINGS = 16, 4096
"""Every so-manieth step is profiled for its parts, not timed; inputs there are."""
MARKED = {
    "causal_conv1d": "convolution", "causal_conv1d_update": "convolution", "gates": "gates",
    "chunk_gated_delta_rule": "rule", "gated_delta_net_step": "fused step", "rms_norm_gated": "norm",
}  # fmt: skip
"""The part of a step that a function is. The fused step is convolution, rule and norm."""
PARTS = {"aten::linear": "projections", "step": "other"} | {x: x for x in (*MARKED.values(), "translation")}
"""The part that an operator of torch, or a range that we mark, is."""
LAUNCH = re.compile(r"cu(da)?[A-Z]")
"""How the profiler names calls of CUDA. Their ids are their kernels'; those of operators are others' numbers."""


@dataclass(frozen=True)
class Settings:
    """Of an engine: ``budget`` tokens a step for up to ``batch`` sequences, of which those that decode verify
    ``drafts`` tokens, each right with probability ``acceptance`` if the one before is.

    Raises:
        OptionError: the budget has no room for all of these.
    """

    budget: int = 2048
    batch: int = 64
    drafts: int = 0
    acceptance: float = 0.7
    state: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget < (least := self.batch * (self.drafts + 1)):
            must = f"at least {least}, a token and its drafts of each of {self.batch} sequences"
            raise OptionError("serve-sim", "budget", self.budget, must)


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


@dataclass
class Swap:
    """Whose kernels serve the rule, how often who did, and the lengths of a step's prefills."""

    name: str
    served: Counter[str] = field(default_factory=Counter)
    lengths: Sequence[int] = ()


class Swapped(GatedDeltaNetAttention):
    """A layer whose rule is a peer's, in prefills and in decodes that do not speculate; all else is ours. What the peer
    takes otherwise (normalised q and k, a state a row) is made for it, and counts as "translation".
    """

    swap = Swap(peers.OURS)

    def _served(self, operation: str, x: dict[str, Any], pool: Tensor, slots: Tensor, **case: Any) -> Tensor:
        c = self.config
        heads = Heads(c.num_k_heads, c.num_v_heads, c.head_k_dim, c.head_v_dim)
        bound = peers.bind(self.swap.name, known := Case("serve-sim", operation, heads, **case), x)
        self.swap.served[f"{operation} by {self.swap.name if bound else peers.OURS}"] += 1
        bound = bound or peers.bind(peers.OURS, known, x)
        assert bound is not None
        with record_function("rule"):
            bound.call()
        found = bound.results()
        with record_function("translation"):
            pool[slots] = found["state"].to(pool.dtype)
        return found["output"]

    def _rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, **rows: Any) -> Tensor:
        slots = rows["state_indices"]
        with record_function("translation"):
            state = torch.where(rows["has_initial_state"][:, None, None, None], pool[slots].float(), 0.0)
            q, k = (l2norm(y.float()).to(y.dtype) for y in (q, k))
            x = {"q": q, "k": k, "v": v.contiguous(), "log_g": g, "g": g.exp(), "beta": beta}
            x |= {"initial_state": state, "output_state": torch.empty_like(state), "cu_seqlens": rows["cu_seqlens"]}
            x |= {"output": torch.empty_like(x["v"]), "output_final_state": True, "max_seqlen": max(self.swap.lengths)}
        return self._served("prefill", x, pool, slots, sequences="+".join(map(str, self.swap.lengths)))

    def _step(self, p: Projected, state: LayerState, output: Tensor, **rows: Any) -> None:
        speculative, ours = "cu_seqlens" in rows, f"decode by {peers.OURS}"
        if speculative or self.swap.served[ours]:  # then the peer has none
            self.swap.served.update([] if speculative else [ours])
            super()._step(p, state, output, **rows)
            return
        c, slots, pool, heads = self.config, rows["state_indices"], state.recurrent, p.heads
        mixed = causal_conv1d_update(p.qkv, state.conv, self.conv1d.weight[:, 0], state_indices=slots)
        with record_function("translation"):
            tokens = (*c.split_heads(mixed), heads.a.flatten(1), heads.b.flatten(1))
            x = {name: y.contiguous()[:, None] for name, y in zip("qkvab", tokens, strict=True)}
            x |= {"A_log": self.A_log, "dt_bias": self.dt_bias.float(), "output": torch.empty_like(x["v"])}
            form, stored = ("pool", "bf16") if pool.dtype == torch.bfloat16 else ("V-major", "fp32")
            index = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
            in_pool = {"state": None, "initial_state": pool[slots], "initial_state_indices": index}
            x |= in_pool if form == "pool" else {"state": pool[slots].float()}
        core = self._served("decode", x, pool, slots, form=form, batch=len(slots), state=stored).view_as(heads.z)
        output = output.view_as(heads.z)
        rms_norm_gated(core, heads.z, self.norm.weight, c.norm_eps, c.output_gate, output=output)


def stack(model: str, layers: int | None, device: str, swap: Swap | None = None) -> list[GatedDeltaNetAttention]:
    """Layers of a model's shape with random weights: bf16 on a GPU, fp32 on a CPU."""
    (h, hv, k, v), hidden, projection, count = MODELS[model]
    config = GatedDeltaNetConfig(
        hidden_size=hidden, num_k_heads=h, num_v_heads=hv, head_k_dim=k, head_v_dim=v, projection=projection
    )
    torch.manual_seed(0)
    made = [(Swapped if swap else GatedDeltaNetAttention)(config) for _ in range(layers or count)]
    for layer in made:
        layer.to(device, torch.float32 if device == "cpu" else torch.bfloat16).requires_grad_(False)
        vars(layer).update(swap=swap)
    return made


class Simulation:
    """An engine with ``layers`` and a pool that is never cleared; ``observe`` gets every step and what came out."""

    def __init__(
        self, layers: Sequence[GatedDeltaNetAttention], trace: Sequence[Request], settings: Settings,
        observe: Callable[[list[Move], Tensor], None] = lambda moves, output: None,
    ) -> None:  # fmt: skip
        self.layers, self.settings, self.observe = layers, settings, observe
        self.waiting, self.running, self.now = deque(enumerate(trace)), list[Running](), 0.0
        self.seconds, self.tokens, self.us, self.profiled = list[float](), 0, Counter[str](), 0
        config, like, slots = layers[0].config, layers[0].dt_bias, settings.batch * (settings.drafts + 1)
        self.pool = StatePool(
            config, layers=len(layers), slots=slots, num_spec=settings.drafts, conv_dtype=like.dtype,
            state_dtype=STATES[settings.state], device=like.device,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(settings.seed)
        self.embeddings = torch.randn(EMBEDDINGS, config.hidden_size, generator=generator).to(like)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Serve all requests. Tokens are those of timed steps, without rejected drafts; parts are us of a step."""
        while self.waiting or self.running:
            self.now = self.now if self.running else max(self.now, self.waiting[0][1].arrival)
            moves = self._moves()
            if (len(self.seconds) + self.profiled + 1) % PROFILED == 0:
                with marked(), profile() as profiler, record_function("step"):
                    output = self._forward(moves)
                self.profiled += 1
                self.us.update(parts(profiler))
            else:
                started = time.perf_counter()
                output = self._forward(moves)
                self.seconds.append(time.perf_counter() - started)
                self.tokens += sum(move.kept for move in moves)
            self.observe(moves, output)
            for running, _, kept in moves:
                running.accepted = kept if running.decodes and self.settings.drafts else 1
                running.done += kept
                if not running.left:
                    self.running.remove(running)
                    self.pool.free(running.slots)
            self.now += 1
        p50, p99 = (torch.tensor(self.seconds) * 1e3).quantile(torch.tensor([0.5, 0.99])).tolist()
        found = {"steps": len(self.seconds) + self.profiled, "tokens/s": self.tokens / sum(self.seconds)}
        found |= {"p50 ms": p50, "p99 ms": p99}
        return found | {f"{name} us": us / self.profiled for name, us in self.us.items()}

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
            found += [Move(running, tokens, kept)] if tokens else []
            room -= tokens
        return sorted(found, key=lambda move: move.tokens > 1 or move.running.done == 0)

    def _forward(self, moves: list[Move]) -> Tensor:
        rows, ids, drafts = list[Row | SpecRow](), [], self.settings.drafts
        for running, tokens, kept in moves:
            row = Row(tokens, running.slots[0], fresh=running.done == 0)
            rows.append(SpecRow(tokens, running.slots, running.accepted) if drafts and running.decodes else row)
            place = torch.arange(tokens)  # wrong drafts are other inputs than those that come instead
            ids.append(7919 * running.number + running.done + place + (place >= kept) * (EMBEDDINGS // 2))
        device = self.embeddings.device
        batch = GatedDeltaNetBatch.build(rows, num_spec=drafts, device=device)
        hidden = self.embeddings[torch.cat(ids).to(device) % EMBEDDINGS]
        if isinstance(first := self.layers[0], Swapped):
            first.swap.lengths = [row.tokens for row in rows if isinstance(row, Row)][batch.num_decodes :]
        for index, layer in enumerate(self.layers):
            normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])
            hidden = hidden + layer(normed, batch, self.pool.layer(index))
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return hidden


def serve(
    name: str, model: str, layers: int | None, trace: Sequence[Request], settings: Settings, device: str
) -> dict[str, Any]:
    """A trace with the rule by ``name``, twice: the first time compiles and tunes what the second one times."""
    swap, found = None if name == peers.OURS else Swap(name), dict[str, Any]()
    own = stack(model, layers, device, swap)
    try:
        for served in (Counter[str](), Counter[str]()):
            if swap is not None:
                swap.served = served
            found = Simulation(own, trace, settings).run()
    except Exception as error:  # of a peer it costs its figures
        if swap is None:
            raise
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    calls = ", ".join(f"{count} {what}" for what, count in swap.served.items()) if swap else ""
    told = {"rule by": name, "calls": calls, "version": peers.version_of(name), "model": model, "layers": len(own)}
    return {**told, "requests": len(trace), **found}


@contextmanager
def marked() -> Iterator[None]:
    """Ranges of the profiler for what layers call: a call like an earlier one is no operator of torch's."""
    with ExitStack() as stack:
        for room in (sys.modules[GatedDeltaNetAttention.__module__], sys.modules[__name__]):
            for name in MARKED.keys() & vars(room):
                stack.enter_context(patch.object(room, name, record_function(MARKED[name])(vars(room)[name])))
        yield


def parts(profiler: profile) -> Counter[str]:
    """Microseconds by part, on the device or, where none worked, on the host. What is inside of another part counts
    there; a kernel counts where it was launched, by time: ours belong to no operator of torch's, to which the profiler
    would book them. One whose launch was not seen is "unknown".
    """
    events, found = profiler.events() or (), Counter[str]()
    host = [event for event in events if event.device_type == DeviceType.CPU]
    # a GPU shows our ranges once more
    work = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    marks = [event for event in host if event.name in PARTS and within(event) in ("", "step")]
    launches = {event.id: event.time_range.start for event in host if LAUNCH.match(event.name)}
    for kernel in work:
        at = launches.get(kernel.id, math.nan)
        around = [mark.name for mark in marks if mark.time_range.start <= at <= mark.time_range.end]
        found[PARTS[around[-1]] if around else "unknown"] += kernel.time_range.elapsed_us()  # they are in order
    for mark in () if work else marks:
        found[PARTS[mark.name]] += mark.cpu_time_total
        found["other"] -= mark.cpu_time_total if mark.name != "step" else 0
    return found


def within(event: FunctionEvent) -> str:
    """The next part around one, if there is any."""
    above = event.cpu_parent
    while above is not None and above.name not in PARTS:
        above = above.cpu_parent
    return above.name if above is not None else ""


def serve_command(
    model: Annotated[str, typer.Argument(help=f"Of {', '.join(MODELS)}.")] = "qwen3-next-80b-a3b",
    trace: Annotated[Path | None, typer.Option(help="CSV of arrival (in steps), prompt, output; else random:")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    rate: Annotated[float, typer.Option(min=1e-6, help="Arrivals a step.")] = 0.25,
    prompt: Annotated[int, typer.Option(min=1, help="Median of the prompts' lengths.")] = 1024,
    output: Annotated[int, typer.Option(min=1, help="Median of the outputs' lengths.")] = 128,
    budget: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that run together.")] = 64,
    drafts: Annotated[int, typer.Option(min=0, help="Drafted tokens that a decode verifies.")] = 0,
    acceptance: Annotated[float, typer.Option(min=0, max=1, help="How likely a draft is right.")] = 0.7,
    layers: Annotated[int | None, typer.Option(min=1, help="If not as many as the model has.")] = None,
    state: Annotated[str, typer.Option(help="States: fp32, bf16 or fp16.")] = "fp32",
    seed: Annotated[int, typer.Option()] = 0,
    peers_: Annotated[str, typer.Option("--peers", help="Whose rule to swap in: as for gated-delta bench.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for serve-sim.csv.")] = None,
    device: Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')] = "auto",
) -> None:
    """Serve a trace of requests by a stack of layers, with our kernels and with peers' swapped in."""
    place = machine.pick_device(device)
    parsed(model, "MODEL", among(MODELS))
    parsed(state, "--state", among(STATES))
    asked = random_trace(requests, rate, prompt, output, seed) if trace is None else read_trace(trace)
    settings = Settings(budget, batch, drafts, acceptance, state, seed)
    names, _ = peers.choose(parsed(peers_, "--peers", str), place)
    names = [name for name in names if name != peers.SEPARATE]
    rows, facts = list[dict[str, str]](), machine.facts(place)
    for name in track(names, "serving", console=wide):
        found = serve(name, model, layers, asked, settings, place) | facts
        rows.append({key: f"{x:.6g}" if isinstance(x, float) else str(x) for key, x in found.items()})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table("", *(row["rule by"] for row in rows), title="serve-sim")
    for key in columns[1:]:
        table.add_row(key, *(row.get(key, "") for row in rows))
    wide.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "serve-sim.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    """Bad input is one sentence and exit status 1."""
    try:
        typer.run(serve_command)
    except GatedDeltaError as error:
        sys.exit(f"serve_sim.py: {error}")


if __name__ == "__main__":
    main()
