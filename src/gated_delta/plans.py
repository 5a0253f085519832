"""Plans: a call of the rule like one that was judged before goes straight to its launches.

Judging a call and finding its kernels costs several times what a decode step takes on the GPU. Its result depends on
the options and on what the tensors look like, never on what they hold, so it is kept: options and the shape of q find
the plans, and a plan's guards (dtype, device, sizes, strides, whether a gradient is wanted) say whether it fits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from gated_delta.validation.data import CHECKED

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # another torch: every call is judged
    TensorGuards = None

MOST_KINDS, MOST_ALIKE = 4096, 16
"""Plans are kept for so many options and shapes of q (then all are forgotten), and for so many layouts of each."""


class Plan(NamedTuple):
    """What calls of one kind need."""

    guards: Any
    tensors: int
    """How many there are to guard."""
    launch: Any


Plans = dict[tuple[Any, ...], list[Plan]]

_PLANS: Plans = {}
_JUDGED: Plans = {}


def _keep(plans: Plans, key: tuple[Any, ...], tensors: Sequence[Tensor], launch: Any) -> None:
    assert TensorGuards is not None
    if len(plans) >= MOST_KINDS:
        plans.clear()
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    plans[key] = [*plans.get(key, [])[1 - MOST_ALIKE :], Plan(guards, len(tensors), launch)]


def judged(call: Sequence[Any], judge: Callable[[], Any]) -> Any:
    """What ``judge`` says of a call (q first); for one like an earlier one, what it said then. Errors are not kept."""
    given = [x for x in call if isinstance(x, Tensor)]
    if TensorGuards is None or _is_watched() or not all(type(x) in (Tensor, torch.nn.Parameter) for x in given):
        return judge()
    try:
        options = (None if isinstance(x, Tensor) else x for x in call)
        key = (len(call[0]), *options, *map(type, call), torch.is_grad_enabled())
        for plan in _JUDGED.get(key, []):
            if plan.guards.check(*given):
                return plan.launch
    except TypeError:  # no tensor, or no hashable option: judging it will say so
        return judge()
    found = judge()
    _keep(_JUDGED, key, given, found)
    return found


def _is_watched() -> bool:
    """Whether a compiler, checked mode or a dispatch mode wants to see the call."""
    return torch.compiler.is_compiling() or CHECKED.get() or torch._C._len_torch_dispatch_stack() > 0


def find(options: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, Sequence[Any]] | None:
    """What was kept for a call like this one, and where its tensors are, else None. They may be left out, but for the
    first.
    """
    if _is_watched():
        return None
    try:
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        alike = _PLANS.get(_look(options, tensors, addresses))
    except (AttributeError, TypeError, RuntimeError):  # no tensor (of memory), or no hashable option: validation's
        return None
    if alike is None:
        return None
    given = [x for x in tensors if x is not None]
    for plan in alike:
        if plan.guards.check(*given):
            return plan.launch, addresses if given[0].is_cuda else tensors  # for Triton's interpreter
    return None


def keeps(tensors: Sequence[Any]) -> bool:
    """Whether something may be kept for a call with these: plain tensors, each once, and nobody watches."""
    if _is_watched() or TensorGuards is None or peek_interpreter_stack() is not None:
        return False
    given = [x for x in tensors if x is not None]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in given)
    return plain and len({id(x) for x in given}) == len(given)


def keep(options: tuple[Any, ...], tensors: Sequence[Tensor | None], launch: Any) -> None:
    """Keep ``launch`` for calls like this one, if :func:`keeps` says so."""
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    _keep(_PLANS, _look(options, tensors, addresses), [x for x in tensors if x is not None], launch)


def _look(options: tuple[Any, ...], tensors: Sequence[Any], addresses: Sequence[int | None]) -> tuple[Any, ...]:
    """Options and their types (1 is not True), the shape of the first tensor, which there are and how each is aligned
    (a kernel is compiled for that), whether gradients are on.
    """
    aligned = [None if x is None else x % 16 for x in addresses]
    return (options, *map(type, options), tensors[0].shape, *aligned, torch.is_grad_enabled())


def run(call: tuple[Any, ...]) -> Tensor | None:
    """Run a call of a recurrent operator for which there is a plan, and return its output, else None."""
    if _is_watched():
        return None
    try:
        plans = _PLANS.get(_key(call))
    except (AttributeError, TypeError):  # no tensor, or no hashable option: validation will say so
        return None
    if plans is None:
        return None
    q, k, v, state, A_log, a, dt_bias, b, output, read, write, token, snapshots = call[8:]
    given = [x for x in call[8:] if x is not None]
    for plan in plans:
        if plan.tensors == len(given) and plan.guards.check(*given):
            into = torch.empty_like(v, memory_format=torch.contiguous_format) if output is None else output
            pq, pk, pv, ps, po = q.data_ptr(), k.data_ptr(), v.data_ptr(), state.data_ptr(), into.data_ptr()
            kept = 0 if snapshots is None else snapshots.data_ptr()
            if (pq | pk | pv | ps | po | kept) % 16:  # what kernels access 16 bytes at a time
                return None
            plan.launch(
                pq, pk, pv, ps, A_log.data_ptr(), a.data_ptr(), dt_bias.data_ptr(), b.data_ptr(), po,
                None if read is None else read.data_ptr(), None if write is None else write.data_ptr(),
                None if token is None else token.data_ptr(), None if snapshots is None else kept,
            )  # fmt: skip
            return into
    return None


def remember(call: tuple[Any, ...], output: Tensor, launch: Any) -> None:
    """Keep ``launch`` for calls like this one, if their tensors' look is all that it depends on."""
    given = [x for x in call[8:] if x is not None]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in given)
    wide = (*call[8:12], output, call[-1])  # q, k, v, state and snapshots
    if TensorGuards is None or _is_watched() or not plain or any(x is not None and x.data_ptr() % 16 for x in wide):
        return
    _keep(_PLANS, _key(call), given, launch)


def _key(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """Options and their types (1 is not True), the shape of q, which tensors there are, whether gradients are on."""
    _, scale, l2norm, neg_eigval, _, _, null_slot, _, q, *_, output, read, write, token, snapshots = call
    return (
        call[:8], type(scale), type(l2norm), type(neg_eigval), type(null_slot), q.shape, output is None, read is None,
        write is None, token is None, snapshots is None, torch.is_grad_enabled(),
    )  # fmt: skip
