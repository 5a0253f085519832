"""One layer inside a small engine: sequences with planned inputs, steps over them, and what must come out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.state import StatePool
from gated_delta.testing import oracle
from gated_delta.testing.budget import Verdict, judge

torch.set_num_threads(1)  # tensors this small are slower on two threads, and many times slower beside other processes

SMALL = GatedDeltaNetConfig(hidden_size=48, num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=64)
OLMO = GatedDeltaNetConfig(
    hidden_size=48,
    num_k_heads=3,
    num_v_heads=3,
    head_k_dim=96,
    head_v_dim=192,
    projection="flat",
    output_gate="sigmoid",
    allow_neg_eigval=True,
)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_layer(
    config: GatedDeltaNetConfig = SMALL,
    *,
    kind: type[GatedDeltaNetAttention] = GatedDeltaNetAttention,
    dtype: torch.dtype = torch.float32,
) -> GatedDeltaNetAttention:
    """A layer whose q, k, v, z, a and b are about N(0, 1), with heads that forget slowly and heads that forget fast."""
    layer, generator = kind(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for name, weight in layer.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.5 if name == "conv1d.weight" else weight.shape[1] ** -0.5, generator=generator)
    layer.A_log.copy_(torch.logspace(-1.3, 1.2, config.num_v_heads).log())
    layer.dt_bias.uniform_(-4, -1, generator=generator)
    layer.norm.weight.uniform_(0.5, 1.5, generator=generator)
    return layer.to(dtype)


def exact_output(layer: GatedDeltaNetAttention, hidden: Tensor) -> Tensor:
    """The layer token by token in float64: hidden ``[T, hidden]`` from nothing."""
    double = copy.deepcopy(layer).double()
    return double.evaluate(hidden[None].double(), token_by_token=True, dtype=torch.float64)[0]


class Trace(NamedTuple):
    """A plain evaluation of one sequence."""

    output: Tensor
    qkv: Tensor
    """``[T, conv_dim]``: inputs of the convolution."""
    states: Tensor
    """``[T, HV, V, K]``: the state after every token."""


def trace(
    layer: GatedDeltaNetAttention,
    hidden: Tensor,
    *,
    cuts: tuple[int, ...] = (),
    state_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trace:
    """The layer token by token in ``dtype``, rounded where it must store: activations between its stages to the dtype
    of ``hidden``, the state to ``state_dtype`` at every end of a step in ``cuts``.
    """
    c, stored = layer.config, hidden.dtype
    p = layer.project(hidden)
    a, b, z = p.heads.a.flatten(1), p.heads.b.flatten(1), p.heads.z.flatten(1, 2)
    starts, history = torch.tensor([0, len(hidden)]), torch.zeros(1, c.conv_width - 1, c.conv_dim)
    mixed = oracle.conv(p.qkv, layer.conv1d.weight[:, 0], None, history, starts, "silu", dtype=dtype).to(stored)
    q, k, v = (x[None].to(dtype) for x in layer.config.split_heads(mixed))
    q, k = reference.l2norm(q), reference.l2norm(k)
    alpha = reference.decay(layer.A_log, a, layer.dt_bias, dtype=dtype)[None]
    beta = reference.write_strength(b, allow_neg_eigval=c.allow_neg_eigval, dtype=dtype)[None]
    state = torch.zeros(1, c.num_v_heads, c.head_v_dim, c.head_k_dim, dtype=dtype)
    outputs, states = [], []
    for start, end in pairwise(sorted({0, *cuts, len(hidden)})):
        own = slice(start, end)
        given = (q[:, own], k[:, own], v[:, own], alpha[:, own], beta[:, own])
        output, state, kept = reference.recurrent(*given, c.head_k_dim**-0.5, state, keep_every=1, dtype=dtype)
        state = state.to(state_dtype or dtype)
        outputs.append(output[0])
        states += kept
    core = torch.cat(outputs).to(stored)
    normed = reference.rms_norm_gated(core, z, layer.norm.weight, c.norm_eps, c.output_gate, dtype=dtype)
    return Trace(layer.out_proj(normed.flatten(1).to(stored)), p.qkv, torch.cat(states))


@dataclass(eq=False)
class Sequence:
    """Inputs that are known ahead, as if the model had always sampled them, and what became of them so far."""

    hidden: Tensor
    exact: Tensor
    slots: list[int]
    done: int = 0
    accepted: int = 1
    outputs: list[Tensor] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.hidden) - self.done

    def restart(self) -> None:
        """Forget the progress; ``slots`` hold whatever others left there."""
        self.done, self.accepted = 0, 1
        self.outputs.clear()
        self.cuts.clear()


class Move(NamedTuple):
    """A sequence's row of a step. ``kept`` None: a plain row. A number: a speculative row whose first ``kept`` tokens
    are the planned ones; the drafts behind them are wrong and rejected afterwards.
    """

    sequence: Sequence
    tokens: int
    kept: int | None = None


def strided(batch: GatedDeltaNetBatch) -> GatedDeltaNetBatch:
    """The same batch with every index a view of every third element of a wider tensor of rubbish."""

    def view(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape, 3), 99, dtype=x.dtype)
        wide[..., 1] = x
        return wide[..., 1]

    views: dict[str, Any] = {name: view(x) for name, x in vars(batch).items() if isinstance(x, Tensor)}
    return replace(batch, **views)


class Outputs(NamedTuple):
    """Rows of the layer's output: what came out, the plain evaluation, and float64."""

    actual: Tensor
    plain: Tensor
    exact: Tensor


