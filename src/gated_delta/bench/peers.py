"""Contenders: us, and every other implementation that is installed; and whether they are right.

Each has an adapter, a function of ``(case, x)``: it translates one set of inputs ``x`` to the peer's conventions, which
is not timed, and gives what is timed (a :class:`Bound`), or None for a case that the peer can't do. It imports the peer
when it is called.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch

import gated_delta as gd
from gated_delta import reference
from gated_delta.bench.cases import Case
from gated_delta.errors import OptionError
from gated_delta.testing import oracle
from gated_delta.testing.budget import relative_error
from gated_delta.testing.inputs import Inputs
from gated_delta.testing.oracle import Results

OURS, SEPARATE = "gated-delta", "separate"
RULE = "fla.ops.gated_delta_rule"
TRANSFORMERS = "transformers.models.qwen3_next.modeling_qwen3_next"
TOLERANCE = 1e-2
"""Largest relative error (Frobenius): inputs and some states are bf16, whose products err by a few 1e-3."""


class Bound(NamedTuple):
    """A contender with one set of inputs in its own conventions."""

    call: Callable[[], object]
    results: Callable[[], Results]
    """What the last call wrote, where the case asks for it."""


def returning(call: Callable[[], Any], read: Callable[..., Results]) -> Bound:
    """A call that returns one result or a tuple of them; they are let go when the next call has returned."""
    last: list[Any] = []

    def run() -> None:
        returned = call()
        last[:] = returned if isinstance(returned, tuple) else (returned,)

    return Bound(run, lambda: read(*last))


def ours(case: Case, x: Inputs) -> Bound:
    """Our own operators, as ``backend="auto"`` serves them."""
    if case.form.endswith(" core"):
        call = partial(x["layer"]._plain_rows, x["projected"], x["batch"], x["layer_state"], x["output"])
        return Bound(call, lambda: {"output": x["output"]})
    if case.operation == "layer":
        return returning(partial(x["layer"], x["hidden"], x["batch"], x["layer_state"]), lambda y: {"output": y})
    return calling(gd, case.operator, x)


def separate(case: Case, x: Inputs) -> Bound | None:
    """A layer's step by three operators and the copies between them."""
    return calling(gd, case.operator, {**x, "backend": "separate"}) if case.operation == "step" else None


def calling(operators: Any, name: str, x: Inputs) -> Bound:
    """One of our operators, or another of its name and signature, with the arguments that ours takes."""
    given = oracle.arguments(getattr(gd, name), x)
    return returning(partial(getattr(operators, name), **given), partial(oracle.results, name, given))


def flashinfer(case: Case, x: Inputs) -> Bound | None:
    """FlashInfer's operators, whose names and layouts ours share (gates are linear, states ``[V, K]``). The one for
    several tokens takes fp32 states; bf16 ones go through the decode operator.
    """
    if case.heads[2:] != (128, 128):
        return None
    if case.operation == "prefill":
        return calling(import_module("flashinfer.gdn_prefill"), case.operator, x)
    bf16 = case.state == "bf16" and case.form not in ("K-major", "slots")
    if case.operation not in ("decode", "verify") or not (case.state == "fp32" or bf16):
        return None
    operator = "gated_delta_rule_decode_pretranspose" if case.operation == "verify" and bf16 else case.operator
    return calling(import_module("flashinfer.gdn_decode"), operator, x)


def fla(case: Case, x: Inputs) -> Bound | None:
    """flash-linear-attention: its Triton kernels on a GPU, its torch reference on a CPU. Logarithmic gates, a batch of
    one for packed sequences, states ``[V, K]`` on request. FlashQLA's prefill and Transformers' reference have its
    signatures.
    """
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")  # its own kernels, not FlashQLA's, which stand apart
    if not on_gpu(x):
        return torch_reference(lambda: import_module(f"{RULE}.naive").naive_chunk_gated_delta_rule, case, x)
    if case.operation == "prefill":
        return chunked(import_module(RULE).chunk_gated_delta_rule, x)
    if case.operation == "norm":
        norm = import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
        call = partial(norm, x["x"], x["z"], x["weight"], None, activation="swish", eps=1e-6)
        return returning(call, lambda y: {"output": y})
    if case.operation == "conv" and case.form == "prefill":
        states = torch.nn.functional.pad(x["conv_states"], (1, 0))  # as many columns as taps; the first is not read
        call = partial(
            import_module("fla.modules.causal_conv1d.ops").causal_conv1d, x["x"][None], x["weight"],
            initial_state=states, output_final_state=True, activation="silu", cu_seqlens=x["cu_seqlens"],
        )  # fmt: skip
        return returning(call, lambda y, state: {"output": y[0], "window": state[..., 1:]})
    if case.form not in ("V-major", "K-major", "final") or case.state != "fp32":
        return None
    turned, state = case.form == "K-major", x["initial_state" if case.operation == "verify" else "state"]
    call = partial(
        import_module(RULE).fused_recurrent_gated_delta_rule, x["q"], x["k"], x["v"], g=x["a"], beta=x["b"],
        A_log=x["A_log"], dt_bias=x["dt_bias"], use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        use_qk_l2norm_in_kernel=True, initial_state=state, output_final_state=True, state_v_first=not turned,
    )  # fmt: skip
    return returning(call, lambda o, state: {"output": o, "state": state.transpose(-1, -2) if turned else state})


def flashqla(case: Case, x: Inputs) -> Bound | None:
    """FlashQLA's prefill, for head size 128."""
    if case.operation != "prefill" or case.heads[2:] != (128, 128):
        return None
    return chunked(import_module("flash_qla").chunk_gated_delta_rule, x)


