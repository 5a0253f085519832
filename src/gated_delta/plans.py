"""Plans: a call like one that was judged before goes straight to its launches.

Judging a call and finding its kernels costs several times what a decode step takes on the GPU. Its result depends on
the options and on what the tensors look like, never on what they hold, so it is kept: options and a first shape find
the plans, and a plan's guards (dtype, device, sizes, strides, whether a gradient is wanted) say whether it fits.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from gated_delta import library
from gated_delta.validation.data import CHECKED

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # another torch: every call is judged
    TensorGuards = None

MOST_KINDS, MOST_ALIKE = 4096, 16
"""Plans are kept for so many options and shapes of q (then all are forgotten), and for so many layouts of each."""


Plans = dict[tuple[Any, ...], list[tuple[Any, Any]]]
"""Guards and launch of each plan, by what :func:`_look` tells of its calls."""
_PLANS: Plans = {}


def run(
    operator: str, options: tuple[Any, ...], given: tuple[Any, ...], judge: Callable[..., tuple[Any, str, Any]]
) -> Any:
    """What an operator gives for these options and tensors. Of both ``judge`` makes its record, the name of the backend
    that serves it, and what is returned; its errors are not kept.
    """
    options = (operator, *options)
    found = find(options, given)
    if found is not None:
        return found[0](given, found[1])
    call, backend, result = judge(options[1:], given)
    start = library.bound(operator, call, backend) if keeps(given) else None
    if start is None:
        getattr(library, operator)(*call, backend)
    else:
        start(*map(library.address, library.tensors(call)))
        keep(options, given, _again(call, given, result, start))
    return result


def judged(options: tuple[Any, ...], given: tuple[Any, ...], judge: Callable[[], object]) -> None:
    """Let ``judge`` look at these, unless it has let pass what looks like them."""
    if find(options, given) is None:
        judge()
        if keeps(given):
            keep(options, given, None)


def _again(call: Any, given: tuple[Any, ...], result: Any, start: Any) -> Callable[..., Any]:
    """The same call with other tensors that look like those ``given``, and where they are."""
    taken = library.tensors(call)
    made = [x for x in taken if x is not None and all(x is not y for y in given)]
    makes = [(x.new_empty(0).new_empty, tuple(x.shape)) for x in made]
    known = [id(x) for x in (*given, *made, None)]
    chosen = itemgetter(*(known.index(id(x)) for x in taken))
    returned = itemgetter(*(known.index(id(x)) for x in (result if isinstance(result, tuple) else (result,))))

    def again(given: Sequence[Any], places: Sequence[Any]) -> Any:
        fresh = [make(shape) for make, shape in makes]
        start(*chosen((*places, *map(library.address, fresh), None)))
        return returned((*given, *fresh))

    return again


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
    for guards, launch in alike:
        if guards.check(*given):
            return launch, addresses if given[0].is_cuda else tensors  # for Triton's interpreter
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
    _PLANS[look] = [*_PLANS.get(look, [])[1 - MOST_ALIKE :], (guards, launch)]


def _look(options: tuple[Any, ...], tensors: Sequence[Any], addresses: Sequence[int | None]) -> tuple[Any, ...]:
    """Options and their types (1 is not True), the shape of the first tensor, which there are and how each is aligned
    (a kernel is compiled for that), whether gradients are on.
    """
    aligned = [x and x % 16 for x in addresses]
    return (options, *map(type, options), tensors[0].shape, *aligned, torch.is_grad_enabled())
