"""Gates of a prefill from what the projections give."""

import torch
from torch import Tensor

from gated_delta import dispatch, library


def gates(
    A_log: Tensor, a: Tensor, dt_bias: Tensor, b: Tensor, *, allow_neg_eigval: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The logarithm of alpha, and beta, for :func:`gated_delta.chunk_gated_delta_rule`, in one launch.

    Args:
        A_log: ``[H R]`` fp32; dt_bias: ``[H R]``. a, b: ``[L, H, R]``, views of any strides.
        allow_neg_eigval: ``beta = 2 sigmoid(b)``. backend: "auto", "cpu" or "triton".

    Returns:
        Two of ``[L, H R]`` fp32.

    Raises:
        BackendError: no backend serves this dtype and device.
    """
    chosen = dispatch.choose(dispatch.Request("gates", a.device.type, a.dtype, 0, 0), backend)
    log_alpha, beta = (A_log.new_empty(len(a), len(A_log), dtype=torch.float32) for _ in range(2))
    library.gates(A_log, a, dt_bias, b, allow_neg_eigval, log_alpha, beta, chosen)
    return log_alpha, beta
