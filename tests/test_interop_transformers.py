"""Stock and patched Transformers side by side: tiny random models of every family that we serve."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gated_delta.errors import ArgumentError
from gated_delta.interop import is_tested
from gated_delta.interop.transformers import FAMILIES, TESTED, patch, patched, unpatch
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from helpers import normal, same_bits, starts

transformers = pytest.importorskip("transformers", reason='needs Transformers: pip install "gated-delta[hf]"')
VERSION = importlib.metadata.version("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    served = is_tested("Transformers", VERSION, *TESTED)
if not served:
    pytest.skip(f"Transformers {VERSION} is not among the versions that are served", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("default:::transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "initializer_range": 0.2, "tie_word_embeddings": False,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
EXPERTS = {"experts_implementation": "eager"}  # the default one has no fp64
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {"head_dim": 32, "intermediate_size": 64, **MOE}),
    "qwen3_5": ("qwen3_5_text", {"head_dim": 32, "intermediate_size": 64}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"head_dim": 32, **MOE}),
    "olmo_hybrid": ("olmo_hybrid", {"intermediate_size": 64, "linear_value_head_dim": 64}),
    "qwen3_5, equal heads": (
        "qwen3_5_text",
        {
            "head_dim": 32, "intermediate_size": 64, "linear_num_value_heads": 2, "linear_key_head_dim": 64,
            "linear_conv_kernel_dim": 3,
        },
    ),
}  # fmt: skip
ONE_BY_ONE = ("causal_conv1d_update", "recurrent", "rms_norm_gated")
DECODE: dict[str, tuple[str, ...]] = {kind: ("gated_delta_net_step",) for kind, _ in CONFIGS.values()}
DECODE["olmo_hybrid"] = ONE_BY_ONE
"""What a decode step of a layer calls, of a cache that was prefilled here."""
LENGTHS = (1, 2, 3, 4, 5, 7, 9, 12, 17, 23, 31, 32, 33, 45, 63, 64, 65, 80, 96, 100)
NEW = 8
every_config = pytest.mark.parametrize("name", CONFIGS)


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, own = CONFIGS[name]
    torch.manual_seed(len(name))
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **own})
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EXPERTS).eval()
    return made.to(dtype)


def prompt(length: int, rows: int = 1) -> Tensor:
    return torch.randint(1, 199, (rows, length), generator=torch.Generator().manual_seed(length))


def generated(name: str, ids: Tensor, **options: Any) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    done = model(name).generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
    return done[:, ids.shape[1] :]


def logits(name: str, ids: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(name, dtype)(ids, **options).logits


class Served(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gated_delta":
            self.calls[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


@every_config
def test_greedy_tokens_are_the_same(name: str) -> None:
    stock = [generated(name, prompt(length)).tolist() for length in LENGTHS]
    with patch(), Served() as served:
        ours = [generated(name, prompt(length)).tolist() for length in LENGTHS]
    assert ours == stock
    assert len({token for row in stock for token in row[0]}) > 40  # a model that says one thing would prove nothing
    layers, steps = 2, len(LENGTHS)
    decode = DECODE[CONFIGS[name][0]]
    calls = Counter({"prefill": 1, "causal_conv1d": 1, "rms_norm_gated": 1})
    calls.update(dict.fromkeys(decode, NEW - 1))
    assert served.calls == {operator: layers * steps * count for operator, count in calls.items()}


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_within_the_budget(name: str, dtype: torch.dtype) -> None:
    """What stock computes in the next wider dtype is exact here; its delta rule is fp32 at most."""
    ids = prompt(70, 2)
    exact = logits(name, ids, torch.float64 if dtype == torch.float32 else torch.float32)
    plain = logits(name, ids, dtype)
    with patch():
        assert_within_budget("logits", logits(name, ids, dtype), plain, exact.double())


def in_pieces(name: str, ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any]:
    """Logits and cache of a prompt that comes in pieces of several tokens and of one."""
    cached, outputs = None, []
    with torch.no_grad():
        for piece in ids.split([30, 1, 1, 20, 1, 17], 1):
            done = model(name, dtype)(piece, past_key_values=cached, use_cache=True)
            cached = done.past_key_values
            outputs.append(done.logits)
    return torch.cat(outputs, 1), cached


@every_config
def test_a_cache_goes_on(name: str) -> None:
    ids = prompt(70, 2)
    plain, stock = in_pieces(name, ids)
    exact, widest = in_pieces(name, ids, torch.float64)
    with patch():
        output, ours = in_pieces(name, ids)
    assert_within_budget("logits", output, plain, exact)
    assert_within_budget("logits", output, plain, logits(name, ids, torch.float64))
    for layer in (0, 2):
        for states in ("conv_states", "recurrent_states"):
            ours_, stock_, widest_ = (getattr(c.layers[layer], states)[0] for c in (ours, stock, widest))
            assert ours_.dtype == stock_.dtype
            assert_within_budget(f"{states} of layer {layer}", ours_, stock_, widest_.double())


@every_config
def test_a_cache_of_bf16_goes_on(name: str) -> None:
    ids = prompt(70, 2)
    plain, exact = in_pieces(name, ids, torch.bfloat16)[0], logits(name, ids)
    with patch():
        assert_within_budget("logits", in_pieces(name, ids, torch.bfloat16)[0], plain, exact.double())


@every_config
@pytest.mark.parametrize("first", ["stock", "patched"])
def test_a_cache_changes_hands(name: str, first: str) -> None:
    """Its recurrent states lie in memory as the one who prefilled had them; the other takes them as they are."""
    ids = prompt(33, 2)
    expected = generated(name, ids)
    tokens, cached = ids, None
    for turn in ("stock", "patched") if first == "stock" else ("patched", "stock"):
        with patch() if turn == "patched" else nullcontext(), torch.no_grad():
            for _ in range(NEW // 2):
                fed = tokens if cached is None else tokens[:, -1:]
                done = model(name)(fed, past_key_values=cached, use_cache=True)
                cached = done.past_key_values
                tokens = torch.cat((tokens, done.logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(tokens[:, ids.shape[1] :], expected)


@every_config
def test_left_padding(name: str) -> None:
    lengths = (50, 1, 33, 8)
    ids = torch.stack([torch.cat((torch.zeros(50 - n, dtype=torch.int64), prompt(n)[0])) for n in lengths])
    stock = generated(name, ids, attention_mask=(ids > 0).long())
    with patch():
        assert torch.equal(generated(name, ids, attention_mask=(ids > 0).long()), stock)
        alone = [generated(name, prompt(n))[0] for n in lengths]
    assert torch.equal(torch.stack(alone), stock)


@every_config
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_options(name: str, options: dict[str, Any]) -> None:
    ids = prompt(20, 2)
    stock = generated(name, ids, **options)
    with patch(), Served() as served:
        assert torch.equal(generated(name, ids, **options), stock)
    # Beam search puts its cache together anew, and as stock's lies.
    decode = ONE_BY_ONE if "num_beams" in options else DECODE[CONFIGS[name][0]]
    assert all(served.calls[operator] >= 2 * (NEW - 1) for operator in decode)


@every_config
def test_packed_sequences_do_not_leak(name: str) -> None:
    """Neither through the delta rule nor, as stock does, through the convolution."""
    lengths = (5, 30, 1, 2, 20)
    ids = torch.cat([prompt(n) for n in lengths], 1)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    cut = starts(lengths)
    alone = [
        torch.cat([logits(name, prompt(n), dtype) for n in lengths], 1) for dtype in (torch.float32, torch.float64)
    ]
    packing: dict[str, Any] = {"position_ids": places, "cu_seq_lens_q": cut, "cu_seq_lens_k": cut}
    with patch():
        assert_within_budget("logits", logits(name, ids, use_cache=False, **packing), *alone)
        with pytest.raises(ArgumentError, match="use_cache=True is given; it must be left out"):
            logits(name, ids, use_cache=True, **packing)
        with pytest.raises(ArgumentError, match="cu_seq_lens_q is None; it must be given"):
            logits(name, ids, use_cache=False, position_ids=places, seq_idx=places)


@every_config
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_are_those_of_stock(name: str, mode: str) -> None:
    ids = prompt(40, 2)

    def gradients() -> list[Tensor]:
        own = model(name).train(mode == "train")
        own.zero_grad()
        own(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in own.parameters() if p.grad is not None]

    try:
        stock = gradients()
        with patch(), Served() as served:
            ours = gradients()
    finally:
        model(name).eval().zero_grad()
    assert not served.calls
    assert len(ours) == len(stock) > 20
    assert all(map(same_bits, ours, stock))


def test_a_head_size_that_we_do_not_serve_is_an_error() -> None:
    config = transformers.AutoConfig.for_model("qwen3_5_text", **{**COMMON, "linear_key_head_dim": 16})
    own = transformers.AutoModelForCausalLM.from_config(config).eval()
    with (
        patch(),
        torch.no_grad(),
        pytest.raises(ArgumentError, match=r"head size K \(from \w\) is 16; it must be one of 32"),
    ):
        own(prompt(5))


def test_torch_compile_sees_one_graph() -> None:
    ids = prompt(20, 2)
    plain, exact = (logits("qwen3_5", ids, dtype) for dtype in (torch.float32, torch.float64))
    with patch(), torch.no_grad():
        output = torch.compile(model("qwen3_5"), backend="eager", fullgraph=True)(ids, use_cache=False).logits
    assert_within_budget("logits", output, plain, exact)


# --- the switch -------------------------------------------------------------------------------------------------------


def names() -> list[tuple[str, object]]:
    """Everything that a patch may replace, as it is now."""
    found: list[tuple[str, object]] = []
    for family, prefix in FAMILIES.items():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        functions = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
        found += [(f"{family}.{name}", getattr(module, name)) for name in functions]
        found += [(f"{family}.{name}", getattr(module, name)) for name in ("causal_conv1d_fn", "causal_conv1d_update")]
        found.append((f"{family} norm", getattr(module, f"{prefix}RMSNormGated").forward))
        if family != "olmo_hybrid":
            found.append((f"{family} layer", getattr(module, f"{prefix}GatedDeltaNet").forward))
    return found


def changed(before: list[tuple[str, object]]) -> int:
    return sum(a is not b for (_, a), (_, b) in zip(before, names(), strict=True))


def test_unpatch_restores() -> None:
    before = names()
    assert len(before) == 23
    patch()
    assert patched()
    assert changed(before) == 23
    unpatch()
    assert not patched()
    assert changed(before) == 0
    unpatch()
    assert changed(before) == 0


def test_a_context_ends_what_it_began_and_no_more() -> None:
    before = names()
    with pytest.raises(KeyError), patch():
        with patch():
            assert changed(before) == 23
        assert changed(before) == 23
        raise KeyError
    assert changed(before) == 0


@pytest.mark.parametrize("version", ["5.15.1", "5.24.0.dev0", "5.24.0", "6.0.0", "4.57.6"])
def test_an_unknown_version_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    said = f"Transformers {version} as it is: it was tested with 5.16 to 5.23"
    with pytest.warns(UserWarning, match=said) as caught, patch():
        assert not patched()
        assert changed(before) == 0
    assert caught[0].filename == __file__


def test_a_line_in_the_log_names_the_families(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gated_delta"), patch():
        pass
    said = f"serving {', '.join(FAMILIES)} of Transformers {VERSION}"
    assert caplog.messages == [said]
    page = (Path(__file__).parents[1] / "docs" / "integrate" / "transformers.md").read_text()
    assert said.removesuffix(VERSION) in page
    assert " to ".join(TESTED) in page


def test_importing_loads_no_engine() -> None:
    program = """
