"""Warm-up: compile what a model's shapes need before the first request, in parallel processes.

A case is a small call of an operator in each of the forms that engines and our layer use. Worker processes run the
cases first, each its share, and leave what they compile in Triton's disk cache; then this process runs all of them,
which loads the kernels. Afterwards such calls compile nothing.
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gated_delta import dispatch, library
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.conv import causal_conv1d, causal_conv1d_update
from gated_delta.decode import gated_delta_net_step
from gated_delta.errors import WarmupError
from gated_delta.layer import Projected, projection_sizes
from gated_delta.norm import rms_norm_gated
from gated_delta.prefill import gates
from gated_delta.state import StatePool
from gated_delta.validation.arguments import FLOATS, Arguments, describe_dtypes


class Warmed(NamedTuple):
    """What :func:`warmup` did."""

    cases: int
    seconds: float


@dataclass(frozen=True)
class _Shapes:
    """What decides which kernels are needed."""

    config: GatedDeltaNetConfig
    dtype: torch.dtype
    state_dtype: torch.dtype
    max_batch: int
    num_spec: int
    device: str

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def backend(self, operator: str) -> str:
        """Which serves it."""
        sizes, device = (self.config.head_k_dim, self.config.head_v_dim), torch.device(self.device).type
        return dispatch.choose(dispatch.Request(operator, device, self.dtype, *sizes), "auto")


def warmup(
    config: GatedDeltaNetConfig, *, dtype: torch.dtype = torch.bfloat16, state_dtype: torch.dtype = torch.float32,
    max_batch: int = 256, num_spec: int = 0, device: torch.device | str = "cuda", workers: int | None = None,
    progress: bool = True,
) -> Warmed:  # fmt: skip
    """Compile the kernels that a layer of this shape needs, so that no later call compiles.

    Args:
        config: shape of the layer, as this rank sees it (its own heads under tensor parallelism).
        dtype: of activations. state_dtype: of recurrent states.
        max_batch: sequences that decode together at most.
        num_spec: draft tokens a step; 0 without speculation.
        device: a GPU. On the CPU there is nothing to compile.
        workers: processes, as many as there are cores (16 at most) when None; 0 compiles in this process.
        progress: show a bar where rich is installed.

    Returns:
        How many cases were run, and the seconds that took.

    Raises:
        OptionError: a count below its least value, or a dtype that no kernel serves.
        WarmupError: a worker failed; what it said is part of the message.
    """
    args = Arguments("warmup")
    args.whole("max_batch", max_batch, least=1)
    args.whole("num_spec", num_spec, least=0)
    args.whole("workers", workers or 0, least=0)
    for name, value in (("dtype", dtype), ("state_dtype", state_dtype)):
        args.word(name, value, FLOATS, describe_dtypes(FLOATS))
    started = time.perf_counter()
    shapes = _Shapes(config, dtype, state_dtype, max_batch, num_spec, str(device))
    if torch.device(device).type == "cpu":
        return Warmed(0, 0.0)
    cases = len(_cases(shapes))
    count = min(os.cpu_count() or 1, 16, cases) if workers is None else min(workers, cases)
    with _bar(2 * cases if count else cases, progress) as advance:
        if count:
            _in_processes(shapes, count, advance)
        _run(shapes, 0, 1, advance)
    torch.cuda.synchronize(device)
    return Warmed(cases, time.perf_counter() - started)


def _in_processes(shapes: _Shapes, count: int, advance: Callable[[], None]) -> None:
    """Run every case in one of ``count`` processes, for each of which a thread waits."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run_share(first: int) -> None:
        given = f"pickle.loads({pickle.dumps(shapes)!r}), {first}, {count}"
        command = [sys.executable, "-c", f"import pickle; from gated_delta.warmup import _run; _run({given})"]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        if done.returncode:
            raise WarmupError(f"warmup: a worker process failed: {done.stderr.strip()[-2000:]}")
        for _ in _cases(shapes)[first::count]:
            advance()

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(run_share, range(count)))


