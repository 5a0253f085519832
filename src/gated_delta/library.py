"""The operators as torch sees them: a record of each one's arguments, which validation judges, backends take, and torch
has its schema from; fakes, and the way to each backend. Until a call has been judged, anything may stand in its record,
which is why operators ``_make`` them.

An operator writes into tensors that its caller made and returns nothing, so its fake has nothing to say and a
compiler sees every mutation. Implementations are imported when they first run: importing this module imports none.
``Library.define`` and ``impl`` cost a call a quarter of what ``torch.library.custom_op`` does (docs/performance.md).
"""

from functools import cache
from importlib import import_module
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.library import Library, register_fake

from gated_delta.validation.arguments import FLOATS, INDICES

_LIBRARY = Library("gated_delta", "DEF")
_F32 = (torch.float32,)


class Asked(NamedTuple):
    """What an operator asks of a tensor, for :meth:`gated_delta.validation.arguments.Arguments.tensor`."""

    shape: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    argument: str = ""
    """Its name, where the field of the record has another."""
    any_stride: bool = False
    written: bool = False
    whole: bool = False


def _index(shape: str, argument: str = "") -> Asked:
    return Asked(shape, INDICES, argument, any_stride=True)


_HAS_STATE = Asked("N", (torch.bool,), any_stride=True)


class Prefill(NamedTuple):
    """Arguments of ``chunk_gated_delta_rule``; in every record a ``null_slot`` of -1 is none."""

    q: Annotated[Tensor, Asked("L HQ K")]
    k: Annotated[Tensor, Asked("L HK K")]
    v: Annotated[Tensor, Asked("L HV V")]
    g: Annotated[Tensor, Asked("L HS", _F32)] | None
    beta: Annotated[Tensor, Asked("L HS", _F32)] | None
    scale: float
    cu_seqlens: Annotated[Tensor, _index("N+1")]
    initial_state: Annotated[Tensor, Asked("ROWS HS V K")] | None
    has_initial_state: Annotated[Tensor, _HAS_STATE] | None
    state_indices: Annotated[Tensor, _index("N")] | None
    null_slot: int
    in_place: bool
    """The states are read from ``final_state``, and there is no ``initial_state``."""
    use_qk_l2norm: bool
    log_gates: bool
    output: Annotated[Tensor, Asked("L HS V", written=True)]
    zero_padding: bool
    """Rows of the output that belong to no live sequence are zeroed, not left alone."""
    final_state: Annotated[Tensor, Asked("ROWS HS V K", argument="output_state", written=True)] | None
    checkpoints: Annotated[Tensor, Asked("* HS V K", argument="state_checkpoints", written=True)] | None
    checkpoint_starts: Annotated[Tensor, _index("N+1", "checkpoint_cu_starts")] | None
    checkpoint_every: int
    batch_invariant: bool
    """Sequences stay whole, whatever that costs."""

    @property
    def source(self) -> Tensor | None:
        """Where the states come from."""
        return self.final_state if self.in_place else self.initial_state


class Recurrent(NamedTuple):
    """Arguments of the decode operators and several tokens."""

    q: Annotated[Tensor, Asked("B STEPS H K")]
    k: Annotated[Tensor, Asked("B STEPS H K")]
    v: Annotated[Tensor, Asked("B STEPS HV V")]
    state: Annotated[Tensor, Asked("ROWS HV MATRIX", written=True)]
    """One state a row, or the pool when there are ``read_slots``."""
    state_v_first: bool
    """States are ``[V, K]``, not ``[K, V]``."""
    A_log: Annotated[Tensor, Asked("HV", _F32)] | None
    """None, as dt_bias is then: a is the logarithm of alpha, and b is beta."""
    a: Annotated[Tensor, Asked("B STEPS HV")]
    dt_bias: Annotated[Tensor, Asked("HV")] | None
    b: Annotated[Tensor, Asked("B STEPS HV")]
    scale: float
    use_qk_l2norm: bool
    allow_neg_eigval: bool
    read_slots: Annotated[Tensor, _index("B", "initial_state_indices")] | None
    null_slot: int
    update_state: bool
    write_slots: Annotated[Tensor, _index("B", "output_state_indices")] | None
    token_slots: Annotated[Tensor, _index("B T", "ssm_state_indices")] | None
    snapshots: Annotated[Tensor, Asked(">=B >=T HV MATRIX", argument="intermediate_states_buffer", written=True)] | None
    output: Annotated[Tensor, Asked("B STEPS HV V", written=True)]
    zero_padding: bool