def transformers(case: Case, x: Inputs) -> Bound | None:
    """The torch reference that Transformers runs where no kernels are installed."""
    return torch_reference(lambda: import_module(TRANSFORMERS).torch_chunk_gated_delta_rule, case, x)


def on_gpu(x: Inputs) -> bool:
    return any(isinstance(y, torch.Tensor) and y.is_cuda for y in x.values())


def chunked(operator: Callable[..., Any], x: Inputs) -> Bound:
    """Prefill as FLA's signature has it, which FlashQLA shares."""
    q, k, v, g, beta = (x[name][None] for name in ("q", "k", "v", "log_g", "beta"))
    call = partial(
        operator, q, k, v, g, beta, initial_state=x["initial_state"], output_final_state=True, state_v_first=True,
        cu_seqlens=x["cu_seqlens"],
    )  # fmt: skip
    return returning(call, lambda output, state: {"output": output[0], "state": state})


def torch_reference(load: Callable[[], Callable[..., Any]], case: Case, x: Inputs) -> Bound | None:
    """FLA's prefill in torch, whose signature Transformers shares: equal sequences, heads repeated, ``[K, V]``."""
    if case.operation != "prefill" or len(set(case.lengths)) > 1:
        return None
    q, k = (reference.expand_heads(x[name], case.heads.hv) for name in "qk")
    given = (y.unflatten(0, (len(case.lengths), -1)) for y in (q, k, x["v"], x["log_g"], x["beta"]))
    initial = x["initial_state"].transpose(-1, -2).contiguous()
    call = partial(load(), *given, initial_state=initial, output_final_state=True)
    return returning(call, lambda o, state: {"output": o.flatten(0, 1), "state": state.transpose(-1, -2)})


class Peer(NamedTuple):
    """One contender."""

    bind: Callable[[Case, Inputs], Bound | None]
    """Its adapter."""
    package: str
    """Looked for, to say whether the peer is there."""
    distribution: str
    """Whose version is recorded."""
    devices: tuple[str, ...]


PEERS = {
    OURS: Peer(ours, "gated_delta", "gated-delta", ("cpu", "cuda")),
    SEPARATE: Peer(separate, "gated_delta", "gated-delta", ("cuda",)),
    "flashinfer": Peer(flashinfer, "flashinfer", "flashinfer-python", ("cuda",)),
    "flashqla": Peer(flashqla, "flash_qla", "flash-qla", ("cuda",)),
    "fla": Peer(fla, "fla", "fla-core", ("cpu", "cuda")),
    "transformers": Peer(transformers, "transformers", "transformers", ("cpu",)),
}
OTHERS = tuple(PEERS)[2:]


def bind(name: str, case: Case, x: Inputs) -> Bound | None:
    """The contender ``name`` with the inputs ``x`` of a case, None if it can't do the case."""
    return PEERS[name].bind(case, x)


def choose(words: Sequence[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Contenders on ``device`` for the words after ``--peers``, and why others that are known are absent.

    Raises:
        OptionError: an unknown name, or a peer asked for by name that can't run here.
    """
    named = [word for word in words if word not in ("auto", "none")]
    chosen, absent = [name for name in (OURS, SEPARATE) if device in PEERS[name].devices], {}
    for name in dict.fromkeys((*named, *(OTHERS if "auto" in words else ()))):
        if name not in OTHERS:
            absent[name] = "there is no such adapter"
        elif find_spec(PEERS[name].package) is None:
            absent[name] = "it is not installed"
        elif device not in PEERS[name].devices:
            absent[name] = f"it does not run on {device}"
        else:
            chosen.append(name)
        if name in named and name in absent:
            raise OptionError("bench", "--peers", repr(name), f"auto, none, or of {', '.join(OTHERS)}: {absent[name]}")
    return chosen, absent


def version_of(name: str) -> str:
    """The installed version of a contender, "" if it has none."""
    try:
        return version(PEERS[name].distribution)
    except PackageNotFoundError:
        return ""


def exact(case: Case, x: Inputs) -> Results:
    """A case in float64, before anything writes to its inputs; not a layer, which ``gated-delta check`` judges."""
    if case.operation == "layer":
        return {}
    if case.operation != "prefill":
        return {name: result.float() for name, result in oracle.evaluate(case.operator, x).items()}
    output, state, _ = reference.chunked(  # by chunks, which take milliseconds where the token loop would take minutes
        x["q"], x["k"], x["v"], x["g"].double(), x["beta"], case.heads.k**-0.5, x["initial_state"],
        list(pairwise(x["cu_seqlens"].tolist())), chunk=64, out=torch.empty_like(x["v"], dtype=torch.float32),
        dtype=torch.float64,
    )  # fmt: skip
    return {"output": output, "state": state.float()}


def judge(truth: Results, results: Results) -> tuple[float | None, str]:
    """The largest relative error of what a contender wrote, None if that is unknown, and what is wrong, if anything."""
    worst = None
    for name in (*truth, *(results.keys() - truth.keys())):
        if name not in results:
            return None, f"it gives no {name}"
        if not torch.isfinite(results[name]).all():
            return None, f"{name} is not finite"
        if name in truth:
            error = relative_error(results[name], truth[name])
            if not error <= TOLERANCE:
                return error, f"{name}: relative error {error:.1e}, over {TOLERANCE:.0e}"
            worst = max(error, worst or 0.0)
    return worst, ""
