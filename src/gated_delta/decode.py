"""The rule on one token of every sequence, with the state in either layout, or on several (speculation); and a decode
step of a layer, everything between its input projections and its output projection.
"""

import warnings
from typing import Any

from torch import Tensor

from gated_delta import dispatch, library, plans, reference
from gated_delta.validation import data, operators
from gated_delta.validation.arguments import Arguments


def gated_delta_rule_decode(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, A_log: Tensor | None, a: Tensor, dt_bias: Tensor | None, b: Tensor,
    scale: float | None = None, output: Tensor | None = None, use_qk_l2norm: bool = True, *,
    allow_neg_eigval: bool = False, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of every sequence, states stored ``[B, HV, K, V]`` (V contiguous) and updated in place.

    ``alpha = exp(-exp(A_log) softplus(a + dt_bias))``, ``beta = sigmoid(b)``, then the rule of docs/contract.md
    section 1, all in fp32; value head i uses q and k head ``i // (HV // H)``.

    Args:
        q, k: ``[B, 1, H, K]``; v: ``[B, 1, HV, V]``; one dtype of bf16, fp16, fp32.
        state: ``[B, HV, K, V]`` bf16, fp16 or fp32.
        A_log: ``[HV]`` fp32; a, b: ``[B, 1, HV]``; dt_bias: ``[HV]``. Where A_log and dt_bias are None, a is the
            logarithm of alpha, and b is beta.
        scale: factor of the output, ``K ** -0.5`` when None.
        output: ``[B, 1, HV, V]`` to write into; allocated in q's dtype when None.
        use_qk_l2norm: normalise q and k first, ``x rsqrt(sum x^2 + 1e-6)``.
        allow_neg_eigval: ``beta = 2 sigmoid(b)`` (OLMo-hybrid).
        backend: "auto", or a name from :func:`gated_delta.explain`.

    Returns:
        The pair (output, state).

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    options, given = (
        ("gated_delta_rule_decode", "state", scale, use_qk_l2norm, allow_neg_eigval, backend, False, None, False),
        (q, k, v, state, A_log, a, dt_bias, b, output, None, None, None, None),
    )
    return plans.run("recurrent", options, given, _recurrent), state


def gated_delta_rule_decode_pretranspose(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, A_log: Tensor | None, a: Tensor, dt_bias: Tensor | None,
    b: Tensor, scale: float | None = None, output: Tensor | None = None, use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None, initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None, intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool = False, *, allow_neg_eigval: bool = False, null_slot: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of every sequence (or several, as :func:`gated_delta_rule_mtp`), states stored
    ``[B, HV, V, K]`` (K contiguous) and updated in place: one state a row, or slots of a pool.

    Args:
        q, k, v, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, allow_neg_eigval, backend: as for
            :func:`gated_delta_rule_decode`, with T tokens a row where that has one.
        state: ``[B, HV, V, K]``; None when the states are in a pool.
        initial_state: a pool ``[P, HV, V, K]`` with any slot and head strides, instead of ``state``.
        initial_state_indices: ``[B]`` int32 or int64 slots; negative ones, and ``null_slot``, are padding.
        output_state_indices: ``[B]`` slots for the final states; where they were read when None; negative: none.
        intermediate_states_buffer: ``[>=B, >=T, HV, V, K]``: row b, step t receives the state after token t.
        disable_state_update: write no final state.

    Returns:
        The pair (output, ``state`` or the pool).

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    where, name = "gated_delta_rule_decode_pretranspose", "state" if initial_state is None else "both"
    states, name = (initial_state, "initial_state") if state is None else (state, name)
    options, given = (
        (where, name, scale, use_qk_l2norm, allow_neg_eigval, backend, disable_state_update, null_slot, True),
        (q, k, v, states, A_log, a, dt_bias, b, output, initial_state_indices, output_state_indices, None,
         intermediate_states_buffer),
    )  # fmt: skip
    result = plans.run("recurrent", options, given, _recurrent)
    assert states is not None
    return result, states


def gated_delta_rule_mtp(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, initial_state_indices: Tensor, A_log: Tensor | None,
    a: Tensor, dt_bias: Tensor | None, b: Tensor, scale: float | None = None, output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None, ssm_state_indices: Tensor | None = None,
    disable_state_update: bool | None = None, use_qk_l2norm: bool = True, output_state_indices: Tensor | None = None,
    *, allow_neg_eigval: bool = False, null_slot: int | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """T >= 1 tokens of every row against states in a pool; a state stays in fp32 between the tokens of one call.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; a, b: ``[B, T, HV]``. These and all that is not named here are as
            for :func:`gated_delta_rule_decode_pretranspose` with a pool, which is written in place.
        ssm_state_indices: ``[B, T]`` slots for the state after each token; negative: skipped. Needs T >= 2 and
            ``disable_state_update=False``, excludes the buffer; the slot that was read stays intact unless named, by
            ``output_state_indices`` too.
        disable_state_update: True writes no final state. None means True, with a DeprecationWarning.

    Returns:
        The pair (output ``[B, T, HV, V]``, pool).

    Raises:
        ArgumentError: it names the argument, what it is and what it must be; nothing has been written then.
    """
    if disable_state_update is None:
        message = "gated_delta_rule_mtp: disable_state_update=None means True today and will mean False; pass one"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        disable_state_update = True
    options, given = (
        ("gated_delta_rule_mtp", "initial_state", scale, use_qk_l2norm, allow_neg_eigval, backend,
         disable_state_update, null_slot, True),
        (q, k, v, initial_state, A_log, a, dt_bias, b, output, initial_state_indices, output_state_indices,
         ssm_state_indices, intermediate_states_buffer),
    )  # fmt: skip
    return plans.run("recurrent", options, given, _recurrent), initial_state


def _recurrent(options: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[library.Recurrent, str, Tensor]:
    """The call of every recurrent operator, judged: its names, options and tensors in the order in which they come."""
    where, state_name, scale, use_qk_l2norm, allow_neg_eigval, backend, frozen, null_slot, state_v_first = options
    q, k, v, state, A_log, a, dt_bias, b, output, read_slots, write_slots, token_slots, snapshots = given
    call = library.Recurrent._make((
        q, k, v, state, state_v_first, A_log, a, dt_bias, b, scale, use_qk_l2norm, allow_neg_eigval,
        read_slots, null_slot, not frozen, write_slots, token_slots, snapshots, output, output is None,
    ))  # fmt: skip
    Arguments(where).flag("disable_state_update", frozen)
    args = operators.recurrent(where, call, state_name=state_name, single=where == "gated_delta_rule_decode")
    backend = dispatch.serving(args, q, backend)
    call = call._replace(
        scale=reference.resolve_scale(scale, args.sizes["K"]),
        null_slot=library.slot_number(null_slot),
        update_state=not frozen and (token_slots is None or write_slots is not None),
        output=q.new_empty(v.shape) if output is None else output,
    )
    if data.is_checked():
        data.recurrent(where, call)
    return call, backend, call.output


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
