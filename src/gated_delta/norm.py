"""Gated RMSNorm, the last step of a layer before its output projection."""

import torch
from torch import Tensor

from gated_delta import dispatch, library
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
    call = library.RmsNormGated._make((x, z, weight, eps, activation, output))
    backend = dispatch.serving(operators.norm(call), x, backend)
    if output is None:
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
    library.rms_norm_gated(x, z, weight, float(eps), activation, output, backend)
    return output
