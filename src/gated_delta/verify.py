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
    """T >= 1 tokens of every row against states in a pool; a state stays in fp32 between the tokens of one call.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; a, b: ``[B, T, HV]``. These, A_log, dt_bias, scale, output,
            use_qk_l2norm, allow_neg_eigval and backend are as for :func:`gated_delta.gated_delta_rule_decode`.
        initial_state: the pool ``[P, HV, V, K]`` with any slot and head strides, written in place.
        initial_state_indices: ``[B]`` int32 or int64 slots to read; negative ones, and ``null_slot``, are padding.
        intermediate_states_buffer: ``[>=B, >=T, HV, V, K]``: row b, step t receives the state after token t.
        ssm_state_indices: ``[B, T]`` slots for the state after each token; negative: skipped. Needs T >= 2 and
            ``disable_state_update=False``, excludes the buffer; the slot that was read stays intact unless named.
        disable_state_update: True writes no final state. None means True, with a DeprecationWarning.
        output_state_indices: ``[B]`` slots for the final states; where they were read when None (nowhere with
            ``ssm_state_indices``); negative: none.

    Returns:
        The pair (output ``[B, T, HV, V]``, pool).

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    if disable_state_update is None:
        message = "gated_delta_rule_mtp: disable_state_update=None means True today and will mean False; pass one"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        disable_state_update = True
    operators.flag("gated_delta_rule_mtp", "disable_state_update", disable_state_update)
    call = (
        "gated_delta_rule_mtp", scale, use_qk_l2norm, allow_neg_eigval, backend, not disable_state_update, null_slot,
        True, q, k, v, initial_state, A_log, a, dt_bias, b, output, initial_state_indices, output_state_indices,
        ssm_state_indices, intermediate_states_buffer,
    )  # fmt: skip
    operators.needs_slots("gated_delta_rule_mtp", initial_state_indices)
    return run_recurrent(call, state_name="initial_state"), initial_state
