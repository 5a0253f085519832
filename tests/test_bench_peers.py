"""Benchmarks: adapters pass on what their peers take, and read what these give."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

import pytest
import torch

import gated_delta as gd
from gated_delta.bench import peers
from gated_delta.bench.cases import Case, Heads
from gated_delta.bench.inputs import make_sets
from gated_delta.errors import OptionError

SMALL = Heads(2, 4, 32, 64)
PREFILL = Case("x", "prefill", SMALL, sequences="7+3")
UPDATE = Case("x", "conv", SMALL, "update W", batch=2)
DECODE = Case("x", "decode", SMALL, "V-major", batch=2)


NO: Any = None
"""A default that may be left out."""


def flashinfer_prefill(
    q, k, v, g=NO, beta=NO, scale=NO, initial_state=NO, output_final_state=False, cu_seqlens=NO,
    use_qk_l2norm_in_kernel=False, output=NO, output_state=NO, max_seqlen=NO,
):  # fmt: skip
    """With its own arguments, the gate linear."""
    return gd.chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, output,
        output_state, max_seqlen=max_seqlen,
    )  # fmt: skip


def log_prefill(
    q, k, v, g, beta, scale=NO, initial_state=NO, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=NO, state_v_first=False,
):  # fmt: skip
    """A prefill of FLA's and FlashQLA's arguments: a batch of one, the gate in logarithms."""
    assert state_v_first and len(q) == 1
    output, state = gd.chunk_gated_delta_rule(
        q[0], k[0], v[0], g[0], beta[0], scale, initial_state, True, cu_seqlens, use_qk_l2norm_in_kernel, g_space="log"
    )
    return output[None], state


def fla_recurrent(
    q, k, v, g=NO, beta=NO, scale=NO, initial_state=NO, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, A_log=NO, dt_bias=NO, use_beta_sigmoid_in_kernel=False, state_v_first=False,
):  # fmt: skip
    assert use_gate_in_kernel and use_beta_sigmoid_in_kernel and output_final_state
    state = initial_state.clone() if state_v_first else initial_state.transpose(-1, -2).contiguous()
    output, state = gd.gated_delta_rule_decode_pretranspose(
        q, k, v, state, A_log, g, dt_bias, beta, scale, None, use_qk_l2norm_in_kernel
    )
    return output, state if state_v_first else state.transpose(-1, -2)


def fla_conv(
    x,
    weight=NO,
    initial_state=NO,
    output_final_state=False,
    activation=NO,
    cu_seqlens=NO,
):
    states = initial_state[..., 1:].contiguous()
    y = gd.causal_conv1d(
        x[0], weight, conv_states=states, cu_seqlens=cu_seqlens, state_indices=None, has_initial_state=None,
        activation=activation,
    )  # fmt: skip
    return y[None], torch.nn.functional.pad(states, (1, 0), value=float("nan"))


def fla_norm(x, g, weight, bias, activation="swish", eps=1e-6):
    assert bias is None
    return gd.rms_norm_gated(x, g, weight, eps, activation)


def naive_chunk(q, k, v, g, beta, initial_state=NO, output_final_state=False):
    """The torch references: equal sequences as a batch, heads repeated, states ``[K, V]``."""
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3]
    rows, length = q.shape[:2]
    starts = torch.arange(rows + 1) * length
    flat = [y.flatten(0, 1) for y in (q, k, v, g, beta)]
    state = initial_state.transpose(-1, -2).contiguous()
    output, state = gd.chunk_gated_delta_rule(
        *flat, initial_state=state, output_final_state=True, cu_seqlens=starts, g_space="log"
    )
    return output.unflatten(0, (rows, length)), state.transpose(-1, -2)


FAKES: dict[str, dict[str, Callable[..., Any]]] = {
    "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": flashinfer_prefill},
    "flashinfer.gdn_decode": {
        name: getattr(gd, name)
        for name in ("gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp")
    },
    "flash_qla": {"chunk_gated_delta_rule": log_prefill},
    "fla.ops.gated_delta_rule": {
        "chunk_gated_delta_rule": log_prefill, "fused_recurrent_gated_delta_rule": fla_recurrent,
    },
    "fla.ops.gated_delta_rule.naive": {"naive_chunk_gated_delta_rule": naive_chunk},
    "fla.modules.causal_conv1d.ops": {"causal_conv1d": fla_conv},
    "fla.modules.norm.fused_norm_gate": {"rms_norm_gated": fla_norm},
    "transformers.models.qwen3_next.modeling_qwen3_next": {"torch_chunk_gated_delta_rule": naive_chunk},
}  # fmt: skip
"""Peers' functions with the arguments that the real ones take (and no more, so that another one is an error)."""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in FAKES.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:i])) or ModuleType(".".join(parts[:i]))
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)
        for function, value in functions.items():
            monkeypatch.setattr(sys.modules[name], function, value, raising=False)


