"""Causal depthwise convolution with carried state: packed prefill, and the update for decode and speculation."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gated_delta import dispatch, library, plans
from gated_delta.validation import data, operators


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, conv_states: Tensor | None, cu_seqlens: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, activation: str | None = "silu",
    null_slot: int | None = None, head_k: int = 0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal convolution over packed sequences: ``y_t = act(bias + sum_j weight_j x_(t-W+1+j))`` in fp32, with the
    inputs before a sequence's first token taken from its state.

    Args:
        x: ``[L, D]`` bf16, fp16 or fp32; never overwritten. With ``head_k``, ``[L, H, D / H]`` in groups of a key head:
            q and k of ``head_k`` channels each, then its v; all else has the channels of all q, then k, then v.
        weight: ``[D, W]``, W 2 to 5; bias: ``[D]``.
        conv_states: ``[N, D, C]``, or with ``state_indices`` a pool ``[P, D, C]``, ``C >= W-1``, any strides. Columns
            0 to W-2 are the last W-1 inputs, oldest first, before the call and (written in place) after it; further
            columns, which speculation uses, are left alone. None: every sequence starts from zeros and keeps nothing.
        cu_seqlens: ``[N+1]`` int32 or int64. Tokens behind the last sequence are padding.
        state_indices: ``[N]`` int32 or int64: slot of each sequence. Negative: padding.
        has_initial_state: ``[N]`` bool: False starts from zeros whatever the slot holds. None: all True.
        activation: "silu" ("swish" is the same) or None.
        null_slot: this slot means padding too.
        head_k: 0 for an x of ``[L, D]``.
        backend: "auto", or a name that :func:`gated_delta.explain` lists.

    Returns:
        ``[L, D]`` in x's dtype; rows of padding are zero.

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    return plans.run(
        "causal_conv1d", (activation, null_slot, head_k, backend),
        (x, weight, bias, conv_states, cu_seqlens, state_indices, has_initial_state), _prefill,
    )  # fmt: skip


def causal_conv1d_update(
    x: Tensor, conv_states: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
    state_indices: Tensor | None, num_accepted_tokens: Tensor | None = None, cu_seqlens: Tensor | None = None,
    null_slot: int | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The same convolution for rows of one or a few tokens that continue their states.

    Without ``num_accepted_tokens`` the history is columns 0 to W-2, and these hold the last W-1 inputs afterwards.
    With it the state is a window over a speculative step: the history of row i starts at column
    ``num_accepted_tokens[i] - 1``, and a step of n tokens leaves columns 0 to W+n-3 holding the history's last W-2
    inputs and the n tokens, so that the next step can start after any number of accepted ones.

    Args:
        x: ``[N, D]`` (one token a row), ``[N, T, D]``, or with ``cu_seqlens`` ragged rows packed as ``[L, D]``.
        conv_states: as for :func:`causal_conv1d`; a step of n speculative tokens needs ``C >= W+n-2`` columns.
        weight, bias, activation, state_indices, null_slot, backend: as for :func:`causal_conv1d`.
        num_accepted_tokens: ``[N]`` int32 or int64, at least 1: accepted in the previous step, its bonus included.
        cu_seqlens: ``[N+1]``: first token of each ragged row.

    Returns:
        The shape and dtype of x; rows of padding are zero.

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    return plans.run(
        "causal_conv1d_update", (activation, null_slot, backend),
        (x, conv_states, weight, bias, state_indices, num_accepted_tokens, cu_seqlens), _update,
    )  # fmt: skip


def _judged(record: Any, options: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, str, Tensor]:
    """What both do with their arguments, in the order of their ``record``."""
    (activation, *rest, backend), at = options, record._fields.index("activate")
    call = record._make((*given[:at], activation is not None, *given[at:], *rest, None))
    args = operators.conv(call, activation)
    backend = dispatch.serving(args, call.x, backend)
    output = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    if record is library.CausalConv1d:
        output = output.flatten(1)
    call = call._replace(null_slot=library.slot_number(call.null_slot), output=output)
    if data.is_checked():
        data.conv(args.where, call)
    return call, backend, output


_prefill, _update = partial(_judged, library.CausalConv1d), partial(_judged, library.CausalConv1dUpdate)
