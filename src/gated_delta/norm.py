"""Gated RMSNorm, the last step of a layer before its output projection."""

from typing import Any

import torch
from torch import Tensor

from gated_delta import dispatch, library, plans
from gated_delta.validation import operators


def rms_norm_gated(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str = "silu", *, output: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``x rsqrt(mean(x^2) + eps) weight act(z)`` over the last dimension, in fp32, rounded once; 0 where x is 0, as in
    rows of padding, whatever z holds there.

    Args:
        x, z: ``[..., V]`` of one shape, bf16, fp16 or fp32.
        weight: ``[V]``.
        eps: added to the mean square.
        activation: "silu" ("swish" is the same) or "sigmoid".
        output: of x's shape, contiguous; x itself may be given. Allocated in x's dtype when None.
        backend: "auto", or a name that :func:`gated_delta.explain` lists.

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    return plans.run("rms_norm_gated", (eps, activation, backend), (x, z, weight, output), _norm)


def _norm(options: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[library.RmsNormGated, str, Tensor]:
    (eps, activation, backend), (x, z, weight, output) = options, given
    call = library.RmsNormGated._make((x, z, weight, eps, activation, output))
    backend = dispatch.serving(operators.norm(call), x, backend)
    if output is None:
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
    return call._replace(eps=float(eps), output=output), backend, output
