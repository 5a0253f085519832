"""The causal convolution by the signatures of Dao's causal-conv1d (1.7.0), which Transformers speaks, too.

An ``ArgumentError`` meets what is not served: seq_idx, cache_seqlens, and a pool with more than W-1 columns.
"""

import torch
from torch import Tensor

import gated_delta
from gated_delta.errors import ShapeError
from gated_delta.interop import judged


def packed(x: Tensor) -> Tensor:
    """``[B, T, ...]`` as the rows ``[B T, ...]`` that our operators take, copied only where a stride forces it."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def equal_lengths(batch: int, tokens: int, device: torch.device) -> Tensor:
    """``cu_seqlens`` of sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor | None, activation: str | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of ``x [B, T, D]``, or with B = 1 what ``cu_seqlens`` cuts; ``states [N, D, W-1]`` are written."""
    return gated_delta.causal_conv1d(
        packed(x), weight, bias, conv_states=states, state_indices=None, has_initial_state=None, activation=activation,
        cu_seqlens=equal_lengths(x.shape[0], x.shape[1], x.device) if cu_seqlens is None else cu_seqlens,
    ).view(x.shape)  # fmt: skip


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """From x ``[B, D, T]`` and states ``[B, D, W-1]`` the same shape as x; with ``return_final_states`` a pair."""
    judged("causal_conv1d_fn", locals(), {"x": "B D T", "weight": "D W"})
    states = None if initial_states is None else initial_states.clone()
    if return_final_states and states is None:
        states = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    y = convolved(x.mT, weight, bias, states, activation).mT
    if states is None or not return_final_states:
        return y
    return y, states if final_states_out is None else final_states_out.copy_(states)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token ``[B, D]`` or several ``[B, D, T]``; conv_state ``[B, D, C]`` moves left, they come in on its right."""
    shapes = {"x": "B D T" if x.dim() == 3 else "B D", "weight": "D W"}
    shapes["conv_state"] = "B D C" if conv_state_indices is None else "P D C"
    judged("causal_conv1d_update", locals(), shapes)
    columns, past = conv_state.shape[-1], weight.shape[1] - 1
    older, tokens = max(columns - past, 0), x.shape[-1] if x.dim() == 3 else 1  # columns that our operator leaves alone
    if older and conv_state_indices is not None:
        must = f"of {past} columns with conv_state_indices"
        raise ShapeError("causal_conv1d_update", "conv_state", f"of {columns} columns", must)
    moved = conv_state if tokens <= past else torch.cat((conv_state, x), -1)
    moved = moved[..., tokens : tokens + older].clone() if older else None
    rows = x if x.dim() == 2 else x.squeeze(2) if tokens == 1 else x.mT
    y = gated_delta.causal_conv1d_update(
        rows if rows.stride(-1) == 1 else rows.contiguous(), conv_state[..., older:] if older else conv_state, weight,
        bias, activation=activation, state_indices=conv_state_indices,
    )  # fmt: skip
    if moved is not None:
        conv_state[..., :older] = moved
    return y.view(x.shape) if y.dim() == 2 else y.mT
