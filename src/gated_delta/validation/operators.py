"""What each operator asks of its arguments, as far as the host can know it (docs/contract.md)."""

import torch
from torch import Tensor

from gated_delta.errors import OptionError, ShapeError
from gated_delta.library import CausalConv1d, CausalConv1dUpdate, GatedDeltaNetStep, Prefill, Recurrent
from gated_delta.validation.arguments import FLOATS, INDICES, Arguments

CHECKPOINT_MULTIPLE = 64
_F32 = (torch.float32,)
_G_SPACE = '"linear" (g is the forget gate alpha itself, in [0, 1]) or "log" (g is its natural logarithm, at most 0)'


def prefill(
    call: Prefill, output_final_state: bool, max_seqlen: int | None, g_space: str, deterministic: str | None
) -> Arguments:
    """``chunk_gated_delta_rule``, by its arguments as they came in: what was left out is None."""
    args = Arguments("chunk_gated_delta_rule")
    _qkv(args, call.q, call.k, call.v, "L HQ K", "L HK K", "L HV V")
    _prefill_heads(args)
    args.optional("g", call.g, "L HS", _F32)
    args.optional("beta", call.beta, "L HS", _F32)
    args.tensor("cu_seqlens", call.cu_seqlens, "N+1", INDICES, any_stride=True)
    args.optional("output", call.output, "L HS V", FLOATS, written=True)
    args.flag("output_final_state", output_final_state)
    args.flag("use_qk_l2norm_in_kernel", call.use_qk_l2norm)
    args.scale(call.scale)
    args.word("g_space", g_space, ("linear", "log"), _G_SPACE)
    args.word("deterministic", deterministic, (None, "batch_invariant"))
    if max_seqlen is not None:
        args.whole("max_seqlen", max_seqlen, least=0)
    _prefill_states(args, call)
    _checkpoints(args, call)
    return args


def _prefill_states(args: Arguments, call: Prefill) -> None:
    pooled = call.state_indices is not None
    rows = "P" if pooled else "N"
    args.optional("state_indices", call.state_indices, "N", INDICES, any_stride=True)
    args.optional("initial_state", call.initial_state, f"{rows} HS V K", FLOATS)
    args.optional("output_state", call.final_state, f"{rows} HS V K", FLOATS, written=True)
    args.optional("has_initial_state", call.has_initial_state, "N", (torch.bool,), any_stride=True)
    if pooled:
        pool = call.initial_state is not None or call.final_state is not None
        args.needed("initial_state", pool, "state_indices needs a pool")
    if call.has_initial_state is not None:
        args.needed("initial_state", call.initial_state is not None, "has_initial_state says which of its rows count")
    _null_slot(args, call.null_slot, pooled, "state_indices")


def _checkpoints(args: Arguments, call: Prefill) -> None:
    """All three arguments or none."""
    every = call.checkpoint_every
    args.whole("checkpoint_every_n_tokens", every, least=0)
    if every % CHECKPOINT_MULTIPLE:
        raise OptionError(args.where, "checkpoint_every_n_tokens", every, f"a multiple of {CHECKPOINT_MULTIPLE}")
    judge = args.needed if every else args.excluded
    for name, value in (("state_checkpoints", call.checkpoints), ("checkpoint_cu_starts", call.checkpoint_starts)):
        judge(name, value is not None, f"checkpoint_every_n_tokens is {every}")
    args.optional("state_checkpoints", call.checkpoints, "* HS V K", FLOATS, written=True)
    args.optional("checkpoint_cu_starts", call.checkpoint_starts, "N+1", INDICES, any_stride=True)


def recurrent(where: str, call: Recurrent, *, state_name: str = "state", single: bool = False) -> Arguments:
    """Decode in both layouts (``single``: one token only) and several tokens."""
    args = Arguments(where)
    if state_name == "initial_state":
        args.needed("initial_state_indices", call.read_slots is not None, "initial_state is a pool")
    steps = "1" if single else "T"
    _qkv(args, call.q, call.k, call.v, f"B {steps} H K", f"B {steps} H K", f"B {steps} HV V")
    if not single:
        args.whole("the number of tokens T", args.sizes["T"], least=1)
    h, hv = args.sizes["H"], args.sizes["HV"]
    if h == 0 or hv == 0 or hv % h:
        raise ShapeError(where, "v", f"of {hv} heads", f"of a multiple of the {h} heads of q and k")
    rows, layout = "B" if call.read_slots is None else "P", "V K" if call.state_v_first else "K V"
    args.tensor(state_name, call.state, f"{rows} HV {layout}", FLOATS, written=True)
    args.tensor("A_log", call.A_log, "HV", _F32)
    args.tensor("a", call.a, f"B {steps} HV", FLOATS)
    args.tensor("dt_bias", call.dt_bias, "HV", FLOATS)
    args.tensor("b", call.b, f"B {steps} HV", FLOATS)
    args.scale(call.scale)
    args.optional("output", call.output, f"B {steps} HV V", FLOATS, written=True)
    args.flag("use_qk_l2norm", call.use_qk_l2norm)
    args.flag("allow_neg_eigval", call.allow_neg_eigval)
    args.optional("initial_state_indices", call.read_slots, "B", INDICES, any_stride=True)
    _null_slot(args, call.null_slot, call.read_slots is not None, "initial_state_indices")
    _write_back(args, call, layout)
    return args


