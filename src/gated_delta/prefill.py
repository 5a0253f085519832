"""Chunked prefill: many tokens of many sequences at once, and its gates."""

from typing import Any

import torch
from torch import Tensor

from gated_delta import dispatch, library, plans, reference
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
    in_place = initial_state is not None and output_state is initial_state
    return plans.run(
        "prefill",
        (scale, null_slot, use_qk_l2norm_in_kernel, g_space, checkpoint_every_n_tokens, deterministic,
         output_final_state, max_seqlen, backend, in_place),
        (q, k, v, g, beta, cu_seqlens, initial_state, has_initial_state, state_indices, output,
         None if in_place else output_state, state_checkpoints, checkpoint_cu_starts),
        _prefill,
    )  # fmt: skip


def _prefill(options: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[library.Prefill, str, Any]:
    """The call, judged; its tensors come in the order of :class:`gated_delta.library.Prefill`."""
    scale, null_slot, l2norm, g_space, every, deterministic, wants_state, max_seqlen, backend, in_place = options
    q, k, v, g, beta, cu_seqlens, initial_state, has_initial_state, indices, output, final, checkpoints, starts = given
    final = initial_state if in_place else final
    call = library.Prefill._make((
        q, k, v, g, beta, scale, cu_seqlens, initial_state, has_initial_state, indices, null_slot, False, l2norm,
        g_space == "log", output, output is None, final, checkpoints, starts, every, deterministic is not None,
    ))  # fmt: skip
    args = operators.prefill(call, wants_state, max_seqlen, g_space, deterministic)
    sizes, backend = args.sizes, dispatch.serving(args, call.q, backend)
    if wants_state and final is None and indices is not None:
        final = initial_state
    if wants_state and final is None:
        dtype = torch.float32 if initial_state is None else initial_state.dtype
        final = call.q.new_empty(sizes["N"], sizes["HS"], sizes["V"], sizes["K"], dtype=dtype)
    in_place = final is not None and final is initial_state
    call = call._replace(
        scale=reference.resolve_scale(scale, sizes["K"]),
        initial_state=None if in_place else initial_state,
        null_slot=library.slot_number(null_slot),
        in_place=in_place,
        output=call.q.new_empty(sizes["L"], sizes["HS"], sizes["V"]) if output is None else output,
        final_state=final,
    )
    if data.is_checked():
        data.prefill(call, max_seqlen)
    return call, backend, (call.output, final) if wants_state else call.output


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
        ArgumentError: it names the argument, what it is and what it must be.
    """
    return plans.run("gates", (allow_neg_eigval, backend), (a, A_log, dt_bias, b), _gates)


def _gates(options: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[library.Gates, str, Any]:
    (allow_neg_eigval, backend), (a, A_log, dt_bias, b) = options, given
    call = library.Gates._make((A_log, a, dt_bias, b, allow_neg_eigval, None, None))
    backend = dispatch.serving(operators.gates(call), a, backend)
    made = tuple(a.new_empty(len(a), len(A_log), dtype=torch.float32) for _ in range(2))
    return library.Gates._make((*call[:5], *made)), backend, made