class CausalConv1d(NamedTuple):
    """Arguments of ``causal_conv1d``."""

    x: Annotated[Tensor, Asked("INPUTS")]
    weight: Annotated[Tensor, Asked("D W", any_stride=True)]
    bias: Annotated[Tensor, Asked("D")] | None
    conv_states: Annotated[Tensor, Asked("ROWS D *", any_stride=True, written=True)] | None
    cu_seqlens: Annotated[Tensor, _index("N+1")]
    state_indices: Annotated[Tensor, _index("N")] | None
    has_initial_state: Annotated[Tensor, _HAS_STATE] | None
    activate: bool
    """By silu."""
    null_slot: int
    head_k: int
    output: Annotated[Tensor, Asked("TOKENS D", written=True)]


class CausalConv1dUpdate(NamedTuple):
    """Arguments of ``causal_conv1d_update``; x is ``[L, D]`` with ``cu_seqlens``, else ``[N, D]`` or ``[N, T, D]``."""

    x: Annotated[Tensor, Asked("TOKENS D")]
    conv_states: Annotated[Tensor, Asked("ROWS D *", any_stride=True, written=True)]
    weight: Annotated[Tensor, Asked("D W", any_stride=True)]
    bias: Annotated[Tensor, Asked("D")] | None
    activate: bool
    state_indices: Annotated[Tensor, _index("N")] | None
    num_accepted_tokens: Annotated[Tensor, _index("N")] | None
    cu_seqlens: Annotated[Tensor, _index("N+1")] | None
    null_slot: int
    output: Annotated[Tensor, Asked("TOKENS D", written=True)]


class RmsNormGated(NamedTuple):
    """Arguments of ``rms_norm_gated``."""

    x: Annotated[Tensor, Asked("LEADING V")]
    z: Annotated[Tensor, Asked("LEADING V")]
    weight: Annotated[Tensor, Asked("V")]
    eps: float
    activation: str
    output: Annotated[Tensor, Asked("LEADING V", written=True, whole=True)]


class Gates(NamedTuple):
    """Arguments of ``gates``, the logarithms of alpha among them."""

    A_log: Annotated[Tensor, Asked("HV", _F32)]
    a: Annotated[Tensor, Asked("L H R", any_stride=True)]
    dt_bias: Annotated[Tensor, Asked("HV")]
    b: Annotated[Tensor, Asked("L H R", any_stride=True)]
    allow_neg_eigval: bool
    log_alpha: Annotated[Tensor, Asked("L HV", _F32, written=True, whole=True)]
    beta: Annotated[Tensor, Asked("L HV", _F32, written=True, whole=True)]


