"""The causal convolution by the signatures of vLLM 0.33 (``vllm.model_executor.layers.mamba.ops.causal_conv1d``).

What 0.32 has besides, for its own prefix caching, comes last and by name: an ``ArgumentError`` meets it. metadata,
validate_data and max_query_len change no result. Negative slots and null_block_id are padding, with zeros as output.
"""

import torch
from torch import Tensor

import gated_delta
from gated_delta.interop import arguments
from gated_delta.interop.conv import packed


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_states: Tensor, query_start_loc: Tensor,
    cache_indices: Tensor | None = None, has_initial_state: Tensor | None = None, activation: str | None = "silu",
    pad_slot_id: int = -1, null_block_id: int | None = 0, metadata: object = None, validate_data: bool = False, *,
    block_idx_first_scheduled_token: Tensor | None = None, block_idx_last_scheduled_token: Tensor | None = None,
    initial_state_idx: Tensor | None = None, num_computed_tokens: Tensor | None = None, block_size_to_align: int = 0,
) -> Tensor:  # fmt: skip
    """From packed x ``[D, L]`` the same; conv_states ``[P, D, >=W-1]``: read where has_initial_state, written."""
    args = arguments("vllm.causal_conv1d_fn", locals(), {"x": "D L"})
    args.word("pad_slot_id", pad_slot_id, (-1,), "-1: every negative slot is padding here")
    if has_initial_state is None:
        has_initial_state = torch.zeros(len(query_start_loc) - 1, dtype=torch.bool, device=x.device)
    return gated_delta.causal_conv1d(
        packed(x.mT[None]), weight, bias, conv_states=conv_states, cu_seqlens=query_start_loc,
        state_indices=cache_indices, has_initial_state=has_initial_state,
        activation="silu" if activation is True else activation or None,
        null_slot=None if cache_indices is None else null_block_id,
    ).mT  # fmt: skip


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: bool | str | None = None,
    conv_state_indices: Tensor | None = None, num_accepted_tokens: Tensor | None = None,
    query_start_loc: Tensor | None = None, max_query_len: int = -1, null_block_id: int | None = 0,
    validate_data: bool = False, out: Tensor | None = None, *, block_idx_last_scheduled_token: Tensor | None = None,
    initial_state_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token a row ``[N, D]``, several ``[N, D, T]``, or ragged rows ``[L, D]`` by query_start_loc; the result is
    written to ``out``, or to x where that is None.
    """
    spec = "N D T" if x.dim() == 3 else "N D" if query_start_loc is None else "L D"
    args = arguments("vllm.causal_conv1d_update", locals(), {"x": spec})
    args.tensor("out", out, spec, (x.dtype,), optional=True, any_stride=True, written=True)
    y = gated_delta.causal_conv1d_update(
        (x.mT if x.dim() == 3 else x).contiguous(), conv_state, weight, bias,
        activation="silu" if activation is True else activation or None, state_indices=conv_state_indices,
        num_accepted_tokens=num_accepted_tokens, cu_seqlens=query_start_loc,
        null_slot=None if conv_state_indices is None else null_block_id,
    )  # fmt: skip
    return (x if out is None else out).copy_(y.mT if x.dim() == 3 else y)
