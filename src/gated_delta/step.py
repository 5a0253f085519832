"""A decode step of a layer: everything between its input projections and its output projection."""

from typing import Any

from torch import Tensor

from gated_delta import dispatch, library, plans, reference
from gated_delta.validation import data, operators


def gated_delta_net_step(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_states: Tensor, conv_weight: Tensor,
    state: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, *, eps: float, state_indices: Tensor,
    cu_seqlens: Tensor | None = None, num_accepted_tokens: Tensor | None = None, activation: str = "silu",
    scale: float | None = None, allow_neg_eigval: bool = False, tickets: Tensor | None = None,
    null_slot: int | None = None, output: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Convolution with silu, L2 norm, gates, the rule and the gated norm for one token of every row, or for the ragged
    rows of a speculative step; both states are updated in place. One launch with ``backend="triton"``.

    The tokens' inputs are views of what the projections gave, in any layout; each of ``H`` key heads serves ``R`` value
    heads. Arithmetic is fp32, rounded once.

    Args:
        q, k: ``[L, H, K]``; v, z: ``[L, H, R, V]``; b, a: ``[L, H, R]``. q, k, v have one dtype of bf16, fp16, fp32.
        conv_states: pool ``[P, D, C]``, any strides, of the channels of q, then k, then v; ``D = H (2 K + R V)``.
        conv_weight: ``[D, W]``, W 2 to 5.
        state: pool ``[P, H R, V, K]`` bf16, fp16 or fp32 with any slot and head strides.
        A_log: ``[H R]`` fp32; dt_bias: ``[H R]``; norm_weight: ``[V]``; eps: of the gated norm.
        state_indices: ``[N]`` slots, N = L; speculative: ``[N, S]``, column j receives the state after token j of the
            row and column 0 also names the convolution's slot. Negative: padding.
        cu_seqlens, num_accepted_tokens: ``[N+1]`` and ``[N]``, both or none: a speculative step as for
            :func:`gated_delta.causal_conv1d_update`, with ``C >= W + S - 2``. Row i goes on from the state in column
            ``num_accepted_tokens[i] - 1``.
        activation: of the gate z, "silu" ("swish" is the same) or "sigmoid".
        scale: factor of the rule's output, ``K ** -0.5`` when None.
        allow_neg_eigval: ``beta = 2 sigmoid(b)``.
        tickets: ``[P, H]`` int32 zeros, which are zeros again afterwards: with R > 1 a kernel counts in them who has
            read a window. Made in every call when None; :class:`gated_delta.state.LayerState` has them.
        null_slot: this slot means padding too.
        output: ``[L, H R, V]`` contiguous; in q's dtype when None. backend: a name of :func:`gated_delta.explain`.

    Returns:
        The output, zero for padding and for tokens behind the last row.

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    return plans.run(
        "gated_delta_net_step", (scale, eps, activation, allow_neg_eigval, null_slot, backend),
        (q, k, v, z, b, a, conv_states, conv_weight, state, A_log, dt_bias, norm_weight, state_indices, cu_seqlens,
         num_accepted_tokens, tickets, output), _step,
    )  # fmt: skip


def _step(options: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[library.GatedDeltaNetStep, str, Tensor]:
    *numbers, null_slot, backend = options
    call = library.GatedDeltaNetStep._make((*given[:12], *numbers, *given[12:16], null_slot, given[16]))
    backend = dispatch.serving(operators.step(call), call.q, backend)
    q, v, output = call.q, call.v, given[16]
    if output is None:
        output = q.new_empty(len(v), v.shape[1] * v.shape[2], v.shape[3])
    scale, null_slot = reference.resolve_scale(call.scale, q.shape[-1]), library.slot_number(null_slot)
    call = call._replace(scale=scale, eps=float(call.eps), null_slot=null_slot, output=output)
    if data.is_checked():
        data.step(call)
    return call, backend, output