import sys
import gated_delta, gated_delta.interop.conv, gated_delta.interop.fla, gated_delta.interop.transformers
print({"transformers", "fla", "causal_conv1d", "vllm", "sglang", "flashinfer"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "set()\n"


# --- one token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["K V", "V K"])
def test_gates_of_a_decode(dtype: torch.dtype, layout: str) -> None:
    """Every log decay with every beta, the ends of both ranges included."""
    decays = torch.tensor([0.0, -1e-7, -1e-3, -0.3, -2.0, -20.0, -100.0, -torch.inf])
    betas = torch.tensor([0.0, 1e-6, 0.3, 1.0, 1.999, 2.0])
    g = decays.repeat_interleave(6).view(1, 1, 48)
    beta = betas.repeat(8).view(1, 1, 48).to(dtype)
    q, k = (normal(1, 1, 48, 32, seed=i).to(dtype) for i in (1, 2))
    v, state = normal(1, 1, 48, 64, seed=3).to(dtype), normal(1, 48, 32, 64, seed=4)
    given = state.clone() if layout == "K V" else state.mT.contiguous().mT

    def evaluate(kind: torch.dtype) -> oracle.Evaluation:
        return oracle.prefill(
            q[0], k[0], v[0], g[0], beta[0], cu_seqlens=starts([1]), initial_state=state.mT, g_space="log",
            use_qk_l2norm_in_kernel=True, dtype=kind,
        )  # fmt: skip

    plain, exact = evaluate(torch.float32), evaluate(torch.float64)
    with patch():
        modelling = importlib.import_module("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
        rule: Callable[..., tuple[Tensor, Tensor | None]] = modelling.torch_recurrent_gated_delta_rule
        options: dict[str, Any] = {"g": g, "beta": beta, "initial_state": given, "use_qk_l2norm_in_kernel": True}
        output, nothing = rule(q, k, v, **options)
        assert nothing is None
        assert torch.equal(given, state)
        again, final = rule(q, k, v, **options, output_final_state=True)
    assert final is not None
    assert final is given  # the cache's own state, which it need not copy
    assert same_bits(again, output)
    for head in range(48):
        own = (slice(None), head)
        assert_within_budget(f"output of head {head}", output[0, :, head], plain.output[own], exact.output[own])
        assert_within_budget(f"state of head {head}", final.mT[own], plain.state[own], exact.state[own])
