"""Which backend serves a call: one table, read from the top; the first that can serve it is what "auto" picks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gated_delta.errors import BackendError
from gated_delta.validation.arguments import FLOATS, HEAD_SIZES, LISTED_HEAD_SIZES, Arguments, describe_dtypes

RULES = (
    "chunk_gated_delta_rule", "gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp",
    "gated_delta_net_step",
)  # fmt: skip
"""Operators that evaluate the rule, and so have head sizes."""

OPERATORS = (*RULES, "causal_conv1d", "causal_conv1d_update", "rms_norm_gated")


class Request(NamedTuple):
    """What a backend may base its answer on."""

    operator: str
    device: str
    dtype: torch.dtype
    head_k: int
    head_v: int


@dataclass(frozen=True)
class Backend:
    """A row of the table. ``refuses`` returns why it cannot serve a request, or None if it can."""

    name: str
    summary: str
    refuses: Callable[[Request], str | None]


def _cpu_refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return f"it serves tensors on the CPU, and these are on {request.device}"
    return _shape_refused(request)


def _shape_refused(request: Request) -> str | None:
    """What no backend serves."""
    if request.dtype not in FLOATS:
        return f"it serves {describe_dtypes(FLOATS)}, and this is {describe_dtypes([request.dtype])}"
    if request.operator in RULES and not {request.head_k, request.head_v} <= set(HEAD_SIZES):
        return f"it serves head sizes {LISTED_HEAD_SIZES}, and these are K={request.head_k}, V={request.head_v}"
    return None


STEP_ELEMENTS = 2**15
"""Of a state padded to powers of two, which a program of the fused step has in registers."""

_HAS_TRITON = find_spec("triton") is not None


def _triton_refuses(request: Request) -> str | None:
    if request.device != "cuda" and (request.device != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        return f"it serves tensors on a GPU, and these are on {request.device}"
    if not _HAS_TRITON:
        return "it needs the package triton, which is not installed"
    return _shape_refused(request)


def _fused_refuses(request: Request) -> str | None:
    sizes = [1 << (size - 1).bit_length() for size in (request.head_k, request.head_v) if size]
    if request.operator == "gated_delta_net_step" and prod(sizes) > STEP_ELEMENTS:
        return f"its fused step holds states of up to {STEP_ELEMENTS} numbers, and these have {prod(sizes)}"
    return _triton_refuses(request)


def _separate_refuses(request: Request) -> str | None:
    if request.operator != "gated_delta_net_step":
        return "it serves gated_delta_net_step, which it makes of other operators, and nothing else"
    return _triton_refuses(request)


@cache
def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _gluon_refuses(request: Request) -> str | None:
    if request.operator != "chunk_gated_delta_rule":
        return "it serves chunk_gated_delta_rule and nothing else"
    if request.device != "cuda" or not _hopper():
        return "it serves tensors on a Hopper GPU (compute capability 9), and these are not"
    if request.dtype not in FLOATS[:2] or (request.head_k, request.head_v) != (128, 128):
        dtypes, sizes = describe_dtypes([request.dtype]), f"K={request.head_k}, V={request.head_v}"
        return f"it serves {describe_dtypes(FLOATS[:2])} with K=128, V=128, and this is {dtypes} with {sizes}"
    return _triton_refuses(request)


BACKENDS = (
    Backend("cpu", "plain torch, fp32 arithmetic", _cpu_refuses),
    Backend("gluon", "prefill by Hopper's warp groups and copy engine, in Gluon", _gluon_refuses),
    Backend("triton", "Triton kernels for any GPU", _fused_refuses),
    Backend("separate", "convolution, rule and norm by Triton kernels of their own", _separate_refuses),
)
"""A backend's name is that of its module in :mod:`gated_delta.kernels`."""


@dataclass(frozen=True)
class Explanation:
    """What ``backend="auto"`` picks for a request, and what every backend says to it."""

    request: Request
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        r = self.request
        head = f"{r.operator}, {r.device}, {describe_dtypes([r.dtype])}"
        if r.operator in RULES:
            head += f", K={r.head_k}, V={r.head_v}"
        lines = [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join([f"{head} -> {self.chosen or 'no backend'}", *lines])


def explain(
    operator: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, head_k: int = 128,
    head_v: int = 128,
) -> Explanation:  # fmt: skip
    """Say which backend ``backend="auto"`` picks for ``operator`` (a name of :data:`OPERATORS`) and why.

    Raises:
        BackendError: ``operator`` is no operator of this package.
    """
    if operator not in OPERATORS:
        raise BackendError("explain", "operator", repr(operator), f"one of {', '.join(OPERATORS)}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise BackendError("explain", "device", repr(device), "a device that torch knows") from error
    request = Request(operator, kind, dtype, head_k, head_v)
    refusals = {backend: backend.refuses(request) for backend in BACKENDS}
    chosen = next((backend.name for backend, refusal in refusals.items() if refusal is None), None)
    reasons = {backend.name: refusal or f"can serve it: {backend.summary}" for backend, refusal in refusals.items()}
    return Explanation(request, chosen, reasons)


def choose(request: Request, backend: str) -> str:
    """The name of the backend that serves the call.

    Raises:
        BackendError: there is no such backend, or it (or with "auto" every one) refuses the call.
    """
    for row in BACKENDS:
        if backend in (row.name, "auto"):
            refusal = row.refuses(request)
            if refusal is None:
                return row.name
            if backend != "auto":
                raise BackendError(request.operator, "backend", repr(backend), f"another one: {refusal}")
    names = ", ".join(row.name for row in BACKENDS)
    if backend != "auto":
        raise BackendError(request.operator, "backend", repr(backend), f'"auto" or one of: {names}')
    refusals = "; ".join(f"{row.name}: {row.refuses(request)}" for row in BACKENDS)
    raise BackendError(request.operator, "backend", '"auto"', f"served by some backend, but none can ({refusals})")


def serving(args: Arguments, x: Tensor, backend: str) -> str:
    """The same for a call that was judged, of which ``x`` is the first argument."""
    head_k, head_v = args.sizes.get("K", 0), args.sizes.get("V", 0)
    return choose(Request(args.where, x.device.type, x.dtype, head_k, head_v), backend)
