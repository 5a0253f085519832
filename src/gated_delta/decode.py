"""Decode: one token of every sequence, with the state in either layout."""

from __future__ import annotations

from torch import Tensor

from gated_delta import dispatch, library, reference
from gated_delta.validation import data, operators
from gated_delta.validation.arguments import Arguments


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    *,
    allow_neg_eigval: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of every sequence, states stored ``[B, HV, K, V]`` (V contiguous) and updated in place.

    ``alpha = exp(-exp(A_log) softplus(a + dt_bias))``, ``beta = sigmoid(b)``, then the rule of docs/contract.md
    section 1, all in fp32; value head i uses q and k head ``i // (HV // H)``.

    Args:
        q, k: ``[B, 1, H, K]``; v: ``[B, 1, HV, V]``, one dtype of bf16, fp16, fp32.
        state: ``[B, HV, K, V]`` bf16, fp16 or fp32.
        A_log: ``[HV]`` fp32; a, b: ``[B, 1, HV]``; dt_bias: ``[HV]``.
        scale: factor of the output; ``K ** -0.5`` when None.
        output: where to write, ``[B, 1, HV, V]``; allocated in q's dtype when None.
        use_qk_l2norm: normalise q and k (``x rsqrt(sum x^2 + 1e-6)``) first.
        allow_neg_eigval: ``beta = 2 sigmoid(b)`` (OLMo-hybrid).
        backend: "auto", or a name that :func:`gated_delta.explain` lists.

    Returns:
        The pair (output, state).

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, OptionError: the argument, what it is, what it must be.
        GradientError: an input requires grad under grad mode.
        BackendError: no such backend, or it cannot serve this call.
    """
    args = operators.recurrent(
        "gated_delta_rule_decode", "K V", q, k, v, state, A_log, a, dt_bias, b, scale, output, None, None, single=True
    )
    output = run_recurrent(
        args, q, k, v, state, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, allow_neg_eigval, backend,
        state_v_first=False,
    )  # fmt: skip
    return output, state


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool = False,
    *,
    allow_neg_eigval: bool = False,
    null_slot: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of every sequence (or several, as :func:`gated_delta.gated_delta_rule_mtp`), states stored
    ``[B, HV, V, K]`` (K contiguous) and updated in place: one state a row, or slots of a pool.

    Args:
        q, k, v, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, allow_neg_eigval, backend: as for
            :func:`gated_delta_rule_decode`, with T tokens a row where that has one.
        state: ``[B, HV, V, K]``; None when the states are in a pool.
        initial_state: a pool ``[P, HV, V, K]`` with any slot and head strides, instead of ``state``.
        initial_state_indices: ``[B]`` int32 or int64: slot of each row. Negative: padding.
        output_state_indices: ``[B]``: slot that receives the final state; the one that was read when None. Negative:
            not written.
        intermediate_states_buffer: ``[>=B, >=T, HV, V, K]``: row b, step t receives the state after token t of row b.
        disable_state_update: write no final state.
        null_slot: this slot means padding (read) or not written (write) too.

    Returns:
        The pair (output, ``state`` or the pool). Rows of padding are zero in an output that was allocated here and
        untouched in the caller's.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, OptionError: the argument, what it is, what it must be.
        GradientError: an input requires grad under grad mode.
        BackendError: no such backend, or it cannot serve this call.
        DataError: in checked mode, a slot out of range or written twice.
    """
    states = operators.pool_choice(state, initial_state, initial_state_indices)
    args = operators.recurrent(
        "gated_delta_rule_decode_pretranspose", "V K", q, k, v, states, A_log, a, dt_bias, b, scale, output,
        initial_state_indices, null_slot, state_name="initial_state" if state is None else "state",
    )  # fmt: skip
    update = not disable_state_update
    operators.write_back(
        args, initial_state_indices, output_state_indices, None, intermediate_states_buffer, "V K", update
    )
    output = run_recurrent(
        args, q, k, v, states, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, allow_neg_eigval, backend,
        read_slots=initial_state_indices, write_slots=output_state_indices, snapshots=intermediate_states_buffer,
        update=update, null_slot=null_slot,
    )  # fmt: skip
    return output, states


def run_recurrent(
    args: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None,
    output: Tensor | None,
    use_qk_l2norm: bool,
    allow_neg_eigval: bool,
    backend: str,
    *,
    state_v_first: bool = True,
    read_slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    token_slots: Tensor | None = None,
    snapshots: Tensor | None = None,
    update: bool = True,
    null_slot: int | None = None,
) -> Tensor:
    """What every recurrent operator does once its arguments ``args`` are judged; returns the output."""
    if data.is_checked():
        data.slots(args.where, "initial_state_indices", read_slots, state)
        written = read_slots if write_slots is None else write_slots
        if update:
            name = "initial_state_indices" if write_slots is None else "output_state_indices"
            data.written_slots(args.where, name, written, state, null_slot)
        data.written_slots(args.where, "ssm_state_indices", token_slots, state, null_slot)
    head_k, head_v = args.sizes["K"], args.sizes["V"]
    backend = dispatch.choose(dispatch.Request(args.where, q.device.type, q.dtype, head_k, head_v), backend)
    allocated = output is None
    if output is None:
        output = q.new_empty(v.shape)
    library.recurrent(
        q, k, v, state, state_v_first, A_log, a, dt_bias, b, reference.resolve_scale(scale, head_k),
        use_qk_l2norm, allow_neg_eigval, read_slots, -1 if null_slot is None else null_slot,
        update, write_slots, token_slots, snapshots, output, allocated, backend,
    )  # fmt: skip
    return output
