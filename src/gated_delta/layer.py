"""GatedDeltaNetAttention: one Gated Delta Net layer, from hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gated_delta import reference
from gated_delta.batch import GatedDeltaNetBatch
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.conv import causal_conv1d, causal_conv1d_update
from gated_delta.decode import gated_delta_rule_decode_pretranspose
from gated_delta.errors import ShapeError
from gated_delta.norm import rms_norm_gated
from gated_delta.prefill import chunk_gated_delta_rule
from gated_delta.state import LayerState
from gated_delta.validation import data
from gated_delta.verify import gated_delta_rule_mtp


class Projected(NamedTuple):
    """What the input projections give for ``L`` tokens."""

    qkv: Tensor
    """``[L, conv_dim]``: q, k and v side by side, before the convolution."""
    z: Tensor
    """``[L, HV, V]``: the output gate."""
    b: Tensor
    """``[L, HV]``: write strength before its sigmoid."""
    a: Tensor
    """``[L, HV]``: decay before its softplus."""


class GatedRMSNorm(nn.Module):
    """Holds ``norm.weight`` under the name that checkpoints use."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class GatedDeltaNetAttention(nn.Module):
    """One Gated Delta Net layer. Parameter names are those of the published checkpoints."""

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__()
        self.config = c = config
        hidden, gates = c.hidden_size, c.num_v_heads
        if c.projection == "interleaved":
            self.in_proj_qkvz = nn.Linear(hidden, c.conv_dim + c.value_dim, bias=False)
            self.in_proj_ba = nn.Linear(hidden, 2 * gates, bias=False)
        else:
            self.in_proj_qkv = nn.Linear(hidden, c.conv_dim, bias=False)
            self.in_proj_z = nn.Linear(hidden, c.value_dim, bias=False)
            self.in_proj_b = nn.Linear(hidden, gates, bias=False)
            self.in_proj_a = nn.Linear(hidden, gates, bias=False)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.conv_width, groups=c.conv_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(gates).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(_inverse_softplus(torch.empty(gates).uniform_(1e-3, 1e-1)))
        self.norm = GatedRMSNorm(c.head_v_dim)
        self.out_proj = nn.Linear(c.value_dim, hidden, bias=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedDeltaNetAttention:
        """Dtype casts leave ``A_log`` in fp32: rounded to bf16 it would move the decay by up to 0.7 %."""
        kept = self.A_log.detach()
        super()._apply(fn, recurse)
        if self.A_log.dtype != torch.float32:
            self.A_log.data = kept.to(device=self.A_log.device, dtype=torch.float32)
        return self

    def project(self, hidden: Tensor) -> Projected:
        """Hidden ``[L, hidden]`` -> the inputs of convolution, gates and gated norm."""
        c = self.config
        if c.projection == "flat":
            z = self.in_proj_z(hidden).unflatten(-1, (c.num_v_heads, c.head_v_dim))
            return Projected(self.in_proj_qkv(hidden), z, self.in_proj_b(hidden), self.in_proj_a(hidden))
        ratio = c.num_v_heads // c.num_k_heads
        widths = (c.head_k_dim, c.head_k_dim, ratio * c.head_v_dim, ratio * c.head_v_dim)
        grouped = self.in_proj_qkvz(hidden).unflatten(-1, (c.num_k_heads, sum(widths)))
        q, k, v, z = (x.flatten(1) for x in grouped.split(widths, dim=-1))
        b, a = self.in_proj_ba(hidden).unflatten(-1, (c.num_k_heads, 2, ratio)).unbind(-2)
        z = z.unflatten(-1, (c.num_v_heads, c.head_v_dim))
        return Projected(torch.cat((q, k, v), dim=-1), z, b.flatten(1), a.flatten(1))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., conv_dim]`` -> q and k ``[..., Hk, K]``, v ``[..., HV, V]``, all views."""
        c = self.config
        q, k, v = qkv.split((c.key_dim, c.key_dim, c.value_dim), dim=-1)
        heads = (c.num_k_heads, c.head_k_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, (c.num_v_heads, c.head_v_dim))

    def forward(self, hidden: Tensor, batch: GatedDeltaNetBatch, state: LayerState) -> Tensor:
        """One step: hidden ``[tokens, hidden]`` -> ``[tokens, hidden]``, states updated in place.

        Tokens behind ``batch.num_actual_tokens`` are padding and come out zero.
        """
        c = self.config
        actual = batch.num_actual_tokens
        p = self.project(hidden[:actual])
        core = torch.zeros_like(p.z)
        if batch.num_spec_decodes == 0:
            self._plain_rows(p.qkv, p.a, p.b, batch, state, core)
        else:
            assert batch.spec_token_index is not None and batch.non_spec_token_index is not None
            # Everything that belongs to a token moves with it, its gates a and b too.
            spec, plain = batch.spec_token_index, batch.non_spec_token_index
            core[spec] = self._spec_rows(p.qkv[spec], p.a[spec], p.b[spec], batch, state)
            if batch.num_prefills:
                part = torch.zeros_like(core[plain])
                self._plain_rows(p.qkv[plain], p.a[plain], p.b[plain], batch, state, part)
                core[plain] = part
        normed = rms_norm_gated(core, p.z, self.norm.weight, c.norm_eps, c.output_gate)
        output = hidden.new_zeros(hidden.shape)
        output[:actual] = self.out_proj(normed.flatten(1))
        return output

    def _plain_rows(
        self, qkv: Tensor, a: Tensor, b: Tensor, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor
    ) -> None:
        """Decodes, then prefills, each with the operator made for it; ``output`` is ``[tokens, HV, V]``."""
        assert batch.non_spec_query_start_loc is not None and batch.non_spec_state_indices is not None
        decodes, weight = batch.num_decodes, self.conv1d.weight[:, 0]
        if data.is_checked():
            data.decodes_have_history(batch.has_initial_state, decodes)
        slots, null = batch.non_spec_state_indices, state.null_slot
        if decodes:
            rows = slice(0, decodes)
            x = causal_conv1d_update(qkv[rows], state.conv, weight, state_indices=slots[rows], null_slot=null)
            q, k, v = self.split_heads(x[:, None])
            gated_delta_rule_decode_pretranspose(
                q, k, v, None, self.A_log, a[rows, None], self.dt_bias, b[rows, None], output=output[rows, None],
                initial_state=state.recurrent, initial_state_indices=slots[rows], null_slot=null,
                allow_neg_eigval=self.config.allow_neg_eigval,
            )  # fmt: skip
        if batch.num_prefills:
            starts = batch.non_spec_query_start_loc[decodes:] - decodes
            fresh = None if batch.has_initial_state is None else batch.has_initial_state[decodes:]
            self._prefill(
                qkv[decodes:], a[decodes:], b[decodes:], starts, slots[decodes:], fresh, state, output[decodes:]
            )

    def _prefill(
        self,
        qkv: Tensor,
        a: Tensor,
        b: Tensor,
        starts: Tensor,
        slots: Tensor,
        has_initial_state: Tensor | None,
        state: LayerState,
        output: Tensor,
    ) -> None:
        x = causal_conv1d(
            qkv, self.conv1d.weight[:, 0], conv_states=state.conv, cu_seqlens=starts, state_indices=slots,
            has_initial_state=has_initial_state, null_slot=state.null_slot,
        )  # fmt: skip
        chunk_gated_delta_rule(
            *self.split_heads(x),
            reference.decay(self.A_log, a, self.dt_bias),
            reference.write_strength(b, allow_neg_eigval=self.config.allow_neg_eigval),
            initial_state=state.recurrent, output_state=state.recurrent, cu_seqlens=starts,
            use_qk_l2norm_in_kernel=True, output=output, state_indices=slots, has_initial_state=has_initial_state,
            null_slot=state.null_slot,
        )  # fmt: skip

    def _spec_rows(self, qkv: Tensor, a: Tensor, b: Tensor, batch: GatedDeltaNetBatch, state: LayerState) -> Tensor:
        """Speculative rows, ragged in their packed tokens and padded to ``num_spec + 1`` for the operator."""
        starts, slots, accepted = batch.spec_query_start_loc, batch.spec_state_indices, batch.num_accepted_tokens
        assert starts is not None and slots is not None and accepted is not None
        most = state.conv.shape[-1] - self.config.conv_width + 2
        if slots.shape[1] > most:
            was, must = f"of {slots.shape[1]} columns", f"of at most {most}, as the pool's convolution window allows"
            raise ShapeError("GatedDeltaNetAttention", "spec_state_indices", was, must)
        x = causal_conv1d_update(
            qkv, state.conv, self.conv1d.weight[:, 0], state_indices=slots[:, 0], num_accepted_tokens=accepted,
            cu_seqlens=starts, null_slot=state.null_slot,
        )  # fmt: skip
        token = starts[:-1, None] + torch.arange(slots.shape[1], device=x.device)
        exists = token < starts[1:, None]
        token = token.clamp(max=x.shape[0] - 1)
        q, k, v = self.split_heads(x[token])
        output, _ = gated_delta_rule_mtp(
            q, k, v, state.recurrent, slots.gather(1, accepted[:, None].long() - 1)[:, 0], self.A_log, a[token],
            self.dt_bias, b[token], ssm_state_indices=torch.where(exists, slots, -1), disable_state_update=False,
            null_slot=state.null_slot, allow_neg_eigval=self.config.allow_neg_eigval,
        )  # fmt: skip
        packed = torch.arange(x.shape[0], device=x.device, dtype=starts.dtype)
        row = torch.searchsorted(starts.contiguous(), packed, right=True) - 1
        return output[row, packed - starts[row]]

    def evaluate(self, hidden: Tensor, *, token_by_token: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """The layer in plain torch over whole sequences ``[B, T, hidden]`` that start from nothing.

        Differentiable: what training runs (under autocast its matrix products are in bf16) and, token by token in
        float64, what the serving path is judged by.
        """
        c = self.config
        batch, length, _ = hidden.shape
        p = self.project(hidden.flatten(0, 1))
        starts = torch.arange(batch + 1, device=hidden.device) * length
        history = p.qkv.new_zeros(batch, c.conv_width - 1, c.conv_dim, dtype=dtype)
        extended = reference.extend(p.qkv, history, starts)
        mixed = reference.causal_conv1d(extended, self.conv1d.weight[:, 0], None, "silu")
        q, k, v = self.split_heads(mixed)
        q, k = reference.l2norm(q), reference.l2norm(k)
        alpha = reference.decay(self.A_log, p.a, self.dt_bias, dtype=dtype)
        beta = reference.write_strength(p.b, allow_neg_eigval=c.allow_neg_eigval, dtype=dtype)
        state = mixed.new_zeros(batch, c.num_v_heads, c.head_v_dim, c.head_k_dim)
        scale = c.head_k_dim**-0.5
        if token_by_token:
            q, k, v, alpha, beta = (x.unflatten(0, (batch, length)) for x in (q, k, v, alpha, beta))
            output = reference.recurrent(q, k, v, alpha, beta, scale, state, dtype=dtype)[0].flatten(0, 1)
        else:
            spans = [(i * length, (i + 1) * length) for i in range(batch)]
            output = reference.chunked(q, k, v, alpha, beta, scale, state, spans, dtype=dtype).output
        normed = reference.rms_norm_gated(output, p.z, self.norm.weight, c.norm_eps, c.output_gate, dtype=dtype)
        return self.out_proj(normed.flatten(1).to(hidden.dtype)).unflatten(0, (batch, length))


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
