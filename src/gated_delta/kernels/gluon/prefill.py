"""Prefill on Hopper: one launch, or three where the parts of sequences are worked on side by side. Grids and memory
follow from shapes alone, for CUDA graphs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gated_delta.kernels.gluon.parts import states_before, summary
from gated_delta.kernels.gluon.prefill_kernel import prefill as whole
from gated_delta.kernels.triton.launch import launch, strides

CHUNK = 64
STAGES = 2
REGISTERS, SUMMARY_REGISTERS = (192, 104, 24), (176, 128, 32)
"""Of a thread that keeps half of the state, prepares, loads; that of the other half has what 512 leave. With fewer for
the first two, ptxas makes every product wait for the one before it.
"""
ROWS = 16
"""Values of a state that a program of :func:`states_before` takes."""
CHUNK_US, SUMMARY_US, PART_US, SPLIT_US = 2.3, 1.7, 1.5, 8.0
"""What a chunk takes, a chunk of a summary, a part on the way through a sequence, and two launches more."""


def part_length(total: int, count: int, heads: int, processors: int) -> int:
    """Tokens of a part, or 0 for whole sequences: what is soonest done, if all sequences are as long as the mean."""
    chunks = -(-total // (CHUNK * max(count, 1)))
    best, least = 0, -(-count * heads // processors) * chunks * CHUNK_US
    for parts in range(2, min(chunks, processors) + 1):
        length = -(-chunks // parts)
        waves = -(-2 * count * heads * (parts - 1) // processors), -(-count * heads * parts // processors)
        needed = length * (waves[0] * SUMMARY_US + waves[1] * CHUNK_US) + parts * PART_US + SPLIT_US
        if needed < least:
            best, least = length * CHUNK, needed
    return best


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _one(device: torch.device) -> Tensor:
    """A gate that was left out."""
    return torch.ones(1, device=device)


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
    """``chunk_gated_delta_rule`` for K = V = 128 and activations of 16 bits."""
    (total, heads, _), count = output.shape, cu_seqlens.shape[0] - 1
    source = final_state if in_place else initial_state
    log_gates = log_gates and g is not None
    g, beta = (_one(q.device).expand(total, heads) if x is None else x for x in (g, beta))
    part = part_length(total, count, heads, _processors(q.device))
    constants: dict[str, Any] = {
        "RK": heads // k.shape[1], "RV": heads // v.shape[1], "NORM": use_qk_l2norm, "LOG": log_gates, "PARTS": part > 0,
        "STAGES": STAGES,
    }  # fmt: skip
    places = count
    if part:
        places += total // part
        given = (source, has_initial_state)
        source = _states_before(k, v, g, beta, cu_seqlens, state_indices, null_slot, *given, part, places, constants)
        has_initial_state = None
    args = (
        q, k, v, g, beta, cu_seqlens, state_indices, source, has_initial_state, final_state, checkpoints,
        checkpoint_starts, output, scale, null_slot, total, count, part, checkpoint_every,
        *strides(q, 0, 1), *strides(k, 0, 1), *strides(v, 0, 1), *strides(output, 0, 1), *strides(cu_seqlens, 0),
        *strides(state_indices, 0), *strides(has_initial_state, 0), *strides(checkpoint_starts, 0),
        *strides(source, 0, 1, 2), *strides(final_state, 0, 1, 2), *strides(checkpoints, 0, 1, 2), *strides(g, 0, 1),
        *strides(beta, 0, 1),
    )  # fmt: skip
    own = {"RQ": heads // q.shape[1], "ZERO_PADDING": zero_padding, "REGISTERS": REGISTERS}
    grid = (heads, places + zero_padding)  # the last programs are for the tokens behind the last sequence
    if grid[1] > 0:
        launch(whole, grid, args, constants | own, warps=4)


def _states_before(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, state_indices: Tensor | None, null_slot: int,
    source: Tensor | None, has_initial_state: Tensor | None, part: int, places: int, constants: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The states that parts start from, ``[places, HV, V, K]`` fp32."""
    heads, count = g.shape[1], cu_seqlens.shape[0] - 1
    maps = k.new_empty(places, heads, 2, 128, 128, dtype=torch.float32)
    states = k.new_empty(places, heads, 128, 128, dtype=torch.float32)
    args = (
        k, v, g, beta, cu_seqlens, state_indices, maps, null_slot, count, part, *strides(k, 0, 1), *strides(v, 0, 1),
        *strides(cu_seqlens, 0), *strides(state_indices, 0), *strides(g, 0, 1), *strides(beta, 0, 1),
    )  # fmt: skip
    launch(summary, (heads, places, 2), args, {**constants, "REGISTERS": SUMMARY_REGISTERS}, warps=4)
    args = (
        maps, cu_seqlens, state_indices, source, has_initial_state, states, null_slot, part, *strides(cu_seqlens, 0),
        *strides(state_indices, 0), *strides(has_initial_state, 0), *strides(source, 0, 1, 2),
    )  # fmt: skip
    launch(states_before, (128 // ROWS, heads, count), args, {"ROWS": ROWS}, warps=8)
    return states
