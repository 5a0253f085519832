"""The CPU backend: slots, padding and write-back around the evaluations in :mod:`gated_delta.reference`.

Signatures are those of :mod:`gated_delta.library`. Rows whose slot is padding are left out before anything is
computed, so what they hold (NaN, stale states) reaches nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.kernels.separate import composed


def _live(slots: Tensor | None, null_slot: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that are not padding, and their slots; ``null_slot`` -1 names no slot that is not padding anyway."""
    if slots is None:
        every = torch.arange(rows, device=device)
        return every, every
    live = ((slots >= 0) & (slots != null_slot)).nonzero()[:, 0]
    return live, slots[live].long()


def _write(pool: Tensor, slots: Tensor, values: Tensor, null_slot: int) -> None:
    """``pool[slots] = values`` for the slots that are not padding."""
    kept, slots = _live(slots, null_slot, len(slots), slots.device)
    pool[slots] = values[kept].to(pool.dtype)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    has_initial_state: Tensor | None,
    state_indices: Tensor | None,
    null_slot: int,
    in_place: bool,
    use_qk_l2norm: bool,
    log_gates: bool,
    output: Tensor,
    zero_padding: bool,
    final_state: Tensor | None,
    checkpoints: Tensor | None,
    checkpoint_starts: Tensor | None,
    checkpoint_every: int,
) -> None:
    heads = output.shape[1]
    live, slots = _live(state_indices, null_slot, len(cu_seqlens) - 1, q.device)
    starts = cu_seqlens.tolist()
    spans = [(starts[i], starts[i + 1]) for i in live.tolist()]
    source = final_state if in_place else initial_state
    if source is None:
        state = q.new_zeros(len(spans), heads, v.shape[-1], k.shape[-1], dtype=torch.float32)
    else:
        state = source[slots].float()
        if has_initial_state is not None:  # chosen, not multiplied: an unused slot may hold NaN
            state = torch.where(has_initial_state[live, None, None, None], state, 0.0)
    if use_qk_l2norm:
        q, k = reference.l2norm(q.float()), reference.l2norm(k.float())
    ones = torch.ones((), device=q.device).expand(len(q), heads)
    alpha = ones if g is None else g.exp() if log_gates else g
    if zero_padding:
        output.zero_()
    result = reference.chunked(
        q, k, v, alpha, ones if beta is None else beta, scale, state, spans, checkpoint_every=checkpoint_every,
        out=output, prepare=torch.float64,
    )  # fmt: skip
    if final_state is not None:
        final_state[slots] = result.state.to(final_state.dtype)
    if checkpoints is not None and checkpoint_starts is not None:
        for first, kept in zip(checkpoint_starts[live].tolist(), result.checkpoints, strict=True):
            if kept:
                checkpoints[first : first + len(kept)] = torch.stack(kept).to(checkpoints.dtype)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    state_v_first: bool,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    allow_neg_eigval: bool,
    read_slots: Tensor | None,
    null_slot: int,
    update_state: bool,
    write_slots: Tensor | None,
    token_slots: Tensor | None,
    snapshots: Tensor | None,
    output: Tensor,
    zero_padding: bool,
) -> None:
    live, slots = _live(read_slots, null_slot, len(q), q.device)
    pool = state if state_v_first else state.transpose(-1, -2)
    q, k = q[live].float(), k[live].float()
    if use_qk_l2norm:
        q, k = reference.l2norm(q), reference.l2norm(k)
    alpha = reference.decay(A_log, a[live], dt_bias)
    beta = reference.write_strength(b[live], allow_neg_eigval=allow_neg_eigval)
    every = 0 if snapshots is None and token_slots is None else 1
    result, final, states = reference.recurrent(
        q, k, v[live], alpha, beta, scale, pool[slots].contiguous(), keep_every=every
    )
    if zero_padding:
        output.zero_()
    output[live] = result.to(output.dtype)
    if snapshots is not None:
        for t, after in enumerate(states):
            snapshots[live, t] = after.to(snapshots.dtype)
    if token_slots is not None:
        for t, after in enumerate(states):
            _write(pool, token_slots[live, t], after, null_slot)
    if update_state:
        _write(pool, slots if write_slots is None else write_slots[live], final, null_slot)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor | None,
    cu_seqlens: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    activate: bool,
    null_slot: int,
    output: Tensor,
) -> None:
    if conv_states is None:
        conv_states = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], weight.shape[1] - 1)
    _convolve(
        x, conv_states, weight, bias, activate, state_indices, None, cu_seqlens, null_slot, output, has_initial_state
    )