class GatedDeltaNetStep(NamedTuple):
    """Arguments of ``gated_delta_net_step``."""

    q: Annotated[Tensor, Asked("L H K")]
    k: Annotated[Tensor, Asked("L H K")]
    v: Annotated[Tensor, Asked("L H R V")]
    z: Annotated[Tensor, Asked("L H R V")]
    b: Annotated[Tensor, Asked("L H R")]
    a: Annotated[Tensor, Asked("L H R")]
    conv_states: Annotated[Tensor, Asked("P D C", any_stride=True, written=True)]
    conv_weight: Annotated[Tensor, Asked("D W", any_stride=True)]
    state: Annotated[Tensor, Asked("P HV V K", written=True)]
    A_log: Annotated[Tensor, Asked("HV", _F32)]
    dt_bias: Annotated[Tensor, Asked("HV")]
    norm_weight: Annotated[Tensor, Asked("V")]
    scale: float
    eps: float
    activation: str
    allow_neg_eigval: bool
    state_indices: Annotated[Tensor, _index("SLOTS")]
    cu_seqlens: Annotated[Tensor, _index("N+1")] | None
    num_accepted_tokens: Annotated[Tensor, _index("N")] | None
    tickets: Annotated[Tensor, Asked("P H", (torch.int32,), written=True)] | None
    null_slot: int
    output: Annotated[Tensor, Asked("L HV V", written=True, whole=True)]


TENSORS: dict[type, tuple[tuple[str, bool, Asked], ...]] = {}
"""Of each record: a tensor's field, whether it may be left out, what is asked of it."""


def slot_number(null_slot: int | None) -> int:
    """``null_slot`` as the backends take it: -1 when there is none, since negative slots are padding anyway."""
    return -1 if null_slot is None else null_slot


def is_live(slots: Tensor, null_slot: int) -> Tensor:
    """Which name a slot; the others are padding."""
    return (slots >= 0) & (slots != null_slot)


@cache
def _implementation(operator: str, backend: str) -> Any:
    found = getattr(import_module(f"gated_delta.kernels.{backend}"), operator, None)
    return found if callable(found) else None  # and no module of that name


def tensors(call: Any) -> list[Tensor | None]:
    """Those of a record, in its order."""
    return [getattr(call, name) for name, *_ in TENSORS[type(call)]]


def address(x: Any) -> Any:
    """What a bound launch takes: where a tensor begins. (In Triton's interpreter, the tensor.)"""
    return x.data_ptr() if isinstance(x, Tensor) and x.is_cuda else x


def bound(operator: str, call: Any, backend: str) -> Any:
    """What ``operator`` does with these arguments, which takes where its tensors are; None where a backend has none."""
    bind = _implementation(f"bound_{operator}", backend)
    return None if bind is None else bind(call)


def run(operator: str, call: Any, backend: str) -> None:
    """The operator itself, by a backend."""
    start = bound(operator, call, backend)
    if start is None:
        _implementation(operator, backend)(call)
    else:
        start(*map(address, tensors(call)))


def _schema(record: Any) -> str:
    """The arguments as torch writes them, a letter for each written tensor; notes what is asked of tensors."""
    letters, arguments, tensors = iter("abcd"), [], []
    for name, hint in get_type_hints(record, include_extras=True).items():
        optional = type(None) in get_args(hint)
        kind = get_args(hint)[0] if optional else hint
        word = getattr(kind, "__name__", "")
        for asked in getattr(kind, "__metadata__", ()):
            word = f"Tensor({next(letters)}!)" if asked.written else "Tensor"
            tensors.append((name, optional or name == "output", asked))
        arguments.append(f"{word}{'?' if optional else ''} {name}")
    TENSORS[record] = tuple(tensors)
    return ", ".join(arguments)


def _register(operator: str, record: Any) -> Any:
    _LIBRARY.define(f"{operator}({_schema(record)}, str backend) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(operator, lambda *args: run(operator, record._make(args[:-1]), args[-1]), "CompositeExplicitAutograd")
    register_fake(f"gated_delta::{operator}", lambda *args: None, lib=_LIBRARY)
    return getattr(torch.ops.gated_delta, operator).default


prefill = _register("prefill", Prefill)
recurrent = _register("recurrent", Recurrent)
causal_conv1d = _register("causal_conv1d", CausalConv1d)
causal_conv1d_update = _register("causal_conv1d_update", CausalConv1dUpdate)
rms_norm_gated = _register("rms_norm_gated", RmsNormGated)
gates = _register("gates", Gates)
gated_delta_net_step = _register("gated_delta_net_step", GatedDeltaNetStep)
