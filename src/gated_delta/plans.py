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
    launch: Any


Plans = dict[tuple[Any, ...], list[Plan]]

_PLANS: Plans = {}


def judged(call: Sequence[Any], judge: Callable[[], Any]) -> Any:
    """What ``judge`` says of a call (q first); for one like an earlier one, what it said then. Errors are not kept."""
    tensors = [x if isinstance(x, Tensor) else None for x in call]
    options = tuple([None if isinstance(x, Tensor) else x for x in call])
    found = find(options, tensors)
    if found is not None:
        return found[0]
    said = judge()
    if keeps(tensors):
        keep(options, tensors, said)
    return said


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
    assert TensorGuards is not None
    if len(_PLANS) >= MOST_KINDS:
        _PLANS.clear()
    given = [x for x in tensors if x is not None]
    guards = TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    look = _look(options, tensors, [None if x is None else x.data_ptr() for x in tensors])
    _PLANS[look] = [*_PLANS.get(look, [])[1 - MOST_ALIKE :], Plan(guards, launch)]


def _look(options: tuple[Any, ...], tensors: Sequence[Any], addresses: Sequence[int | None]) -> tuple[Any, ...]:
    """Options and their types (1 is not True), the shape of the first tensor, which there are and how each is aligned
    (a kernel is compiled for that), whether gradients are on.
    """
    aligned = [x and x % 16 for x in addresses]
    return (options, *map(type, options), tensors[0].shape, *aligned, torch.is_grad_enabled())
