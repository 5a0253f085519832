"""One call of an operator, as its arguments came in: what validation judges and the backend is handed."""

from typing import Any, NamedTuple

from torch import Tensor


def slot_number(null_slot: int | None) -> int:
    """``null_slot`` as the backends take it: -1 when there is none, since negative slots are padding anyway."""
    return -1 if null_slot is None else null_slot


class RecurrentCall(NamedTuple):
    """Arguments of the decode operators and of several tokens, by one set of names: options, then tensors."""

    where: str
    """Public name of the operator."""
    scale: float | None
    use_qk_l2norm: bool
    allow_neg_eigval: bool
    backend: str
    update: bool
    """Whether a final state is written."""
    null_slot: int | None
    state_v_first: bool
    """States are ``[V, K]``, not ``[K, V]``."""
    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    """One state a row, or the pool when there are ``read_slots``."""
    A_log: Tensor
    a: Tensor
    dt_bias: Tensor
    b: Tensor
    output: Tensor | None
    read_slots: Tensor | None = None
    """``initial_state_indices``"""
    write_slots: Tensor | None = None
    """``output_state_indices``"""
    token_slots: Tensor | None = None
    """``ssm_state_indices``"""
    snapshots: Tensor | None = None
    """``intermediate_states_buffer``"""

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self[8:]
