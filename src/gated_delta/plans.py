"""Plans: a recurrent call like one that was judged before goes straight to its launch.

Judging a call and finding its kernel costs several times what a decode step takes on the GPU. Its result depends on the
options and on what the tensors look like, never on what they hold, so it is kept: the options and the shape of q find
the plans, and a plan's guards (dtype, device, sizes, strides, whether a gradient is wanted) say whether it fits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gated_delta.calls import RecurrentCall
from gated_delta.validation import data

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
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


_PLANS: dict[tuple[Any, ...], list[Plan]] = {}


def _is_watched() -> bool:
    """Whether a compiler, a dispatch mode or checked mode wants to see the call."""
    return torch.compiler.is_compiling() or data.is_checked() or torch._C._len_torch_dispatch_stack() > 0


def run(call: RecurrentCall) -> Tensor | None:
    """Run a call for which there is a plan, and return its output; None if there is none."""
    if _is_watched():
        return None
    try:
        plans = _PLANS.get(_key(call))
    except (AttributeError, TypeError):  # no tensor, or no hashable option: validation will say so
        return None
    if plans is None:
        return None
    given = [x for x in call.tensors if x is not None]
    for plan in plans:
        if plan.tensors == len(given) and plan.guards.check(*given):
            return _start(plan, *call.tensors)
    return None


def _start(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    output: Tensor | None,
    *optional: Tensor | None,
) -> Tensor | None:
    if output is None:
        output = torch.empty(plan.shape, dtype=plan.dtype, device=plan.device)
    wide = q.data_ptr(), k.data_ptr(), v.data_ptr(), state.data_ptr()
    into, others = output.data_ptr(), [None if x is None else x.data_ptr() for x in optional]
    # What kernels access 16 bytes at a time; the last one are the snapshots.
    if (wide[0] | wide[1] | wide[2] | wide[3] | into | (others[-1] or 0)) % 16:
        return None
    plan.launch(*wide, A_log.data_ptr(), a.data_ptr(), dt_bias.data_ptr(), b.data_ptr(), into, *others)
    return output


def remember(call: RecurrentCall, output: Tensor, launch: Any) -> None:
    """Keep ``launch`` for calls like this one, if their tensors' look is all that it depends on."""
    given = [x for x in call.tensors if x is not None]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in given)
    wide = (call.q, call.k, call.v, call.state, output, call.snapshots)
    if TensorGuards is None or _is_watched() or not plain or any(x is not None and x.data_ptr() % 16 for x in wide):
        return
    if len(_PLANS) >= MOST_KINDS:
        _PLANS.clear()
    guards = TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    alike = _PLANS.setdefault(_key(call), [])
    del alike[: max(0, len(alike) - MOST_ALIKE + 1)]
    alike.append(Plan(guards, len(given), launch, output.shape, output.dtype, output.device))


def _key(call: RecurrentCall) -> tuple[Any, ...]:
    """Options and their types (1 is not True), the shape of q, which tensors there are, whether gradients are on."""
    return (
        *call.options, type(call.scale), type(call.use_qk_l2norm), type(call.allow_neg_eigval), type(call.null_slot),
        call.q.shape, call.output is None, call.read_slots is None, call.write_slots is None,
        call.token_slots is None, call.snapshots is None, torch.is_grad_enabled(),
    )  # fmt: skip
