"""Chunked prefill: many tokens of many sequences at once, and its gates."""

from typing import Any

import torch
from torch import Tensor

from gated_delta import dispatch, library, reference
from gated_delta.validation import data, operators


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False, output: Tensor | None = None, output_state: Tensor | None = None,
    state_checkpoints: Tensor | None = None, checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every_n_tokens: int = 0, *, g_space: str = "linear", state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, max_seqlen: int | None = None, deterministic: str | None = None,
    null_slot: int | None = None, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule over packed sequences: ``S <- alpha S + beta (v - alpha S k) k^T``, ``o = scale S q``
    (Yang, Kautz, Hatamizadeh 2024). HS = max(HQ, HV) state heads; HQ = HK divides HV, or HK = HV divides HQ.
    docs/contract.md sections 1, 2 and 5 have the rules in full.

    Args:
        q, k, v: ``[L, HQ, K]``, ``[L, HK, K]``, ``[L, HV, V]`` of one dtype: bf16, fp16 or fp32.
        g, beta: ``[L, HS]`` fp32, ones when None; g is alpha in [0, 1], or its logarithm with ``g_space="log"``.
        scale: factor of the output, ``K ** -0.5`` when None.
        initial_state, output_state: ``[N, HS, V, K]``, or pools ``[P, HS, V, K]`` with ``state_indices``; any float
            dtype each. Final states go to ``output_state``; without one, if ``output_final_state``, to the pool
            ``initial_state`` in place, or to a new tensor.
        cu_seqlens: ``[N+1]`` int32 or int64, required: first token of every sequence, which may be empty.
        use_qk_l2norm_in_kernel: normalise q and k first, ``x rsqrt(sum x^2 + 1e-6)``.
        output: ``[L, HS, V]`` to write into; allocated in q's dtype when None.
        state_checkpoints, checkpoint_cu_starts, checkpoint_every_n_tokens: the state after every n tokens (a multiple
            of 64) of sequence i goes to rows ``checkpoint_cu_starts[i] + j`` of ``[total, HS, V, K]``.
        state_indices: ``[N]`` int32 or int64 slots; negative ones, and ``null_slot``, are padding.
        has_initial_state: ``[N]`` bool; False starts from zero whatever the slot holds.
        max_seqlen: an upper bound of the lengths, a hint. backend: "auto", or a name from :func:`explain`.
        deterministic: "batch_invariant": a sequence's bits never depend on what else is in the batch. On Hopper that
            costs long sequences of few heads time; elsewhere it is always so.

    Returns:
        The output, or with ``output_final_state`` the pair (output, final states).

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    call = library.Prefill._make((
        q, k, v, g, beta, scale, cu_seqlens, initial_state, has_initial_state, state_indices, null_slot, False,
        use_qk_l2norm_in_kernel, g_space == "log", output, output is None, output_state, state_checkpoints,
        checkpoint_cu_starts, checkpoint_every_n_tokens, deterministic is not None,
    ))  # fmt: skip
    return _run(call, output_final_state, max_seqlen, backend, g_space=g_space, deterministic=deterministic)


def _run(
    call: library.Prefill, wants_state: bool, max_seqlen: int | None, backend: str, **words: Any
) -> Tensor | tuple[Tensor, Tensor]:
    args = operators.prefill(call, wants_state, max_seqlen, **words)
    q, sizes = call.q, args.sizes
    backend = dispatch.serving(args, q, backend)
    final = call.final_state
    if wants_state and final is None and call.state_indices is not None:
        final = call.initial_state
    if wants_state and final is None:
        dtype = torch.float32 if call.initial_state is None else call.initial_state.dtype
        final = q.new_empty(sizes["N"], sizes["HS"], sizes["V"], sizes["K"], dtype=dtype)
    in_place = final is not None and final is call.initial_state
    call = call._replace(
        scale=reference.resolve_scale(call.scale, sizes["K"]),
        initial_state=None if in_place else call.initial_state,
        null_slot=library.slot_number(call.null_slot),
        in_place=in_place,
        output=q.new_empty(sizes["L"], sizes["HS"], sizes["V"]) if call.zero_padding else call.output,
        final_state=final,
    )
    if data.is_checked():
        data.prefill(call, max_seqlen)
    library.prefill(*call, backend)
    if not wants_state:
        return call.output
    assert final is not None
    return call.output, final


def _final_state(call: library.Prefill, sizes: dict[str, int]) -> Tensor:
    """Where the final states go."""
    if call.final_state is not None:
        return call.final_state
    if call.state_indices is not None and call.initial_state is not None:
        return call.initial_state
    dtype = torch.float32 if call.initial_state is None else call.initial_state.dtype
    return call.q.new_empty(sizes["N"], sizes["HS"], sizes["V"], sizes["K"], dtype=dtype)


def gates(
    A_log: Tensor, a: Tensor, dt_bias: Tensor, b: Tensor, *, allow_neg_eigval: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The logarithm of alpha, and beta, for :func:`chunk_gated_delta_rule`, in one launch.

    Args:
        A_log: ``[H R]`` fp32; dt_bias: ``[H R]``. a, b: ``[L, H, R]``, views of any strides.
        allow_neg_eigval: ``beta = 2 sigmoid(b)``. backend: "auto", "cpu" or "triton".

    Returns:
        Two of ``[L, H R]`` fp32.

    Raises:
        BackendError: no backend serves this dtype and device.
    """
    chosen = dispatch.choose(dispatch.Request("gates", a.device.type, a.dtype, 0, 0), backend)
    log_alpha, beta = (A_log.new_empty(len(a), len(A_log), dtype=torch.float32) for _ in range(2))
    library.gates(A_log, a, dt_bias, b, allow_neg_eigval, log_alpha, beta, chosen)
    return log_alpha, beta
