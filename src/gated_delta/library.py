"""The operators as torch sees them: a record of each one's arguments, which backends take and which gives torch its
schema with the mutations; fakes, and the way to each backend.

An operator writes into tensors that its caller made and returns nothing, so its fake has nothing to say and a
compiler sees every mutation. Implementations are imported when they first run: importing this module imports none.
``Library.define`` and ``impl`` cost a call a quarter of what ``torch.library.custom_op`` does (docs/performance.md).
"""

from functools import cache
from importlib import import_module
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.library import Library, register_fake

_LIBRARY = Library("gated_delta", "DEF")
Written = Annotated[Tensor, "written"]
"""A tensor that an operator writes into."""


class Prefill(NamedTuple):
    """Arguments of ``chunk_gated_delta_rule``, shapes as there; in every record a ``null_slot`` of -1 is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    scale: float
    cu_seqlens: Tensor
    initial_state: Tensor | None
    has_initial_state: Tensor | None
    state_indices: Tensor | None
    null_slot: int
    in_place: bool
    """The states are read from ``final_state``, and there is no ``initial_state``."""
    use_qk_l2norm: bool
    log_gates: bool
    output: Written
    zero_padding: bool
    """Rows of the output that belong to no live sequence are zeroed, not left alone."""
    final_state: Written | None
    checkpoints: Written | None
    checkpoint_starts: Tensor | None
    checkpoint_every: int
    batch_invariant: bool
    """Sequences stay whole, whatever that costs."""

    @property
    def source(self) -> Tensor | None:
        """Where the states come from."""
        return self.final_state if self.in_place else self.initial_state


class Recurrent(NamedTuple):
    """Arguments of the decode operators and several tokens. ``read_slots`` are there ``initial_state_indices``,
    ``write_slots`` ``output_state_indices``, ``token_slots`` ``ssm_state_indices``, ``snapshots``
    ``intermediate_states_buffer``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state: Written
    """One state a row, or the pool when there are ``read_slots``."""
    state_v_first: bool
    """States are ``[V, K]``, not ``[K, V]``."""
    A_log: Tensor
    a: Tensor
    dt_bias: Tensor
    b: Tensor
    scale: float
    use_qk_l2norm: bool
    allow_neg_eigval: bool
    read_slots: Tensor | None
    null_slot: int
    update_state: bool
    write_slots: Tensor | None
    token_slots: Tensor | None
    snapshots: Written | None
    output: Written
    zero_padding: bool


class CausalConv1d(NamedTuple):
    """Arguments of ``causal_conv1d``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    conv_states: Written | None
    cu_seqlens: Tensor
    state_indices: Tensor | None
    has_initial_state: Tensor | None
    activate: bool
    """By silu."""
    null_slot: int
    head_k: int
    output: Written


class CausalConv1dUpdate(NamedTuple):
    """Arguments of ``causal_conv1d_update``; x is ``[L, D]`` with ``cu_seqlens``, else ``[N, D]`` or ``[N, T, D]``."""

    x: Tensor
    conv_states: Written
    weight: Tensor
    bias: Tensor | None
    activate: bool
    state_indices: Tensor | None
    num_accepted_tokens: Tensor | None
    cu_seqlens: Tensor | None
    null_slot: int
    output: Written


class RmsNormGated(NamedTuple):
    """Arguments of ``rms_norm_gated``."""

    x: Tensor
    z: Tensor
    weight: Tensor
    eps: float
    activation: str
    output: Written


class Gates(NamedTuple):
    """Arguments of ``gates``, the logarithms of alpha among them."""

    A_log: Tensor
    a: Tensor
    dt_bias: Tensor
    b: Tensor
    allow_neg_eigval: bool
    log_alpha: Written
    beta: Written


class GatedDeltaNetStep(NamedTuple):
    """Arguments of ``gated_delta_net_step``."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    conv_states: Written
    conv_weight: Tensor
    state: Written
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    scale: float
    eps: float
    activation: str
    allow_neg_eigval: bool
    state_indices: Tensor
    cu_seqlens: Tensor | None
    num_accepted_tokens: Tensor | None
    tickets: Written | None
    null_slot: int
    output: Written


T = TypeVar("T")


def slot_number(null_slot: int | None) -> int:
    """``null_slot`` as the backends take it: -1 when there is none, since negative slots are padding anyway."""
    return -1 if null_slot is None else null_slot


def given(record: type[T], *args: Any) -> T:
    """A record of arguments as they came in: until a call has been judged, anything may be anywhere."""
    return record(*args)


@cache
def _implementation(operator: str, backend: str) -> Any:
    return getattr(import_module(f"gated_delta.kernels.{backend}"), operator)


def bound_recurrent(call: Recurrent, backend: str) -> Any:
    """A launch of :data:`recurrent` with these arguments that takes only its tensors' pointers."""
    return _implementation("bound_recurrent", backend)(call)


def _schema(record: Any) -> str:
    """The arguments as torch writes them, each written tensor with a letter of its own."""
    letters, arguments = iter("abcd"), []
    for name, hint in get_type_hints(record, include_extras=True).items():
        optional = type(None) in get_args(hint)
        kind = get_args(hint)[0] if optional else hint
        word = f"Tensor({next(letters)}!)" if kind == Written else kind.__name__
        arguments.append(f"{word}{'?' if optional else ''} {name}")
    return ", ".join(arguments)


def _register(operator: str, record: Any) -> Any:
    def run(*args: Any) -> None:
        _implementation(operator, args[-1])(record._make(args[:-1]))

    _LIBRARY.define(f"{operator}({_schema(record)}, str backend) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(operator, run, "CompositeExplicitAutograd")
    register_fake(f"gated_delta::{operator}", lambda *args: None, lib=_LIBRARY)
    return getattr(torch.ops.gated_delta, operator).default


prefill = _register("prefill", Prefill)
recurrent = _register("recurrent", Recurrent)
causal_conv1d = _register("causal_conv1d", CausalConv1d)
causal_conv1d_update = _register("causal_conv1d_update", CausalConv1dUpdate)
rms_norm_gated = _register("rms_norm_gated", RmsNormGated)
gates = _register("gates", Gates)
gated_delta_net_step = _register("gated_delta_net_step", GatedDeltaNetStep)