FULL = Heads(1, 2)
OF_PEERS = {
    "flashinfer": [
        *(Case("x", "decode", FULL, form, batch=2) for form in ("V-major", "K-major")),
        Case("x", "decode", FULL, "pool", batch=2, state="bf16"),
        *(Case("x", "verify", FULL, form, batch=2, tokens=3, state=state)
          for form, state in (("outputs", "fp32"), ("final", "bf16"), ("snapshots", "bf16"), ("slots", "fp32"))),
        Case("x", "prefill", FULL, sequences="40+3"),
    ],
    "flashqla": [Case("x", "prefill", FULL, sequences="40+3")],
    "fla": [
        Case("x", "prefill", FULL, sequences="40+3"), Case("x", "norm", FULL, batch=3),
        Case("x", "conv", FULL, "prefill", sequences="9+1"), Case("x", "decode", FULL, "V-major", batch=2),
        Case("x", "decode", FULL, "K-major", batch=2), Case("x", "verify", FULL, "final", batch=2, tokens=3),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name} {case.operation} {case.form}")
        for name in OF_PEERS
        for case in OF_PEERS[name]
    ],
)
@pytest.mark.usefixtures("fakes")
def test_adapters_speak_their_peers_language(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given functions of the peers' arguments, every adapter gives right results."""
    monkeypatch.setattr(peers, "on_gpu", lambda x: True)
    inputs = make_sets(case, torch.device("cpu"), 0)[0]
    truth = peers.exact(case, inputs)
    bound = peers.bind(name, case, inputs)
    assert bound is not None
    bound.call()
    assert peers.judge(truth, bound.results())[1] == ""


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", ["fla", "transformers"])
def test_references_on_the_cpu(name: str) -> None:
    case = Case("x", "prefill", SMALL, sequences="33x3")
    inputs = make_sets(case, torch.device("cpu"), 0)[0]
    truth = peers.exact(case, inputs)
    bound = peers.bind(name, case, inputs)
    assert bound is not None
    bound.call()
    assert peers.judge(truth, bound.results())[1] == ""
    ragged = replace(case, sequences="33+4")
    assert peers.bind(name, ragged, make_sets(ragged, torch.device("cpu"), 0)[0]) is None


@pytest.mark.parametrize(
    ("name", "case"),
    [("flashinfer", PREFILL), ("flashinfer", UPDATE), ("flashqla", PREFILL), ("flashqla", DECODE),
     ("flashinfer", Case("x", "decode", FULL, "K-major", batch=1, state="bf16")),
     ("flashinfer", Case("x", "verify", FULL, "slots", batch=1, tokens=2, state="bf16")),
     ("flashinfer", Case("x", "verify", FULL, "outputs", batch=1, tokens=2, state="fp16")),
     ("fla", Case("x", "decode", FULL, "pool", batch=1, state="bf16")), ("fla", UPDATE)],
)  # fmt: skip
def test_adapters_pass_on_what_their_peer_cannot_do(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "on_gpu", lambda x: True)
    assert peers.bind(name, case, make_sets(case, torch.device("cpu"), 0)[0]) is None


def test_which_peers_run() -> None:
    chosen, absent = peers.choose(["auto"], "cpu")
    assert chosen[0] == peers.OURS
    assert absent["flashinfer"] in ("it is not installed", "it does not run on cpu")
    assert peers.choose(["none"], "cpu") == ([peers.OURS], {})
    assert peers.choose(["none"], "cuda") == ([peers.OURS, peers.SEPARATE], {})


@pytest.mark.parametrize(
    ("word", "reason"), [("nonsense", "there is no such adapter"), ("flashqla", "it is not installed")]
)
def test_peers_that_are_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch, word: str, reason: str) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=reason):
        peers.choose([word], "cpu")


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    assert peers.version_of(peers.OURS) == gd.__version__
    monkeypatch.setattr(peers, "version", unknown)
    assert peers.version_of("flashqla") == ""
