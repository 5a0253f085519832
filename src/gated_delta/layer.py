"""GatedDeltaNetAttention: one Gated Delta Net layer, from hidden states to hidden states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated_delta import plans, reference
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.conv import causal_conv1d
from gated_delta.decode import gated_delta_net_step
from gated_delta.errors import ShapeError
from gated_delta.norm import rms_norm_gated
from gated_delta.parallel import Parallel
from gated_delta.prefill import chunk_gated_delta_rule, gates
from gated_delta.state import LayerState
from gated_delta.validation import data
from gated_delta.validation.arguments import FLOATS, Arguments


class Heads(NamedTuple):
    """Views of ``L`` tokens' inputs by key head, and by the R value heads that belong to it."""

    q: Tensor
    """``[L, Hk, K]``, before the convolution, as k and v."""
    k: Tensor
    v: Tensor
    """``[L, Hk, R, V]``"""
    z: Tensor
    """``[L, Hk, R, V]``: the output gate."""
    b: Tensor
    """``[L, Hk, R]``: write strength before its sigmoid."""
    a: Tensor
    """``[L, Hk, R]``: decay before its softplus."""


@dataclass(frozen=True)
class Projected:
    """What the input projections give for ``L`` tokens, as they gave it."""

    config: GatedDeltaNetConfig
    outputs: tuple[Tensor, ...]
    """``[L, rows of the weight]`` each."""

    @property
    def heads(self) -> Heads:
        c = self.config
        keys, wide = (-1, c.num_k_heads, c.head_k_dim), c.ratio * c.head_v_dim
        values, gates = (-1, c.num_k_heads, c.ratio, c.head_v_dim), (-1, c.num_k_heads, c.ratio)
        joined = self.outputs
        if c.projection == "interleaved":
            sizes = 2 * c.head_k_dim + 2 * wide, 2 * c.ratio
            qkvz, ba = (x.view(-1, c.num_k_heads, size) for x, size in zip(joined, sizes, strict=True))
            q, k, v, z = qkvz.split_with_sizes((c.head_k_dim, c.head_k_dim, wide, wide), -1)
            return Heads(q, k, v.view(values), z.view(values), *ba.split_with_sizes((c.ratio, c.ratio), -1))
        if c.projection == "merged":
            joined = (*joined[0].split((c.conv_dim, c.value_dim), dim=-1), *joined[1].split(c.num_v_heads, dim=-1))
        qkv, z, b, a = joined
        q, k, v = qkv.split_with_sizes((c.key_dim, c.key_dim, c.value_dim), -1)
        return Heads(q.view(keys), k.view(keys), v.view(values), z.view(values), b.view(gates), a.view(gates))

    @property
    def mixed(self) -> tuple[Tensor, int]:
        """The convolution's x and ``head_k``: where they stand, without a copy."""
        c, first = self.config, self.outputs[0]
        if c.projection == "interleaved":
            return first.unflatten(1, (c.num_k_heads, -1))[..., : c.conv_dim // c.num_k_heads], c.head_k_dim
        return first[:, : c.conv_dim], 0

    @property
    def qkv(self) -> Tensor:
        """``[L, conv_dim]``: q, k and v side by side, before the convolution."""
        x, head_k = self.mixed
        return reference.by_part(x, head_k) if head_k else x

    def of(self, tokens: Tensor | slice) -> "Projected":
        """Some of the tokens: everything that belongs to a token moves with it, its gates too."""
        return Projected(self.config, tuple(x[tokens] for x in self.outputs))


def projection_sizes(c: GatedDeltaNetConfig) -> dict[str, int]:
    """The input projections of a layout, and how many outputs each has."""
    if c.projection == "flat":
        gates = dict.fromkeys(("in_proj_b", "in_proj_a"), c.num_v_heads)
        return {"in_proj_qkv": c.conv_dim, "in_proj_z": c.value_dim, **gates}
    return {"in_proj_qkvz": c.conv_dim + c.value_dim, "in_proj_ba": 2 * c.num_v_heads}


class GatedDeltaNetAttention(nn.Module):
    """One Gated Delta Net layer. Parameter names are those of the published checkpoints.

    A projection may be replaced by any module with its inputs and outputs (quantised, with an adapter).

    Args:
        config: shape of the whole layer. ``self.config`` is that of this rank's part.
        parallel: this process among those that share the heads (:mod:`gated_delta.parallel`).

    Raises:
        OptionError: the number of ranks does not divide the heads.
    """

    def __init__(self, config: GatedDeltaNetConfig, parallel: Parallel | None = None) -> None:
        super().__init__()
        self.whole_config, self.parallel = config, parallel or Parallel()
        self.config = c = config.shard(self.parallel.size)
        hidden, gates = c.hidden_size, c.num_v_heads
        for name, size in projection_sizes(c).items():
            setattr(self, name, nn.Linear(hidden, size, bias=False))
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.conv_width, groups=c.conv_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(gates).uniform_(1, 16).log())
        steps = torch.empty(gates).uniform_(1e-3, 1e-1)
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # its softplus is those steps
        self.norm = nn.RMSNorm(c.head_v_dim, eps=c.norm_eps)  # for its weight: rms_norm_gated gates, too
        self.out_proj = nn.Linear(c.value_dim, hidden, bias=False)
        self._probed = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GatedDeltaNetAttention":
        """Dtype casts leave ``A_log`` in fp32: rounded to bf16 it would move the decay by up to 0.7 %."""
        kept = self.A_log.detach()
        super()._apply(fn, recurse)
        if self.A_log.dtype != torch.float32:
            self.A_log.data = kept.to(device=self.A_log.device, dtype=torch.float32)
        return self

    def project(self, hidden: Tensor) -> Projected:
        """Hidden ``[L, hidden]`` -> the inputs of convolution, gates and gated norm.

        Raises:
            ShapeError: a projection gives another shape than the layer's own would.
        """
        sizes = projection_sizes(self.config)
        return Projected(self.config, tuple(self._apply_to(name, hidden, size) for name, size in sizes.items()))

    def _apply_to(self, name: str, x: Tensor, size: int) -> Tensor:
        """``x`` through the projection of that name, which may be anybody's module."""
        y = getattr(self, name)(x)
        if y.shape != (len(x), size):
            was, must = f"of shape {list(y.shape)}", f"[{len(x)}, {size}]"
            raise ShapeError("GatedDeltaNetAttention", f"what {name} gives", was, must)
        return y

    def forward(self, hidden: Tensor, batch: GatedDeltaNetBatch, state: LayerState) -> Tensor:
        """One step: hidden ``[tokens, hidden]`` -> ``[tokens, hidden]``, states updated in place.

        Tokens behind ``batch.num_actual_tokens`` are padding and come out zero.
        """
        actual = batch.num_actual_tokens
        self._judge(hidden, batch, state)
        p = self.project(hidden[:actual])
        c, like = self.config, p.outputs[0]
        make = like.new_empty if batch.num_row_tokens == actual else like.new_zeros
        normed = make(actual, c.num_v_heads, c.head_v_dim)
        plain, spec = self._plain_rows, self._spec_rows
        if batch.num_spec_decodes == 0 or batch.num_prefills == 0:
            (spec if batch.num_spec_decodes else plain)(p, batch, state, normed)
        else:
            for run, tokens in ((spec, batch.spec_token_index), (plain, batch.non_spec_token_index)):
                assert tokens is not None
                part = normed.new_empty(len(tokens), *normed.shape[1:])
                run(p.of(tokens), batch, state, part)
                normed[tokens] = part
        output = self.parallel.total(self.out_proj(normed.flatten(1)))
        return output if actual == len(hidden) else F.pad(output, (0, 0, 0, len(hidden) - actual))

    def _judge(self, hidden: Tensor, batch: GatedDeltaNetBatch, state: LayerState) -> None:
        """What would otherwise be found when a part of the states has been written."""
        slots, actual = batch.spec_state_indices, batch.num_actual_tokens
        columns = 0 if slots is None or not batch.num_spec_decodes else slots.shape[1]
        given = hidden, state.conv, state.recurrent
        plans.judged(("layer", self.config, actual, columns), given, lambda: self._tensors(*given, actual, columns))
        if not torch.compiler.is_compiling() and self._probed != id(self.out_proj):
            self._apply_to("out_proj", hidden.new_zeros(1, self.config.value_dim), self.config.hidden_size)
            self._probed = id(self.out_proj)
        if data.is_checked():
            batch.judge_slots(state.recurrent, state.null_slot)

    def _tensors(self, hidden: Tensor, conv: Tensor, recurrent: Tensor, actual: int, columns: int) -> None:
        """Judge those of a step with so many tokens, and columns of slots."""
        args, c = Arguments("GatedDeltaNetAttention"), self.config
        args.tensor("hidden", hidden, f"L {c.hidden_size}", FLOATS)
        if len(hidden) < actual:
            must = f"of at least num_actual_tokens={actual} tokens"
            raise ShapeError(args.where, "hidden", f"of {len(hidden)} tokens", must)
        for name, size in (("D", c.conv_dim), ("HV", c.num_v_heads), ("V", c.head_v_dim), ("K", c.head_k_dim)):
            args.bind(name, size, "the layer's config")
        args.tensor("state.conv", conv, "P D C", FLOATS, any_stride=True, written=True)
        args.tensor("state.recurrent", recurrent, "P HV V K", FLOATS, written=True)
        most = args.sizes["C"] - c.conv_width + 2
        if columns > most:
            must = f"of at most {most}, as state.conv allows"
            raise ShapeError(args.where, "spec_state_indices", f"of {columns} columns", must)

    @torch.no_grad()
    def warmup(self, state: LayerState, *, max_batch: int = 256) -> None:
        """Run what a step can be, over rows of padding: kernels compile and load, and no state changes.

        Afterwards no step of up to ``max_batch`` rows compiles anything, unless it has a lone prompt of more than 8,192
        tokens, on Hopper. :func:`gated_delta.warmup` compiles most of it before, in several processes.

        Args:
            state: a layer of the pool that will be used; how its memory lies decides what is compiled.
            max_batch: rows that decode or speculate together at most.

        Raises:
            OptionError: ``max_batch`` is below 1.
        """
        Arguments("GatedDeltaNetAttention.warmup").whole("max_batch", max_batch, least=1)
        num_spec = state.conv.shape[-1] - self.config.conv_width + 1

        def run(rows: Sequence[Row | SpecRow]) -> None:
            batch = GatedDeltaNetBatch.build(rows, num_spec=num_spec, device=state.conv.device)
            self(self.dt_bias.new_zeros(batch.num_actual_tokens, self.config.hidden_size), batch, state)

        for rows in range(1, max_batch + 1):
            run([Row(1, -1)] * rows)
            if num_spec:
                run([SpecRow(num_spec + 1, [-1] * (num_spec + 1), 1)] * rows)
        # Prefills of one chunk and of more, of so many sequences that their states fill 256 processors, and long ones,
        # which Hopper has other kernels for. Behind decodes has_initial_state, or the slots too, do not begin at a
        # multiple of 16 bytes.
        prefills = [*product(range(1, 256 * 64 // self.config.value_dim + 3), (16, 70)), (1, 2048), (1, 8192)]
        for (rows, length), decodes in product(prefills, (0, 1, 4)):
            run([Row(1, -1)] * decodes + [Row(length, -1, fresh=True)] * rows)
        if num_spec:
            run([SpecRow(1, [-1], 1), Row(70, -1, fresh=True)])

    def _plain_rows(self, p: Projected, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor) -> None:
        """Decodes, then prefills, each with the operator made for it; ``output`` is ``[tokens, HV, V]``."""
        count, slots = batch.num_decodes, batch.non_spec_state_indices
        assert slots is not None
        if count == len(output) and not batch.num_prefills:  # without views of what is whole
            self._step(p, state, output, state_indices=slots)
        elif count:
            self._step(p.of(slice(count)), state, output[:count], state_indices=slots[:count])
        if batch.num_prefills:
            p, output = (p.of(slice(count, None)), output[count:]) if count else (p, output)
            self._prefill(p, batch, state, output)

    def _spec_rows(self, p: Projected, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor) -> None:
        """Speculative rows, ragged and packed."""
        self._step(
            p, state, output, state_indices=batch.spec_state_indices, cu_seqlens=batch.spec_query_start_loc,
            num_accepted_tokens=batch.num_accepted_tokens,
        )  # fmt: skip

    def _step(self, p: Projected, state: LayerState, output: Tensor, **rows: Any) -> None:
        c = self.config
        gated_delta_net_step(
            *p.heads, state.conv, self.conv1d.weight.squeeze(1), state.recurrent, self.A_log, self.dt_bias,
            self.norm.weight, eps=c.norm_eps, activation=c.output_gate, allow_neg_eigval=c.allow_neg_eigval,
            tickets=state.tickets, null_slot=state.null_slot, output=output, **rows,
        )  # fmt: skip

    def _prefill(self, p: Projected, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor) -> None:
        starts, slots, has = batch.non_spec_query_start_loc, batch.non_spec_state_indices, batch.has_initial_state
        assert starts is not None and slots is not None
        c, heads, first = self.config, p.heads, batch.num_decodes
        if first:
            starts, slots, has = starts[first:] - first, slots[first:], None if has is None else has[first:]
        rows: dict[str, Any] = {
            "cu_seqlens": starts, "state_indices": slots, "has_initial_state": has, "null_slot": state.null_slot,
        }  # fmt: skip
        x, head_k = p.mixed
        g, beta = gates(self.A_log, heads.a, self.dt_bias, heads.b, allow_neg_eigval=c.allow_neg_eigval)
        x = causal_conv1d(x, self.conv1d.weight.squeeze(1), conv_states=state.conv, head_k=head_k, **rows)
        core = self._rule(*c.split_heads(x), g, beta, state.recurrent, **rows)
        core, output = (y.view_as(heads.z) for y in (core, output))  # z grouped as it stands: flattened, it is a copy
        rms_norm_gated(core, heads.z, self.norm.weight, c.norm_eps, c.output_gate, output=output)

    def _rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, **rows: Any) -> Tensor:
        """``[L, HV, V]``, before the norm; g is the logarithm of alpha."""
        given = {"initial_state": pool, "output_state": pool, "use_qk_l2norm_in_kernel": True, **rows}
        output = chunk_gated_delta_rule(q, k, v, g, beta, g_space="log", **given)
        assert isinstance(output, Tensor)
        return output

    def evaluate(self, hidden: Tensor, *, token_by_token: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """The layer in plain torch over whole sequences ``[B, T, hidden]`` that start from nothing.

        Differentiable: what training runs (under autocast its matrix products are in bf16) and, token by token in
        float64, what the serving path is judged by.
        """
        c = self.config
        batch, length, _ = hidden.shape
        p = self.project(hidden.flatten(0, 1))
        heads = p.heads
        starts = torch.arange(batch + 1, device=hidden.device) * length
        history = p.qkv.new_zeros(batch, c.conv_width - 1, c.conv_dim, dtype=dtype)
        rows, _, tokens = reference.extend(p.qkv, history, starts)
        mixed = reference.causal_conv1d(rows, tokens, self.conv1d.weight[:, 0], None, "silu")
        q, k, v = c.split_heads(mixed)
        q, k = reference.l2norm(q), reference.l2norm(k)
        alpha = reference.decay(self.A_log, heads.a.flatten(1), self.dt_bias, dtype=dtype)
        beta = reference.write_strength(heads.b.flatten(1), allow_neg_eigval=c.allow_neg_eigval, dtype=dtype)
        state = mixed.new_zeros(batch, c.num_v_heads, c.head_v_dim, c.head_k_dim)
        scale = c.head_k_dim**-0.5
        if token_by_token:
            q, k, v, alpha, beta = (x.unflatten(0, (batch, length)) for x in (q, k, v, alpha, beta))
            output = reference.recurrent(q, k, v, alpha, beta, scale, state, dtype=dtype)[0].flatten(0, 1)
        else:
            spans = [(i * length, (i + 1) * length) for i in range(batch)]
            output = reference.chunked(q, k, v, alpha, beta, scale, state, spans, dtype=dtype)[0]
        z = heads.z.flatten(1, 2)
        normed = reference.rms_norm_gated(output, z, self.norm.weight, c.norm_eps, c.output_gate, dtype=dtype)
        return self.parallel.total(self.out_proj(normed.flatten(1).to(hidden.dtype))).unflatten(0, (batch, length))