def pool_choice(state: Tensor | None, initial_state: Tensor | None, read_slots: Tensor | None) -> Tensor:
    """The states of ``gated_delta_rule_decode_pretranspose``: one a row, or a pool with indices."""
    if state is None and initial_state is not None and read_slots is not None:
        return initial_state
    if state is not None and initial_state is None and read_slots is None:
        return state
    args = Arguments("gated_delta_rule_decode_pretranspose")
    if state is not None:
        args.excluded("initial_state", initial_state is not None, "state is given, and they exclude each other")
        args.excluded("initial_state_indices", read_slots is not None, "they index initial_state, and state is given")
        return state
    args.needed("state", initial_state is not None, "or the pool initial_state with initial_state_indices")
    args.needed("initial_state_indices", read_slots is not None, "initial_state is a pool")
    assert initial_state is not None
    return initial_state


def flag(where: str, name: str, value: object) -> None:
    """An argument that is True or False."""
    if not isinstance(value, bool):
        Arguments(where).flag(name, value)


def _write_back(args: Arguments, call: Recurrent, layout: str) -> None:
    """Where the states of one or several tokens go."""
    args.optional("output_state_indices", call.write_slots, "B", INDICES, any_stride=True)
    if call.write_slots is not None:
        pooled = call.read_slots is not None
        args.needed("initial_state_indices", pooled, "output_state_indices name slots of a pool")
        because = "disable_state_update is True, so no final state is written"
        args.excluded("output_state_indices", not call.update_state, because)
    args.optional("intermediate_states_buffer", call.snapshots, f">=B >=T HV {layout}", FLOATS, written=True)
    if call.token_slots is None:
        return
    args.tensor("ssm_state_indices", call.token_slots, "B T", INDICES, any_stride=True)
    args.excluded("ssm_state_indices", args.sizes["T"] < 2, "it needs T >= 2 (one token has only a final state)")
    because = "ssm_state_indices keeps the same states"
    args.excluded("intermediate_states_buffer", call.snapshots is not None, because)
    if not call.update_state:
        raise OptionError(args.where, "disable_state_update", True, "False with ssm_state_indices, which write states")


def conv(call: CausalConv1d | CausalConv1dUpdate, activation: str | None) -> Arguments:
    """``causal_conv1d`` and ``causal_conv1d_update``."""
    update = isinstance(call, CausalConv1dUpdate)
    where = "causal_conv1d_update" if update else "causal_conv1d"
    args, x, conv_states, state_indices = Arguments(where), call.x, call.conv_states, call.state_indices
    has_initial_state = None if update else call.has_initial_state
    num_accepted_tokens = call.num_accepted_tokens if update else None
    if update and call.cu_seqlens is None:
        args.tensor("x", x, "N T D" if isinstance(x, Tensor) and x.dim() == 3 else "N D", FLOATS)
    else:
        head_k = 0 if update else call.head_k
        args.whole("head_k", head_k, least=0)
        args.tensor("x", x, "L H C" if head_k else "L D", FLOATS)
        if head_k and x.shape[2] <= 2 * head_k:
            raise OptionError(where, "head_k", head_k, f"below half of the {x.shape[2]} channels of a group of x")
        if head_k:
            args.bind("D", x.shape[1] * x.shape[2], "x")
        args.tensor("cu_seqlens", call.cu_seqlens, "N+1", INDICES, any_stride=True)
    if update:
        args.needed("conv_states", conv_states is not None, "an update reads and writes it")
    _conv_weight(args, "weight", call.weight)
    width = args.sizes["W"]
    args.optional("bias", call.bias, "D", FLOATS)
    rows = "N" if state_indices is None else "P"
    args.optional("conv_states", conv_states, f"{rows} D *", FLOATS, any_stride=True, written=True)
    columns = width - 1 if conv_states is None else conv_states.shape[-1]
    if columns < width - 1:
        must = f"of at least {width - 1} columns for a width of {width}"
        raise ShapeError(where, "conv_states", f"of {columns} columns", must)
    args.optional("state_indices", state_indices, "N", INDICES, any_stride=True)
    args.word("activation", activation, ("silu", "swish", None))
    _null_slot(args, call.null_slot, state_indices is not None, "state_indices")
    args.optional("has_initial_state", has_initial_state, "N", (torch.bool,), any_stride=True)
    for name, value in (("state_indices", state_indices), ("has_initial_state", has_initial_state)):
        if value is not None:
            args.needed("conv_states", conv_states is not None, f"{name} speaks of its rows")
    args.optional("num_accepted_tokens", num_accepted_tokens, "N", INDICES, any_stride=True)
    most = columns - width + 2
    if num_accepted_tokens is not None and call.cu_seqlens is None and args.sizes.get("T", 1) > most:
        must = f"at most {most} (conv_states keeps {columns} columns for a width of {width})"
        raise OptionError(where, "the number of tokens T", args.sizes["T"], must)
    return args


def norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str, output: Tensor | None = None) -> Arguments:
    """``rms_norm_gated``."""
    args = Arguments("rms_norm_gated")
    lead = [f"D{i}" for i in range(x.dim() - 1)] if isinstance(x, Tensor) else []
    spec = " ".join([*lead, "V"])
    args.tensor("x", x, spec, FLOATS)
    args.tensor("z", z, spec, FLOATS)
    args.tensor("weight", weight, "V", FLOATS)
    args.positive("eps", eps)
    args.word("activation", activation, ("silu", "swish", "sigmoid"))
    args.whole_output(output, spec)
    return args


def step(call: GatedDeltaNetStep) -> Arguments:
    """``gated_delta_net_step``."""
    args = Arguments("gated_delta_net_step")
    _qkv(args, call.q, call.k, call.v, "L H K", "L H K", "L H R V")
    args.tensor("z", call.z, "L H R V", FLOATS)
    for name, value in (("b", call.b), ("a", call.a)):
        args.tensor(name, value, "L H R", FLOATS)
    heads, ratio, head_k, head_v = (args.sizes[name] for name in "HRKV")
    args.bind("HV", heads * ratio, "H * R of v")
    args.bind("D", heads * (2 * head_k + ratio * head_v), "q, k and v")
    args.tensor("conv_states", call.conv_states, "P D C", FLOATS, any_stride=True, written=True)
    args.tensor("state", call.state, "P HV V K", FLOATS, written=True)
    args.tensor("A_log", call.A_log, "HV", _F32)
    args.tensor("dt_bias", call.dt_bias, "HV", FLOATS)
    args.tensor("norm_weight", call.norm_weight, "V", FLOATS)
    args.positive("eps", call.eps)
    _step_rows(args, call)
    _conv_weight(args, "conv_weight", call.conv_weight)
    most = args.sizes["C"] - args.sizes["W"] + 2
    if args.sizes.get("S", 1) > most:
        must = f"of at most {most} columns, as conv_states has {args.sizes['C']} for a width of {args.sizes['W']}"
        raise ShapeError(args.where, "state_indices", f"of {args.sizes['S']} columns", must)
    args.word("activation", call.activation, ("silu", "swish", "sigmoid"))
    args.scale(call.scale)
    args.flag("allow_neg_eigval", call.allow_neg_eigval)
    args.optional("tickets", call.tickets, "P H", (torch.int32,), written=True)
    _null_slot(args, call.null_slot, True, "state_indices")
    args.whole_output(call.output, "L HV V")
    return args


def _step_rows(args: Arguments, call: GatedDeltaNetStep) -> None:
    """One token of each row, or ragged rows of a speculative step."""
    starts, accepted = call.cu_seqlens, call.num_accepted_tokens
    if starts is None and accepted is None:
        args.tensor("state_indices", call.state_indices, "L", INDICES, any_stride=True)
        return
    args.needed("cu_seqlens", starts is not None, "num_accepted_tokens speaks of ragged rows")
    args.needed("num_accepted_tokens", accepted is not None, "rows of cu_seqlens go on from a draft")
    args.tensor("state_indices", call.state_indices, "N S", INDICES, any_stride=True)
    args.whole("the columns of state_indices", args.sizes["S"], least=1)
    args.tensor("cu_seqlens", starts, "N+1", INDICES, any_stride=True)
    args.tensor("num_accepted_tokens", accepted, "N", INDICES, any_stride=True)


def _qkv(args: Arguments, q: Tensor, k: Tensor, v: Tensor, q_spec: str, k_spec: str, v_spec: str) -> None:
    args.tensor("q", q, q_spec, FLOATS)
    args.tensor("k", k, k_spec, FLOATS)
    args.tensor("v", v, v_spec, FLOATS)
    args.same_dtype("q", q, "k", k)
    args.same_dtype("q", q, "v", v)
    args.head_sizes()


def _prefill_heads(args: Arguments) -> None:
    hq, hk, hv = (args.sizes[n] for n in ("HQ", "HK", "HV"))
    gva = hq == hk and hk > 0 and hv > 0 and hv % hk == 0
    gqa = hk == hv and hk > 0 and hq > 0 and hq % hk == 0
    if not (gva or gqa):
        must = "such that HQ = HK divides HV (grouped values) or HK = HV divides HQ (grouped queries)"
        raise ShapeError(args.where, "(HQ, HK, HV)", (hq, hk, hv), must)
    args.bind("HS", max(hq, hv), "max(HQ, HV)")


def _conv_weight(args: Arguments, name: str, weight: Tensor) -> None:
    args.tensor(name, weight, "D W", FLOATS, any_stride=True)
    if not 2 <= args.sizes["W"] <= 5:
        raise ShapeError(args.where, name, f"of width {args.sizes['W']}", "of width 2 to 5")


def _null_slot(args: Arguments, null_slot: int | None, pooled: bool, indices: str) -> None:
    if null_slot is not None:
        args.whole("null_slot", null_slot, least=0)
        args.needed(indices, pooled, "null_slot names a slot of a pool")
