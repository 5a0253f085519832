"""The step of a layer as three operators of another backend: convolution, rule, gated norm."""

import torch

from gated_delta.library import CausalConv1dUpdate, GatedDeltaNetStep, Recurrent, RmsNormGated, is_live, run


def composed(backend: str, call: GatedDeltaNetStep) -> None:
    """The operator by those of a backend. Ragged rows are padded to the longest for the rule."""
    q, k, v, state_indices, accepted = call.q, call.k, call.v, call.state_indices, call.num_accepted_tokens
    cu_seqlens, null_slot, output = call.cu_seqlens, call.null_slot, call.output
    x = torch.cat([y.flatten(1) for y in (q, k, v)], dim=-1)
    slots = state_indices if state_indices.dim() == 2 else state_indices[:, None]
    read = slots[:, 0]
    if accepted is not None:
        read = slots.gather(1, accepted[:, None].long() - 1)[:, 0]
    live = is_live(slots[:, 0], null_slot) & is_live(read, null_slot)
    first, read = (torch.where(live, index, -1) for index in (slots[:, 0], read))
    mixed = torch.empty_like(x)
    window = (call.conv_states, call.conv_weight, None, True, first, accepted, cu_seqlens, null_slot)
    run("causal_conv1d_update", CausalConv1dUpdate(x, *window, mixed), backend)
    row = token = torch.arange(len(x), device=x.device)
    step, at, kept = torch.zeros_like(row), row[:, None], None
    if cu_seqlens is not None:
        row = torch.searchsorted(cu_seqlens.contiguous(), token.to(cu_seqlens.dtype), right=True) - 1
        live, row = live[row.clamp(max=len(slots) - 1)] & (row < len(slots)), row.clamp(max=len(slots) - 1)
        step = token - cu_seqlens[row]
        at = cu_seqlens[:-1, None] + torch.arange(slots.shape[1], device=x.device)
        kept = torch.where(at < cu_seqlens[1:, None], slots, -1)
        at = at.clamp(max=len(x) - 1)
    keys = q.shape[1] * q.shape[2]
    mixed = mixed[at].split((keys, keys, v.shape[1:].numel()), dim=-1)
    core = torch.empty(*at.shape, *output.shape[1:], dtype=x.dtype, device=x.device)
    q, k, v = (y.unflatten(-1, (-1, head.shape[-1])) for y, head in zip(mixed, (q, k, v), strict=True))
    a, b = call.a.flatten(1)[at], call.b.flatten(1)[at]
    rule = Recurrent(
        q, k, v, call.state, True, call.A_log, a, call.dt_bias, b, call.scale, True, call.allow_neg_eigval, read,
        null_slot, kept is None, None, kept, None, core, True,
    )  # fmt: skip
    run("recurrent", rule, backend)
    core, gate = core[row, step % slots.shape[1]], call.z.flatten(1, 2)
    run("rms_norm_gated", RmsNormGated(core, gate, call.norm_weight, call.eps, call.activation, output), backend)
    output.masked_fill_(~live[:, None, None], 0.0)


def gated_delta_net_step(call: GatedDeltaNetStep) -> None:
    """The operator, by Triton's kernels."""
    composed("triton", call)
