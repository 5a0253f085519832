"""What each operator asks of its arguments, as far as the host can know it (docs/contract.md), beyond what the records
of :mod:`gated_delta.library` ask of each tensor.

Calls come as their callers made them: what was left out is None.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gated_delta import library
from gated_delta.errors import DtypeError, OptionError, ShapeError
from gated_delta.library import CausalConv1d, CausalConv1dUpdate, GatedDeltaNetStep, Prefill, Recurrent, RmsNormGated
from gated_delta.validation.arguments import HEAD_SIZES, LISTED_HEAD_SIZES, Arguments, describe_dtypes

CHECKPOINT_MULTIPLE = 64
_G_SPACE = '"linear" (g is the forget gate alpha itself, in [0, 1]) or "log" (g is its natural logarithm, at most 0)'


def prefill(
    call: Prefill, output_final_state: bool, max_seqlen: int | None, g_space: str, deterministic: str | None
) -> Arguments:
    """``chunk_gated_delta_rule``."""
    pooled = call.state_indices is not None
    args = Arguments("chunk_gated_delta_rule", ROWS="P" if pooled else "N")
    _qkv(args, call)
    hq, hk, hv = (args.sizes[n] for n in ("HQ", "HK", "HV"))
    few, many = min(hq, hv), max(hq, hv)
    if few == 0 or hk != few or many % few:
        must = "such that HQ = HK divides HV (grouped values) or HK = HV divides HQ (grouped queries)"
        raise ShapeError(args.where, "(HQ, HK, HV)", (hq, hk, hv), must)
    args.bind("HS", many, "max(HQ, HV)")
    every = call.checkpoint_every
    args.whole("checkpoint_every_n_tokens", every, least=0)
    if every % CHECKPOINT_MULTIPLE:
        raise OptionError(args.where, "checkpoint_every_n_tokens", every, f"a multiple of {CHECKPOINT_MULTIPLE}")
    for name, value in (("state_checkpoints", call.checkpoints), ("checkpoint_cu_starts", call.checkpoint_starts)):
        (args.needed if every else args.excluded)(name, value is not None, f"checkpoint_every_n_tokens is {every}")
    _tensors(args, call, library.TENSORS[type(call)][3:])
    args.flag("output_final_state", output_final_state)
    args.flag("use_qk_l2norm_in_kernel", call.use_qk_l2norm)
    args.number("scale", call.scale, optional=True)
    args.word("g_space", g_space, ("linear", "log"), _G_SPACE)
    args.word("deterministic", deterministic, (None, "batch_invariant"))
    if max_seqlen is not None:
        args.whole("max_seqlen", max_seqlen, least=0)
    if pooled:
        pool = call.initial_state is not None or call.final_state is not None
        args.needed("initial_state", pool, "state_indices needs a pool")
    if call.has_initial_state is not None:
        args.needed("initial_state", call.initial_state is not None, "has_initial_state says which of its rows count")
    _null_slot(args, call.null_slot, pooled, "state_indices")
    return args


def recurrent(where: str, call: Recurrent, *, state_name: str = "state", single: bool = False) -> Arguments:
    """Decode in both layouts (``single``: one token only) and several tokens."""
    pooled, matrix = call.read_slots is not None, "V K" if call.state_v_first else "K V"
    args = Arguments(where, STEPS="1" if single else "T", ROWS="P" if pooled else "B", MATRIX=matrix)
    args.excluded("initial_state", state_name == "both", "state is given, and they exclude each other")
    if state_name == "state":
        args.excluded("initial_state_indices", pooled, "they index initial_state, and state is given")
    else:
        given = call.state is not None or where == "gated_delta_rule_mtp"
        args.needed("state", given, "or the pool initial_state with initial_state_indices")
        args.needed("initial_state_indices", pooled, "initial_state is a pool")
    _qkv(args, call)
    if not single:
        args.whole("the number of tokens T", args.sizes["T"], least=1)
    h, hv = args.sizes["H"], args.sizes["HV"]
    if h == 0 or hv == 0 or hv % h:
        raise ShapeError(where, "v", f"of {hv} heads", f"of a multiple of the {h} heads of q and k")
    ready = call.A_log is None and call.dt_bias is None
    asked = (
        x if ready or x[0] not in ("A_log", "dt_bias") else (x[0], False, x[2]) for x in library.TENSORS[type(call)]
    )
    _tensors(args, call, [*asked][3:], state=state_name)
    args.number("scale", call.scale, optional=True)
    args.flag("use_qk_l2norm", call.use_qk_l2norm)
    args.flag("allow_neg_eigval", call.allow_neg_eigval)
    args.excluded("allow_neg_eigval=True", ready and call.allow_neg_eigval, "without A_log b is beta itself")
    _null_slot(args, call.null_slot, pooled, "initial_state_indices")
    if call.write_slots is not None:
        args.needed("initial_state_indices", pooled, "output_state_indices name slots of a pool")
        because = "disable_state_update is True, so no final state is written"
        args.excluded("output_state_indices", not call.update_state, because)
    if call.token_slots is not None:
        args.excluded("ssm_state_indices", args.sizes["T"] < 2, "it needs T >= 2 (one token has only a final state)")
        because = "ssm_state_indices keeps the same states"
        args.excluded("intermediate_states_buffer", call.snapshots is not None, because)
        if not call.update_state:
            raise OptionError(where, "disable_state_update", True, "False with ssm_state_indices, which write states")
    return args


def conv(call: CausalConv1d | CausalConv1dUpdate, activation: str | None) -> Arguments:
    """``causal_conv1d`` and ``causal_conv1d_update``."""
    update = isinstance(call, CausalConv1dUpdate)
    ragged, pooled, x = not update or call.cu_seqlens is not None, call.state_indices is not None, call.x
    rows = "N T" if isinstance(x, Tensor) and x.dim() == 3 else "N"
    where = "causal_conv1d_update" if update else "causal_conv1d"
    head_k = 0 if update else call.head_k
    Arguments(where).whole("head_k", head_k, least=0)
    inputs, tokens = "L H C" if head_k else "L D", "L" if ragged else rows
    args = Arguments(where, INPUTS=inputs, TOKENS=tokens, ROWS="P" if pooled else "N")
    if update:
        args.needed("conv_states", call.conv_states is not None, "an update reads and writes it")
    # x and cu_seqlens say how many rows there are.
    tensors = sorted(library.TENSORS[type(call)], key=lambda tensor: tensor[0] not in ("x", "cu_seqlens"))
    _tensors(args, call, tensors[:1])
    if head_k:
        args.bind("D", x.shape[1] * x.shape[2], "x")
        if x.shape[2] <= 2 * head_k:
            raise OptionError(where, "head_k", head_k, f"below half of the {x.shape[2]} channels of a group of x")
    _tensors(args, call, tensors[1:])
    width = _width(args, "weight")
    columns = width - 1 if call.conv_states is None else call.conv_states.shape[-1]
    if columns < width - 1:
        must = f"of at least {width - 1} columns for a width of {width}"
        raise ShapeError(where, "conv_states", f"of {columns} columns", must)
    args.word("activation", activation, ("silu", "swish", None))
    _null_slot(args, call.null_slot, pooled, "state_indices")
    for name in ("state_indices", "has_initial_state"):
        if getattr(call, name, None) is not None:
            args.needed("conv_states", call.conv_states is not None, f"{name} speaks of its rows")
    most = columns - width + 2
    if update and call.num_accepted_tokens is not None and not ragged and args.sizes.get("T", 1) > most:
        must = f"at most {most} (conv_states keeps {columns} columns for a width of {width})"
        raise OptionError(where, "the number of tokens T", args.sizes["T"], must)
    return args


def norm(call: RmsNormGated) -> Arguments:
    """``rms_norm_gated``."""
    leading = range(call.x.dim() - 1) if isinstance(call.x, Tensor) else ()
    args = Arguments("rms_norm_gated", LEADING=" ".join(f"D{i}" for i in leading))
    _tensors(args, call, library.TENSORS[type(call)])
    args.number("eps", call.eps, least=0)
    args.word("activation", call.activation, ("silu", "swish", "sigmoid"))
    return args


def gates(call: library.Gates) -> Arguments:
    """``gates``, but for what it gives."""
    args, (A_log, a, *rest) = Arguments("gates"), library.TENSORS[type(call)][:4]
    _tensors(args, call, [a])
    args.bind("HV", args.sizes["H"] * args.sizes["R"], "H * R of a")
    _tensors(args, call, [A_log, *rest])
    args.flag("allow_neg_eigval", call.allow_neg_eigval)
    return args


def step(call: GatedDeltaNetStep) -> Arguments:
    """``gated_delta_net_step``: one token of each row, or ragged rows of a speculative step."""
    starts, accepted = call.cu_seqlens, call.num_accepted_tokens
    ragged = starts is not None or accepted is not None
    args = Arguments("gated_delta_net_step", SLOTS="N S" if ragged else "L")
    _qkv(args, call)
    heads, ratio, head_k, head_v = (args.sizes[name] for name in "HRKV")
    args.bind("HV", heads * ratio, "H * R of v")
    args.bind("D", heads * (2 * head_k + ratio * head_v), "q, k and v")
    if ragged:
        args.needed("cu_seqlens", starts is not None, "num_accepted_tokens speaks of ragged rows")
        args.needed("num_accepted_tokens", accepted is not None, "rows of cu_seqlens go on from a draft")
    _tensors(args, call, library.TENSORS[type(call)][3:])
    most, columns = args.sizes["C"] - _width(args, "conv_weight") + 2, args.sizes.get("S", 1)
    args.whole("the columns of state_indices", columns, least=1)
    if columns > most:
        must = f"of at most {most} columns, as conv_states has {args.sizes['C']} for a width of {args.sizes['W']}"
        raise ShapeError(args.where, "state_indices", f"of {columns} columns", must)
    args.number("eps", call.eps, least=0)
    args.word("activation", call.activation, ("silu", "swish", "sigmoid"))
    args.number("scale", call.scale, optional=True)
    args.flag("allow_neg_eigval", call.allow_neg_eigval)
    _null_slot(args, call.null_slot, True, "state_indices")
    return args


def _tensors(args: Arguments, call: Any, tensors: Iterable[tuple[str, bool, library.Asked]], **names: str) -> None:
    """What is asked of these tensors of a call; ``names`` are those of arguments in this call."""
    for field, optional, (shape, dtypes, name, any_stride, written, whole) in tensors:
        args.tensor(
            names.get(field, name or field), getattr(call, field), shape, dtypes, optional=optional,
            any_stride=any_stride, written=written, whole=whole,
        )  # fmt: skip


def _qkv(args: Arguments, call: Prefill | Recurrent | GatedDeltaNetStep) -> None:
    """The first three of a record."""
    _tensors(args, call, library.TENSORS[type(call)][:3])
    for name, x in (("k", call.k), ("v", call.v)):
        if x.dtype != call.q.dtype:
            must = f"{describe_dtypes([call.q.dtype])}, as q is"
            raise DtypeError(args.where, name, describe_dtypes([x.dtype]), must)
    for name in ("K", "V"):
        if args.sizes[name] not in HEAD_SIZES:
            was, must = args.sizes[name], f"one of {LISTED_HEAD_SIZES}"
            raise ShapeError(args.where, f"head size {name} (from {args.bound_by[name]})", was, must)


def _width(args: Arguments, weight: str) -> int:
    """Of the convolution."""
    if not 2 <= args.sizes["W"] <= 5:
        raise ShapeError(args.where, weight, f"of width {args.sizes['W']}", "of width 2 to 5")
    return args.sizes["W"]


def _null_slot(args: Arguments, null_slot: int | None, pooled: bool, indices: str) -> None:
    if null_slot is not None:
        args.whole("null_slot", null_slot, least=0)
        args.needed(indices, pooled, "null_slot names a slot of a pool")
