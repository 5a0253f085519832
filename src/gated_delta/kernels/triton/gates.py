"""The gates of a prefill: one launch over all tokens and heads, where torch would make a dozen."""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from gated_delta.kernels.triton.launch import Launches, Start
from gated_delta.kernels.triton.shared import log_gates
from gated_delta.library import Gates, tensors

_BLOCK = 1024


@triton.jit(do_not_specialize=["size"])
def _gates_kernel(
    A_log, a, dt_bias, b, log_alpha, beta, a_token, a_group, a_head, b_token, b_group, b_head, size,
    HV: tl.constexpr, R: tl.constexpr, NEG_EIGVAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, token, head = i < size, i // HV, i % HV
    group, sibling = head // R, head % R
    a_i = tl.load(a + token * a_token + group * a_group + sibling * a_head, mask=inside, other=0.0)
    b_i = tl.load(b + token * b_token + group * b_group + sibling * b_head, mask=inside, other=0.0)
    log_decay, strength = log_gates(a_i, b_i, tl.load(A_log + head), tl.load(dt_bias + head), NEG_EIGVAL)
    tl.store(log_alpha + i, log_decay, mask=inside)
    tl.store(beta + i, strength, mask=inside)


def bound_gates(call: Gates) -> Start:
    launches, (A_log, a, dt_bias, b, allow_neg_eigval, log_alpha, beta) = Launches(*tensors(call)), call
    size, heads = log_alpha.shape
    launches.add(
        _gates_kernel, (-(-size * heads // _BLOCK),),
        (A_log, a, dt_bias, b, log_alpha, beta, *a.stride(), *b.stride(), size * heads),
        {"HV": heads, "R": a.shape[2], "NEG_EIGVAL": allow_neg_eigval, "BLOCK": _BLOCK}, warps=4,
    )  # fmt: skip
    return launches.bound()
