"""The CPU backend: slots, padding and write-back around the evaluations in :mod:`gated_delta.reference`.

Rows whose slot is padding are left out before anything is computed, so what they hold (NaN, stale states) reaches
nothing.
"""

import torch
from torch import Tensor

from gated_delta import library, reference
from gated_delta.kernels.separate import composed
from gated_delta.library import CausalConv1d, CausalConv1dUpdate, GatedDeltaNetStep, Prefill, Recurrent, RmsNormGated


def _live(slots: Tensor | None, null_slot: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that are not padding, and their slots; ``null_slot`` -1 names no slot that is not padding anyway."""
    if slots is None:
        every = torch.arange(rows, device=device)
        return every, every
    live = library.is_live(slots, null_slot).nonzero()[:, 0]
    return live, slots[live].long()


def _write(pool: Tensor, slots: Tensor, values: Tensor, null_slot: int) -> None:
    """``pool[slots] = values`` for the slots that are not padding."""
    kept, slots = _live(slots, null_slot, len(slots), slots.device)
    pool[slots] = values[kept].to(pool.dtype)


def prefill(call: Prefill) -> None:
    q, k, v, g, beta, output, cu_seqlens = call.q, call.k, call.v, call.g, call.beta, call.output, call.cu_seqlens
    heads = output.shape[1]
    live, slots = _live(call.state_indices, call.null_slot, len(cu_seqlens) - 1, q.device)
    starts = cu_seqlens.tolist()
    spans = [(starts[i], starts[i + 1]) for i in live.tolist()]
    if call.source is None:
        state = q.new_zeros(len(spans), heads, v.shape[-1], k.shape[-1], dtype=torch.float32)
    else:
        state = call.source[slots].float()
        if call.has_initial_state is not None:  # chosen, not multiplied: an unused slot may hold NaN
            state = torch.where(call.has_initial_state[live, None, None, None], state, 0.0)
    if call.use_qk_l2norm:
        q, k = reference.l2norm(q.float()), reference.l2norm(k.float())
    ones = torch.ones((), device=q.device).expand(len(q), heads)
    alpha = ones if g is None else g.exp() if call.log_gates else g
    if call.zero_padding:
        output.zero_()
    _, final, checkpoints = reference.chunked(
        q, k, v, alpha, ones if beta is None else beta, call.scale, state, spans,
        checkpoint_every=call.checkpoint_every, out=output, prepare=torch.float64,
    )  # fmt: skip
    if call.final_state is not None:
        call.final_state[slots] = final.to(call.final_state.dtype)
    if call.checkpoints is not None and call.checkpoint_starts is not None:
        for first, kept in zip(call.checkpoint_starts[live].tolist(), checkpoints, strict=True):
            if kept:
                call.checkpoints[first : first + len(kept)] = torch.stack(kept).to(call.checkpoints.dtype)


def recurrent(call: Recurrent) -> None:
    output, snapshots, token_slots, write_slots = call.output, call.snapshots, call.token_slots, call.write_slots
    live, slots = _live(call.read_slots, call.null_slot, len(call.q), call.q.device)
    pool = call.state if call.state_v_first else call.state.transpose(-1, -2)
    q, k = call.q[live].float(), call.k[live].float()
    if call.use_qk_l2norm:
        q, k = reference.l2norm(q), reference.l2norm(k)
    if call.A_log is None or call.dt_bias is None:
        alpha, beta = call.a[live].float().exp(), call.b[live]
    else:
        alpha = reference.decay(call.A_log, call.a[live], call.dt_bias)
        beta = reference.write_strength(call.b[live], allow_neg_eigval=call.allow_neg_eigval)
    every = 0 if snapshots is None and token_slots is None else 1
    result, final, states = reference.recurrent(
        q, k, call.v[live], alpha, beta, call.scale, pool[slots].contiguous(), keep_every=every
    )
    if call.zero_padding:
        output.zero_()
    output[live] = result.to(output.dtype)
    for t, after in enumerate(states):
        if snapshots is not None:
            snapshots[live, t] = after.to(snapshots.dtype)
        if token_slots is not None:
            _write(pool, token_slots[live, t], after, call.null_slot)
    if call.update_state:
        _write(pool, slots if write_slots is None else write_slots[live], final, call.null_slot)


def causal_conv1d(call: CausalConv1d) -> None:
    x, weight, bias, conv_states, cu_seqlens, slots, has_state, activate, null_slot, head_k, output = call
    if head_k:
        x = reference.by_part(x, head_k)
    if conv_states is None:
        conv_states = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], weight.shape[1] - 1)
    update = CausalConv1dUpdate(x, conv_states, weight, bias, activate, slots, None, cu_seqlens, null_slot, output)
    _convolve(update, cu_seqlens, has_state)


def causal_conv1d_update(call: CausalConv1dUpdate) -> None:
    x, output, cu_seqlens = call.x, call.output, call.cu_seqlens
    if cu_seqlens is None:
        cu_seqlens = torch.arange(len(x) + 1, device=x.device) * x.shape[1:-1].numel()
        call = call._replace(x=x.reshape(-1, x.shape[-1]), output=output.view(-1, x.shape[-1]))
    _convolve(call, cu_seqlens)


def _convolve(call: CausalConv1dUpdate, cu_seqlens: Tensor, has_state: Tensor | None = None) -> None:
    """Both operators: packed sequences that go on from their states, or (``has_state``) start from zeros. Tokens behind
    the last sequence and rows of padding give zeros.
    """
    weight, conv_states, accepted = call.weight, call.conv_states, call.num_accepted_tokens
    total, count, past = int(cu_seqlens[-1]), len(cu_seqlens) - 1, weight.shape[1] - 1
    call.output[total:] = 0
    x, output = call.x[:total], call.output[:total]
    live, slots = _live(call.state_indices, call.null_slot, count, x.device)
    columns = past if accepted is None else conv_states.shape[-1]
    kept = window = conv_states[slots, :, :columns].transpose(1, 2).float()
    if accepted is not None:
        column = accepted[live, None].long() - 1 + torch.arange(past, device=x.device)
        kept = window.gather(1, column[..., None].expand(-1, -1, x.shape[1]))
    if has_state is not None:  # chosen, not multiplied: an unused slot may hold NaN
        kept = torch.where(has_state[live, None, None], kept, 0.0)
    history = x.new_zeros(count, past, x.shape[1], dtype=torch.float32).index_copy(0, live, kept)
    rows, starts, tokens = reference.extend(x, history, cu_seqlens)
    output.copy_(reference.causal_conv1d(rows, tokens, weight, call.bias, "silu" if call.activate else None))
    if len(live) < count:
        padding = torch.ones(count, dtype=torch.bool, device=output.device).index_fill(0, live, False)
        output[padding.repeat_interleave(cu_seqlens.diff())] = 0
    # The new window begins one input after the history did and ends with the last token (or, where nothing is
    # speculative, is the last W - 1 inputs); columns behind it keep what they hold.
    starts, ends = starts[live], starts[live + 1]
    first_kept = starts + 1 if accepted is not None else ends - past
    source = first_kept[:, None] + torch.arange(columns, device=x.device)
    fresh = source < ends[:, None]
    if accepted is not None:  # a row without tokens keeps what it has
        fresh &= (ends - starts > past)[:, None]
    window = torch.where(fresh[..., None], rows[torch.minimum(source, ends[:, None] - 1)], window)
    conv_states[slots, :, :columns] = window.transpose(1, 2).to(conv_states.dtype)


def rms_norm_gated(call: RmsNormGated) -> None:
    normed = reference.rms_norm_gated(call.x, call.z, call.weight, call.eps, call.activation)
    call.output.copy_(torch.where(call.x == 0, 0.0, normed))


def gates(call: library.Gates) -> None:
    call.log_alpha.copy_(reference.log_decay(call.A_log, call.a.flatten(1), call.dt_bias))
    call.beta.copy_(reference.write_strength(call.b.flatten(1), allow_neg_eigval=call.allow_neg_eigval))


def gated_delta_net_step(call: GatedDeltaNetStep) -> None:
    composed("cpu", call)