def _run(shapes: _Shapes, first: int, step: int, advance: Callable[[], None] = lambda: None) -> None:
    """The share of one process: every n-th case."""
    for case in _cases(shapes)[first::step]:
        case()
        advance()


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A progress bar that moves on by one each time it is called."""
    if not wanted or find_spec("rich") is None:  # an extra: the core needs torch alone
        yield lambda: None
        return
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(transient=True) as bar:
        task = bar.add_task("compiling kernels", total=total)
        yield lambda: bar.advance(task)


def _cases(s: _Shapes) -> list[Callable[[], object]]:
    """Every call that is made, slowest to compile first, so that processes share the work evenly."""
    cases: list[Callable[[], object]] = [
        partial(_prefill, s, length, pooled=pooled, known=known)
        for length, pooled, known in product((200, 16), (False, True), (False, True))
    ]
    if s.backend("chunk_gated_delta_rule") == "gluon":  # what it launches follows from its plan alone
        from gated_delta.kernels.gluon.prefill import PLANS, planned  # noqa: PLC0415 (it imports Triton)

        cases = [partial(planned, plan, case) for plan in PLANS for case in cases[:4]]
    for given in (True, False):
        if s.num_spec:
            kept = ("outputs", "final", "slots", "snapshots")
            cases += [partial(_recurrent, s, s.num_spec + 1, given, "pool", form) for form in kept]
        for form in (("pool",), (), ("K-major",)):
            cases.append(partial(_recurrent, s, 1, given, "final", *form))
    cases += [partial(_recurrent, s, 1, False, "final", "ready", *form) for form in ((), ("K-major",))]
    cases += [partial(_step, s, layout, dtype) for layout in ("SD", "DS") for dtype in (s.dtype, torch.float32)]
    return [*cases, partial(_around, s)]


def _recurrent(s: _Shapes, steps: int, given: bool, *form: str) -> None:
    """Decode or several tokens, into a given output or one that is allocated, at every size of batch: what is launched
    depends on it, and asking costs little. ``form``: states in a "pool", "K-major" ones, and what is kept; "ready"
    gates, as the layers of Transformers and FLA have them.

    All rows share one state, which the operators would refuse and nobody reads: the memory for more may be taken.
    """
    c, pooled, v_first, ready = s.config, "pool" in form, "K-major" not in form, "ready" in form
    backend = s.backend("gated_delta_rule_mtp")
    last = (c.head_v_dim, c.head_k_dim) if v_first else (c.head_k_dim, c.head_v_dim)
    state = s.empty(1, c.num_v_heads, *last, dtype=s.state_dtype)
    per_head = None if ready else s.empty(c.num_v_heads, dtype=torch.float32)
    for rows in range(1, s.max_batch + 1):
        q, v = (s.empty(rows, steps, *h) for h in ((c.num_k_heads, c.head_k_dim), (c.num_v_heads, c.head_v_dim)))
        gates, index = s.empty(rows, steps, c.num_v_heads), torch.zeros(rows, steps, dtype=torch.int32, device=s.device)
        library.recurrent(
            q, q, v, state.expand(rows, -1, -1, -1), v_first, per_head, gates.float() if ready else gates, per_head,
            gates, 1.0, True, c.allow_neg_eigval and not ready, index[:, 0] if pooled else None, -1, "final" in form,
            None, index if "slots" in form else None,
            state[None].expand(rows, steps, -1, -1, -1) if "snapshots" in form else None, torch.empty_like(v),
            not given, backend,
        )  # fmt: skip


def _prefill(s: _Shapes, length: int, *, pooled: bool, known: bool) -> None:
    """Sequences of so many tokens as a layer has them (a pool, norms in the kernel), or with states of their own: so
    many that the states fill 256 processors, more than that change nothing. ``known``: it is said which slots of the
    pool hold a state to start from; without a pool, there are such states.
    """
    c = s.config
    for rows in range(1, min(s.max_batch, 256 // c.num_v_heads + 1) + 1):
        q, k, v = c.split_heads(s.empty(rows * length, c.conv_dim))
        states = s.empty(rows, c.num_v_heads, c.head_v_dim, c.head_k_dim, dtype=s.state_dtype)
        gates = s.empty(rows * length, c.num_v_heads, dtype=torch.float32)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=s.device)
        final = states if pooled else torch.empty_like(states, dtype=s.state_dtype if known else torch.float32)
        library.prefill(
            q, k, v, gates, gates, 1.0, starts * length, states if known and not pooled else None,
            starts[1:] == 0 if known and pooled else None, starts[:-1] if pooled else None, -1, pooled, pooled, pooled,
            torch.empty_like(v, memory_format=torch.contiguous_format), not pooled or known, final, None, None, 0,
            False, s.backend("chunk_gated_delta_rule"),
        )  # fmt: skip


def _step(s: _Shapes, conv_layout: str, conv_dtype: torch.dtype) -> None:
    """A layer's fused step, and its speculative one, at every size of batch: rows of padding, which change no state."""
    c, device, options = s.config, s.device, {"conv_layout": conv_layout, "conv_dtype": conv_dtype}
    pool = StatePool(c, layers=1, slots=1, num_spec=s.num_spec, state_dtype=s.state_dtype, device=device, **options)
    state, weight, per_head = pool.layer(0), s.empty(c.conv_dim, c.conv_width), s.empty(c.num_v_heads)
    for rows, steps, dtype in product(range(1, s.max_batch + 1), {1, s.num_spec + 1}, {s.dtype, torch.float32}):
        ragged: dict[str, Any] = {"state_indices": torch.full((rows, steps), -1, dtype=torch.int32, device=device)}
        if steps > 1:
            ragged["cu_seqlens"] = torch.arange(rows + 1, dtype=torch.int32, device=device) * steps
            ragged["num_accepted_tokens"] = torch.ones(rows, dtype=torch.int32, device=device)
        else:
            ragged["state_indices"] = ragged["state_indices"][:, 0]
        heads = Projected(c, tuple(s.empty(rows * steps, size) for size in projection_sizes(c).values())).heads
        gated_delta_net_step(
            *heads, state.conv, weight, state.recurrent, per_head.float(), per_head, s.empty(c.head_v_dim, dtype=dtype),
            eps=c.norm_eps, activation=c.output_gate, allow_neg_eigval=c.allow_neg_eigval, tickets=state.tickets,
            **ragged,
        )  # fmt: skip


