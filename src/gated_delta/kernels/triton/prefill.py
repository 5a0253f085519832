"""Prefill on a GPU, and its gates: kernels and tiles. Grids and memory follow from shapes alone, for CUDA graphs."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gated_delta.errors import BackendError
from gated_delta.kernels.triton.launch import Launches, Start, power_of_2, strides
from gated_delta.kernels.triton.prefill_chain import chain
from gated_delta.kernels.triton.prefill_prepare import CHUNK, VECTORS, prepare
from gated_delta.kernels.triton.shared import log_gates
from gated_delta.library import Gates, Prefill, tensors


class Tiles(NamedTuple):
    """How a kernel is run."""

    columns: int
    """Chunks: columns of q and k at a time. Scans: columns of the state that a program keeps."""
    warps: int
    stages: int
    """Iterations whose loads are under way, and that many again less one."""


MOST_SEQUENCES = 65534
"""What a dimension of a grid has room for, less the one for the tokens behind the last sequence."""
PREPARE = Tiles(128, 4, 1)
TOKENS = Tiles(8, 1, 4)
"""The same for any batch: sums over K take the order that the tile gives them."""
GATES = 1024
"""Gates that a program makes."""


@triton.jit(do_not_specialize=["size"])
def _gates_kernel(
    A_log, a, dt_bias, b, log_alpha, beta, a_token, a_group, a_head, b_token, b_group, b_head, size,
    HV: tl.constexpr, R: tl.constexpr, NEG_EIGVAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gates of all tokens and heads in one launch, where torch would make a dozen."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, token, head = i < size, i // HV, i % HV
    group, sibling = head // R, head % R
    a_i = tl.load(a + token * a_token + group * a_group + sibling * a_head, mask=inside, other=0.0)
    b_i = tl.load(b + token * b_token + group * b_group + sibling * b_head, mask=inside, other=0.0)
    A, bias = tl.load(A_log + head), tl.load(dt_bias + head)
    log_decay, strength = log_gates(a_i, b_i, A, bias, NEG_EIGVAL)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(log_alpha + i, log_decay, mask=inside)
    tl.store(beta + i, strength, mask=inside)


def chain_tiles(head_k: int, head_v: int, states: int, single: bool, shared: int, processors: int) -> Tiles:
    """Tiles of the scan of ``states`` states on a device with so many bytes of shared memory for a program: as narrow
    as a single wave of programs allows, for a narrow chunk is done sooner; wide where states fill all processors. There
    a ``single`` chunk a sequence needs nothing on its way while it is worked on, but more programs on a processor.
    """
    keys = power_of_2(head_k)
    fits = [columns for columns in (16, 32, 64) if states * -(-head_v // columns) <= processors]
    columns = 32 if head_v <= 32 or keys > 128 else min(fits, default=64)
    most = 1 if single and not fits else 3
    for stages in (3, 2, 1):
        left = 2 * (3 * CHUNK * keys + CHUNK * CHUNK)  # q, k, X and P' of a chunk
        right = 2 * CHUNK * columns + 8 * CHUNK + 4  # v and factors
        if stages <= most and stages * left + (stages - 1) * right + 2 * keys * columns <= shared:
            break
    return Tiles(columns, 8 if keys > 128 else 4, stages)


@cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that a program may take, beyond measure in Triton's interpreter; processors."""
    if device.type != "cuda":
        return 1 << 30, 1
    utils: Any = triton.runtime.driver.active.utils  # pyright: ignore[reportAttributeAccessIssue]
    shared = utils.get_device_properties(device.index)["max_shared_mem"]
    return shared, torch.cuda.get_device_properties(device).multi_processor_count


def bound_prefill(call: Prefill) -> Start:
    """The operator, which takes the addresses of its tensors."""
    launches = Launches(*tensors(call))
    q, k, v, cu_seqlens, output, source = call.q, call.k, call.v, call.cu_seqlens, call.output, call.source
    (total, heads, head_v), head_k, count = output.shape, q.shape[2], cu_seqlens.shape[0] - 1
    if count > MOST_SEQUENCES:
        was, must = f"of {count} sequences", f"of at most {MOST_SEQUENCES} for the backend triton"
        raise BackendError("chunk_gated_delta_rule", "cu_seqlens", was, must)
    gates = {"NORM": call.use_qk_l2norm, "LOG": call.log_gates}
    ratios = {"RQ": heads // q.shape[1], "RK": heads // k.shape[1]}
    if q.dtype == torch.float32:
        tiles, g, beta, work, vectors = TOKENS, call.g, call.beta, None, None
    else:
        tiles = chain_tiles(head_k, head_v, count * heads, total <= count * CHUNK, *_limits(q.device))
        # What every chunk does: X^T and P', and their vectors.
        slots = total // CHUNK + count
        work = launches.scratch(slots, heads, head_k + CHUNK, CHUNK, dtype=q.dtype)
        vectors = launches.scratch(slots, heads, VECTORS, dtype=torch.float32)
        args = (
            q, k, call.g, call.beta, cu_seqlens, call.state_indices, work, vectors, call.null_slot, count,
            *strides(q, 0, 1), *strides(k, 0, 1), *strides(call.g, 0), *strides(call.beta, 0),
            *strides(cu_seqlens, 0), *strides(call.state_indices, 0),
        )  # fmt: skip
        constants = {**ratios, "K": head_k, "BC": min(PREPARE.columns, power_of_2(head_k)), **gates}
        if count > 0:
            launches.add(prepare, (slots, heads), args, constants, warps=PREPARE.warps, stages=PREPARE.stages)
        g, beta, gates = None, None, dict.fromkeys(gates, False)
    args = (
        q, k, v, g, beta, work, vectors, cu_seqlens, call.state_indices, source, call.has_initial_state,
        call.final_state, call.checkpoints, call.checkpoint_starts, output, call.scale, call.null_slot, total, count,
        call.checkpoint_every,
        *strides(q, 0, 1), *strides(k, 0, 1), *strides(v, 0, 1), *strides(g, 0), *strides(beta, 0),
        *strides(output, 0, 1), *strides(cu_seqlens, 0), *strides(call.state_indices, 0),
        *strides(call.has_initial_state, 0), *strides(call.checkpoint_starts, 0), *strides(source, 0, 1, 2),
        *strides(call.final_state, 0, 1, 2), *strides(call.checkpoints, 0, 1, 2),
    )  # fmt: skip
    constants = {
        **ratios, "RV": heads // v.shape[1], "K": head_k, "V": head_v, "BK": power_of_2(head_k),
        "BV": tiles.columns, "STAGES": tiles.stages, "ZERO_PADDING": call.zero_padding, **gates,
    }  # fmt: skip
    # Where padding is to be zero, one more sequence: the tokens behind the last.
    grid = (-(-head_v // tiles.columns), heads, count + call.zero_padding)
    launches.add(chain, grid, args, constants, warps=tiles.warps, stages=tiles.stages)
    return launches.bound()


def bound_gates(call: Gates) -> Start:
    launches, (A_log, a, dt_bias, b, allow_neg_eigval, log_alpha, beta) = Launches(*tensors(call)), call
    size, heads = log_alpha.shape
    launches.add(
        _gates_kernel, (-(-size * heads // GATES),),
        (A_log, a, dt_bias, b, log_alpha, beta, *a.stride(), *b.stride(), size * heads),
        {"HV": heads, "R": a.shape[2], "NEG_EIGVAL": allow_neg_eigval, "BLOCK": GATES}, warps=4,
    )  # fmt: skip
    return launches.bound()