def pooled(parts: Iterable[Outputs]) -> Verdict:
    """One verdict on many rows: the norm magnifies the rounding of a q that is nearly orthogonal to what is stored,
    so that the error of a single row is a matter of luck.
    """
    return judge("outputs", *(torch.cat(rows) for rows in zip(*parts, strict=True)))


class Engine:
    """Runs one layer over a pool that begins full of NaN and is never cleared."""

    def __init__(
        self,
        layer: GatedDeltaNetAttention,
        *,
        slots: int = 24,
        num_spec: int = 0,
        view: Callable[[GatedDeltaNetBatch], GatedDeltaNetBatch] = lambda batch: batch,
        device: str = "cpu",
        **pool: Any,
    ) -> None:
        self.layer, self.num_spec, self._view, self._device = layer, num_spec, view, device
        self._served = layer if device == "cpu" else copy.deepcopy(layer).to(device)
        self.pool = StatePool(layer.config, layers=1, slots=slots, num_spec=num_spec, device=device, **pool)
        self.state = self.pool.layer(0)
        self.state.conv.fill_(torch.nan)
        self.state.recurrent.fill_(torch.nan)
        self.sequences: list[Sequence] = []
        self._generator = torch.Generator().manual_seed(1)

    def add(self, length: int, *, seed: int | None = None) -> Sequence:
        seed = len(self.sequences) if seed is None else seed
        dtype, size = self.layer.dt_bias.dtype, self.layer.config.hidden_size
        hidden = normal(length, size, seed=seed, dtype=dtype)
        sequence = Sequence(hidden, exact_output(self.layer, hidden), self.pool.allocate(self.num_spec + 1))
        self.sequences.append(sequence)
        return sequence

    def row(self, move: Move) -> Row | SpecRow:
        sequence = move.sequence
        if move.kept is None:
            return Row(move.tokens, sequence.slots[0], fresh=sequence.done == 0)
        return SpecRow(move.tokens, sequence.slots, sequence.accepted)

    def step(self, *moves: Move, padding: int = 0, idle: int = 0) -> None:
        """One forward; the outputs of the tokens that are kept are remembered. ``idle`` rows behind the others, and
        ``padding`` tokens behind those, hold NaN and belong to nobody, as where a graph was captured for more.
        """
        inputs, kept = [], [move.tokens if move.kept is None else move.kept for move in moves]
        size, dtype = self.layer.config.hidden_size, self.layer.dt_bias.dtype
        for move, count in zip(moves, kept, strict=True):
            sequence = move.sequence
            inputs.append(sequence.hidden[sequence.done : sequence.done + count])
            inputs.append(torch.randn(move.tokens - count, size, generator=self._generator).to(dtype))
        inputs.append(torch.full((idle + padding, size), torch.nan, dtype=dtype))
        rows = [self.row(move) for move in moves]
        nobody = Row(1, -1) if moves[0].kept is None else SpecRow(1, [-1] * (self.num_spec + 1), 1)
        batch = GatedDeltaNetBatch.build([*rows, *[nobody] * idle], num_spec=self.num_spec, device=self._device)
        output = self._served(torch.cat(inputs).to(self._device), self._view(batch), self.state).cpu()
        assert not output[len(output) - idle - padding :].any()  # NaN counts as any
        at = 0
        for move, count in zip(moves, kept, strict=True):
            sequence = move.sequence
            sequence.outputs.append(output[at : at + count])
            sequence.done += count
            sequence.cuts.append(sequence.done)
            sequence.accepted = 1 if move.kept is None else count
            at += move.tokens

    def compared(self, sequences: Iterable[Sequence]) -> list[Outputs]:
        """Their outputs so far, beside what they should be."""
        compared = []
        for s in sequences:
            plain = trace(self.layer, s.hidden, cuts=tuple(s.cuts), state_dtype=self.state.recurrent.dtype).output
            compared.append(Outputs(torch.cat(s.outputs), plain[: s.done], s.exact[: s.done]))
        return compared

    def verdict(self) -> Verdict:
        """On all outputs of all sequences so far."""
        return pooled(self.compared(s for s in self.sequences if s.done))

    def assert_right(self) -> None:
        verdict = self.verdict()
        assert verdict.within, verdict
