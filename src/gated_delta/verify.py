"""Several tokens a sequence: multi-token prediction and speculative verification."""

from __future__ import annotations

import warnings

from torch import Tensor

from gated_delta.decode import run_recurrent
from gated_delta.validation import operators


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
    output_state_indices: Tensor | None = None,
    *,
    allow_neg_eigval: bool = False,
    null_slot: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """T tokens of every row against states in a pool; the state stays in fp32 between the tokens of one call.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; a, b: ``[B, T, HV]``; any T >= 1. These, A_log, dt_bias, scale,
            output, use_qk_l2norm, allow_neg_eigval and backend are as for :func:`gated_delta.gated_delta_rule_decode`.
        initial_state: the pool ``[P, HV, V, K]`` with any slot and head strides, written in place.
        initial_state_indices: ``[B]`` int32 or int64: slot that each row reads. Negative: padding.
        intermediate_states_buffer: ``[>=B, >=T, HV, V, K]``: row b, step t receives the state after token t of row b.
        ssm_state_indices: ``[B, T]``: slot of the pool that receives the state after each token; negative: skipped.
            Needs T >= 2 and ``disable_state_update=False`` and excludes the buffer. The slot that was read stays
            intact unless it is named.
        disable_state_update: True writes no final state. None means True, with a DeprecationWarning: the default
            will become False.
        output_state_indices: ``[B]``: slot that receives the final state; by default the one that was read, or none
            with ``ssm_state_indices``. Negative: not written.
        null_slot: this slot means padding (read) or not written (write) too.

    Returns:
        The pair (output ``[B, T, HV, V]``, pool). Rows of padding are zero in an output that was allocated here and
        untouched in the caller's.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, OptionError: the argument, what it is, what it must be.
        GradientError: an input requires grad under grad mode.
        BackendError: no such backend, or it cannot serve this call.
        DataError: in checked mode, a slot out of range or written twice.
    """
    if disable_state_update is None:
        message = "gated_delta_rule_mtp: disable_state_update=None means True today and will mean False; pass one"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        disable_state_update = True
    args = operators.recurrent(
        "gated_delta_rule_mtp", "V K", q, k, v, initial_state, A_log, a, dt_bias, b, scale, output,
        initial_state_indices, null_slot, state_name="initial_state",
    )  # fmt: skip
    args.needed("initial_state_indices", initial_state_indices is not None, "initial_state is a pool")
    update = not disable_state_update
    operators.write_back(
        args, initial_state_indices, output_state_indices, ssm_state_indices, intermediate_states_buffer, "V K", update
    )
    if ssm_state_indices is not None and output_state_indices is None:
        update = False
    output = run_recurrent(
        args, q, k, v, initial_state, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, allow_neg_eigval, backend,
        read_slots=initial_state_indices, write_slots=output_state_indices, token_slots=ssm_state_indices,
        snapshots=intermediate_states_buffer, update=update, null_slot=null_slot,
    )  # fmt: skip
    return output, initial_state
