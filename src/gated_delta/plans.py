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

MOST = 4096
"""Kinds of calls that are remembered; then all are forgotten."""


class Plan(NamedTuple):
    """What calls of one kind need."""

    guards: Any
    launch: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


_PLANS: dict[tuple[Any, ...], list[Plan]] = {}


def run(call: RecurrentCall) -> Tensor | None:
    """Run a call for which there is a plan, and return its output; None if there is none."""
    if torch.compiler.is_compiling() or data.is_checked():
        return None
    try:
        plans = _PLANS.get(_key(call))
    except (AttributeError, TypeError):  # no tensor, or no hashable option: validation will say so
        return None
    if plans is None:
        return None
    q, k, v, state, A_log, a, dt_bias, b, output, *optional = call[8:]
    given = [x for x in call[8:] if x is not None]
    for plan in plans:
        if plan.guards.check(*given):
            if output is None:
                output = torch.empty(plan.shape, dtype=plan.dtype, device=plan.device)
            pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), state.data_ptr(), output.data_ptr())
            kept = [None if x is None else x.data_ptr() for x in optional]
            if (pointers[0] | pointers[1] | pointers[2] | pointers[3] | pointers[4] | (kept[3] or 0)) % 16 == 0:
                plan.launch(
                    *pointers[:4], A_log.data_ptr(), a.data_ptr(), dt_bias.data_ptr(), b.data_ptr(), pointers[4], *kept
                )
                return output
    return None


def remember(call: RecurrentCall, output: Tensor, launch: Any) -> None:
    """Keep ``launch`` for calls like this one, if their tensors' look is all that it depends on."""
    given = [x for x in call.tensors if x is not None]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and not x.requires_grad for x in given)
    wide = (call.q, call.k, call.v, call.state, output, call.snapshots)
    if TensorGuards is None or not plain or any(x is not None and x.data_ptr() % 16 for x in wide):
        return
    if len(_PLANS) >= MOST:
        _PLANS.clear()
    guards = TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    _PLANS.setdefault(_key(call), []).append(Plan(guards, launch, output.shape, output.dtype, output.device))


def _key(call: RecurrentCall) -> tuple[Any, ...]:
    """Options, the shape of q, and which tensors there are."""
    return (
        *call.options, call.q.shape, call.output is None, call.read_slots is None, call.write_slots is None,
        call.token_slots is None, call.snapshots is None,
    )  # fmt: skip