def causal_conv1d_update(
    x: Tensor,
    conv_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    null_slot: int,
    output: Tensor,
) -> None:
    if cu_seqlens is None:
        steps = 1 if x.dim() == 2 else x.shape[1]
        cu_seqlens = torch.arange(len(x) + 1, device=x.device) * steps
        x, output = x.reshape(-1, x.shape[-1]), output.view(-1, x.shape[-1])
    _convolve(x, conv_states, weight, bias, activate, state_indices, num_accepted_tokens, cu_seqlens, null_slot, output)


def _convolve(
    x: Tensor, conv_states: Tensor, weight: Tensor, bias: Tensor | None, activate: bool, state_indices: Tensor | None,
    accepted: Tensor | None, cu_seqlens: Tensor, null_slot: int, output: Tensor, has_state: Tensor | None = None,
) -> None:  # fmt: skip
    """Both operators: packed sequences that go on from their states, or (``has_state``) start from zeros. Tokens behind
    the last sequence and rows of padding give zeros.
    """
    total, rows, past = int(cu_seqlens[-1]), len(cu_seqlens) - 1, weight.shape[1] - 1
    output[total:] = 0
    x, output = x[:total], output[:total]
    live, slots = _live(state_indices, null_slot, rows, x.device)
    columns = past if accepted is None else conv_states.shape[-1]
    kept = window = conv_states[slots, :, :columns].transpose(1, 2).float()
    if accepted is not None:
        column = accepted[live, None].long() - 1 + torch.arange(past, device=x.device)
        kept = window.gather(1, column[..., None].expand(-1, -1, x.shape[1]))
    if has_state is not None:  # chosen, not multiplied: an unused slot may hold NaN
        kept = torch.where(has_state[live, None, None], kept, 0.0)
    history = x.new_zeros(rows, past, x.shape[1], dtype=torch.float32).index_copy(0, live, kept)
    extended = reference.extend(x, history, cu_seqlens)
    output.copy_(reference.causal_conv1d(extended, weight, bias, "silu" if activate else None))
    if len(live) < rows:
        padding = torch.ones(rows, dtype=torch.bool, device=output.device).index_fill(0, live, False)
        row = torch.searchsorted(extended.starts, extended.tokens, right=True) - 1
        output[padding[row]] = 0
    # The new window begins one input after the history did and ends with the last token (or, where nothing is
    # speculative, is the last W - 1 inputs); columns behind it keep what they hold.
    starts, ends = extended.starts[live], extended.starts[live + 1]
    first_kept = starts + 1 if accepted is not None else ends - past
    source = first_kept[:, None] + torch.arange(columns, device=x.device)
    fresh = source < ends[:, None]
    if accepted is not None:  # a row without tokens keeps what it has
        fresh &= (ends - starts > past)[:, None]
    window = torch.where(fresh[..., None], extended.rows[torch.minimum(source, ends[:, None] - 1)], window)
    conv_states[slots, :, :columns] = window.transpose(1, 2).to(conv_states.dtype)


def rms_norm_gated(x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str, output: Tensor) -> None:
    output.copy_(reference.rms_norm_gated(x, z, weight, eps, activation))


def gated_delta_net_step(*args: Any) -> None:
    composed(sys.modules[__name__], *args)
