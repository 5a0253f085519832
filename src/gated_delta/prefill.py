"""Chunked prefill: many tokens of many sequences at once."""

from __future__ import annotations

import torch
from torch import Tensor

from gated_delta import dispatch, library, reference
from gated_delta.validation import data, operators


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    output: Tensor | None = None,
    output_state: Tensor | None = None,
    state_checkpoints: Tensor | None = None,
    checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every_n_tokens: int = 0,
    *,
    g_space: str = "linear",
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    max_seqlen: int | None = None,
    null_slot: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The gated delta rule over packed sequences, ``S <- alpha S + beta (v - alpha S k) k^T``, ``o = scale S q``
    (Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024; docs/contract.md section 1).

    With ``HS = max(HQ, HV)`` state heads; either ``HQ = HK`` divides HV or ``HK = HV`` divides HQ.

    Args:
        q, k, v: ``[L, HQ, K]``, ``[L, HK, K]``, ``[L, HV, V]``, one dtype of bf16, fp16, fp32; K and V in
            {32, 64, 96, 128, 192, 256}. Any strides but the last.
        g: ``[L, HS]`` fp32, the forget gate alpha in [0, 1], or its natural logarithm with ``g_space="log"``;
            ones when left out.
        beta: ``[L, HS]`` fp32 write strength; ones when left out.
        scale: factor of the output; ``K ** -0.5`` when None.
        initial_state: ``[N, HS, V, K]`` bf16, fp16 or fp32, or with ``state_indices`` a pool ``[P, HS, V, K]``.
        output_final_state: also return the final states.
        cu_seqlens: ``[N+1]`` int32 or int64, required: sequence i is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i+1]``.
            Sequences may be empty: their final state is their initial one. Tokens behind the last are padding.
        use_qk_l2norm_in_kernel: normalise q and k (``x rsqrt(sum x^2 + 1e-6)``) first.
        output: where to write, ``[L, HS, V]``; allocated in q's dtype when None.
        output_state: where the final states go, shaped like ``initial_state``. When None and
            ``output_final_state``: the pool ``initial_state`` itself, in place, with ``state_indices``; else a new
            tensor in ``initial_state``'s dtype, or fp32. Without either argument no final state is written.
        state_checkpoints, checkpoint_cu_starts, checkpoint_every_n_tokens: the state after every so many tokens (a
            multiple of 64) of sequence i goes to rows ``checkpoint_cu_starts[i] + j`` of ``[total, HS, V, K]``;
            ``checkpoint_cu_starts`` is ``[N+1]``.
        state_indices: ``[N]`` int32 or int64: slot of each sequence in the pool. Negative: padding.
        has_initial_state: ``[N]`` bool: False starts from zero whatever the slot holds.
        max_seqlen: an upper bound of the lengths, if the host knows one. A hint; it changes no result.
        null_slot: this slot means padding too.
        backend: "auto", or a name that :func:`gated_delta.explain` lists.

    Returns:
        The output, or with ``output_final_state`` the pair (output, final states). Rows of padding are zero in an
        output that was allocated here and untouched in the caller's.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, OptionError: the argument, what it is, what it must be.
        GradientError: an input requires grad under grad mode.
        BackendError: no such backend, or it cannot serve this call.
        DataError: in checked mode, a value on the device that is out of its range.
    """
    args = operators.prefill(
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, output, output_state,
        g_space, state_indices, has_initial_state, max_seqlen, null_slot,
    )  # fmt: skip
    operators.checkpoints(args, state_checkpoints, checkpoint_cu_starts, checkpoint_every_n_tokens)
    assert cu_seqlens is not None
    if data.is_checked():
        data.cu_seqlens(args.where, cu_seqlens, q.shape[0], max_seqlen)
        data.gates(args.where, g, g_space, beta)
        data.slots(args.where, "state_indices", state_indices, initial_state)
        if output_final_state or output_state is not None:
            pool = initial_state if output_state is None else output_state
            data.written_slots(args.where, "state_indices", state_indices, pool, null_slot)
        if state_checkpoints is not None and checkpoint_cu_starts is not None:
            rows = state_checkpoints.shape[0]
            data.checkpoint_rows(args.where, checkpoint_cu_starts, cu_seqlens, checkpoint_every_n_tokens, rows)
    sizes = args.sizes
    request = dispatch.Request(args.where, q.device.type, q.dtype, sizes["K"], sizes["V"])
    backend = dispatch.choose(request, backend)
    allocated = output is None
    if output is None:
        output = q.new_empty(sizes["L"], sizes["HS"], sizes["V"])
    final = output_state
    if final is None and output_final_state:
        if state_indices is not None:
            final = initial_state
        else:
            dtype = torch.float32 if initial_state is None else initial_state.dtype
            final = q.new_empty(sizes["N"], sizes["HS"], sizes["V"], sizes["K"], dtype=dtype)
    in_place = final is not None and final is initial_state
    library.prefill(
        q, k, v, g, beta, reference.resolve_scale(scale, sizes["K"]), cu_seqlens,
        None if in_place else initial_state, has_initial_state, state_indices, -1 if null_slot is None else null_slot,
        in_place, use_qk_l2norm_in_kernel, g_space == "log", output, allocated,
        final, state_checkpoints, checkpoint_cu_starts, checkpoint_every_n_tokens, backend,
    )  # fmt: skip
    if not output_final_state:
        return output
    assert final is not None
    return output, final