def _around(s: _Shapes) -> None:
    """Convolution in all its forms, the gates, and the norm."""
    c, tokens = s.config, s.num_spec + 1
    slots = torch.zeros(1, dtype=torch.int32, device=s.device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=s.device)
    columns = c.conv_width - 1 + s.num_spec
    layouts = s.empty(1, columns, c.conv_dim).mT, s.empty(1, c.conv_dim, columns)
    weight, x = s.empty(c.conv_dim, c.conv_width), s.empty(tokens, c.conv_dim)
    grouped = c.projection == "interleaved"
    inputs = [(x, 0), *([(x.unflatten(1, (c.num_k_heads, -1)), c.head_k_dim)] if grouped else [])]
    for states, dtype in product(layouts, {s.dtype, torch.float32}):
        rows: dict[str, Any] = {"conv_states": states.to(dtype), "weight": weight, "state_indices": slots}
        for known, (given, head_k) in product((None, slots == 0), inputs):
            causal_conv1d(given, **rows, cu_seqlens=starts, has_initial_state=known, head_k=head_k)
        causal_conv1d_update(x[:1], **rows)
        if s.num_spec:
            causal_conv1d_update(x, **rows, num_accepted_tokens=slots + 1, cu_seqlens=starts)
    a, per_head = s.empty(tokens, c.num_k_heads, c.ratio), s.empty(c.num_v_heads, dtype=torch.float32)
    gates(per_head, a, per_head.to(s.dtype), a, allow_neg_eigval=c.allow_neg_eigval)
    for count, dtype in product((1, s.max_batch), {s.dtype, torch.float32}):
        y = s.empty(count, c.num_v_heads, c.head_v_dim)
        rms_norm_gated(y, y, s.empty(c.head_v_dim, dtype=dtype), c.norm_eps, c.output_gate)
