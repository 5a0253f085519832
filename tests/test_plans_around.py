"""Plans of what stands around the rule: what a repeated call gives, and that nothing gets past validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import dispatch, plans
from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import ArgumentError, DataError, DtypeError, OptionError, ShapeError
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.prefill import gates
from gated_delta.state import StatePool
from gated_delta.testing.inputs import Inputs
from helpers import DEVICE, copied, nans, normal, same_bits, starts

pytest.importorskip("triton")
D, SLOTS = 24, torch.tensor([2, 0], dtype=torch.int32)


def conv(**changes: Any) -> Inputs:
    x = {"x": normal(5, D), "weight": normal(D, 4, seed=1), "bias": normal(D, seed=2), "cu_seqlens": starts([3, 2])}
    x |= {"conv_states": normal(3, D, 3, seed=3), "state_indices": SLOTS.clone()}
    return {**x, "has_initial_state": torch.tensor([True, False]), "backend": "triton", **changes}


def update(**changes: Any) -> Inputs:
    x = {"x": normal(2, D), "conv_states": normal(3, D, 3, seed=3), "weight": normal(D, 4, seed=1), "bias": None}
    return {**x, "state_indices": SLOTS.clone(), "backend": "triton", **changes}


def decays(**changes: Any) -> Inputs:
    x = {"A_log": normal(4), "a": normal(5, 2, 2, seed=1), "dt_bias": normal(4, seed=2), "b": normal(5, 2, 2, seed=3)}
    return {**x, "backend": "triton", **changes}


def norm(**changes: Any) -> Inputs:
    x = {"x": normal(5, 2, 32), "z": normal(5, 2, 32, seed=1), "weight": normal(32, seed=2), "eps": 1e-6}
    return {**x, "backend": "triton", **changes}


def step(**changes: Any) -> Inputs:
    """Two value heads a key head, whose tickets the kernel has to be given."""
    x = {name: normal(2, 1, 32, seed=i) for i, name in enumerate("qk")}
    x |= {name: normal(2, 1, 2, 32, seed=i) for i, name in enumerate("vz", 2)}
    x |= {name: normal(2, 1, 2, seed=i) for i, name in enumerate("ba", 4)}
    x |= {"conv_states": normal(3, 128, 3, seed=6), "conv_weight": normal(128, 4, seed=7), "A_log": normal(2, seed=8)}
    x |= {"state": normal(3, 2, 32, 32, seed=9), "dt_bias": normal(2, seed=10), "norm_weight": normal(32, seed=11)}
    return {**x, "state_indices": SLOTS.clone(), "eps": 1e-6, "backend": "triton", **changes}


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Inputs]]] = {
    "causal_conv1d": (gd.causal_conv1d, conv),
    "causal_conv1d_update": (gd.causal_conv1d_update, update),
    "gates": (gates, decays),
    "rms_norm_gated": (gd.rms_norm_gated, norm),
    "gated_delta_net_step": (gd.gated_delta_net_step, step),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def run(name: str, **changes: Any) -> list[Tensor]:
    """What the operator returns, then its tensors: what it wrote is among them."""
    operator, inputs = OPERATORS[name]
    given = copied(inputs(**changes))
    result = operator(**given)
    return [
        *(result if isinstance(result, tuple) else (result,)),
        *(x for x in given.values() if isinstance(x, Tensor)),
    ]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One more for every call that is judged."""
    asked: list[str] = []
    real = dispatch.serving
    monkeypatch.setattr(dispatch, "serving", lambda args, *rest: asked.append(args.where) or real(args, *rest))
    return asked


FORMS: list[tuple[str, Inputs]] = [
    *((name, {}) for name in OPERATORS),
    ("causal_conv1d", {"conv_states": None, "state_indices": None, "has_initial_state": None, "activation": None}),
    ("causal_conv1d", {"x": normal(5, 2, 12), "head_k": 3}),
    ("causal_conv1d_update", {"x": normal(2, 3, D), "null_slot": 0}),
    ("rms_norm_gated", {"x": normal(5, 2, 64)[..., 32:], "activation": "sigmoid"}),
    ("gates", {"allow_neg_eigval": True, "a": normal(5, 2, 4)[..., 2:]}),
]


@pytest.mark.parametrize(("name", "changes"), FORMS)
def test_a_repeated_call_is_judged_once_and_gives_the_same(name: str, changes: Inputs, judged: list[str]) -> None:
    def fresh() -> Inputs:
        """Again what it was, as it lay: an earlier call may have written it."""
        return {n: x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x for n, x in changes.items()}

    results = [run(name, **fresh()) for _ in range(3)]
    assert judged == [name]
    for again in results[1:]:
        assert again[0].data_ptr() != results[0][0].data_ptr()
        assert all(map(same_bits, again, results[0]))
    plans._PLANS.clear()
    assert all(map(same_bits, run(name, **fresh()), results[0]))
    assert judged == [name] * 2


def test_what_is_given_to_be_written_is_returned(judged: list[str]) -> None:
    for make, name in ((nans(5, 2, 32), "rms_norm_gated"), (nans(2, 2, 32), "gated_delta_net_step")):
        expected, outputs = run(name), [make.clone().to(DEVICE) for _ in range(2)]
        for output in outputs:
            assert OPERATORS[name][0](**copied(OPERATORS[name][1]()), output=output) is output
            assert same_bits(output, expected[0])
    assert judged == ["rms_norm_gated"] * 2 + ["gated_delta_net_step"] * 2


BAD = [
    (name, tensor) for name, (_, inputs) in OPERATORS.items() for tensor, x in inputs().items() if isinstance(x, Tensor)
]


@pytest.mark.parametrize(("name", "tensor"), BAD)
@pytest.mark.parametrize("how", ["dtype", "rank", "no tensor"])
def test_a_bad_tensor_is_refused_as_by_the_first_call(name: str, tensor: str, how: str) -> None:
    x = OPERATORS[name][1]()[tensor]
    bad = {"dtype": x.to(torch.complex64), "rank": x[None], "no tensor": 3}[how]
    messages = []
    for before in (0, 2):
        plans._PLANS.clear()
        for _ in range(before):
            run(name)
        with pytest.raises(DtypeError if how != "rank" else ShapeError) as raised:
            run(name, **{tensor: bad})
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert tensor in messages[0]


WRONG: list[tuple[str, Inputs, type[ArgumentError]]] = [
    ("causal_conv1d", {"activation": "gelu"}, OptionError),
    ("causal_conv1d", {"head_k": True}, DtypeError),
    ("causal_conv1d", {"head_k": [1]}, DtypeError),
    ("causal_conv1d", {"weight": normal(D, 6)}, ShapeError),
    ("causal_conv1d", {"state_indices": SLOTS[:1]}, ShapeError),
    ("causal_conv1d_update", {"null_slot": False}, DtypeError),
    ("causal_conv1d_update", {"conv_states": normal(3, D, 2)}, ShapeError),
    ("gates", {"allow_neg_eigval": 0}, DtypeError),
    ("gates", {"b": normal(5, 2, 3)}, ShapeError),
    ("rms_norm_gated", {"eps": True}, DtypeError),
    ("rms_norm_gated", {"activation": ["silu"]}, OptionError),
    ("rms_norm_gated", {"z": normal(5, 1, 32)}, ShapeError),
    ("gated_delta_net_step", {"allow_neg_eigval": 0}, DtypeError),
    ("gated_delta_net_step", {"state": normal(3, 2, 32, 64)[..., ::2]}, ArgumentError),
]


@pytest.mark.parametrize(("name", "changes", "error"), WRONG)
def test_errors_are_raised_every_time(name: str, changes: Inputs, error: type[ArgumentError]) -> None:
    run(name)
    for _ in range(2):
        with pytest.raises(error):
            run(name, **changes)


@pytest.mark.parametrize("name", ["causal_conv1d", "causal_conv1d_update", "gated_delta_net_step"])
def test_checked_mode_looks_at_values_every_time(name: str) -> None:
    for _ in range(2):
        run(name)
    for _ in range(2):
        with gd.checked(), pytest.raises(DataError, match="state_indices is 3 somewhere"):
            run(name, state_indices=torch.tensor([0, 3], dtype=torch.int32))


@every_operator
def test_nothing_is_kept_of_a_call_that_is_watched(name: str, judged: list[str]) -> None:
    with gd.checked():
        run(name)
    assert not plans._PLANS
    run(name)
    assert judged == [name] * 2


def test_rows_that_no_two_strides_reach(judged: list[str]) -> None:
    """The norm takes copies, which no plan could name."""
    x = normal(2, 3, 4, 32).transpose(0, 1)
    z = normal(4, 2, 3, 32, seed=1).permute(2, 1, 0, 3)
    expected = run("rms_norm_gated", x=x.contiguous(), z=z.contiguous())
    for _ in range(2):
        assert same_bits(run("rms_norm_gated", x=x, z=z)[0], expected[0])
    assert judged == ["rms_norm_gated"] * 3


def test_no_rows_give_zeros() -> None:
    none, start = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    fresh = torch.zeros(0, dtype=torch.bool)
    for _ in range(2):
        output, *_ = run("causal_conv1d", cu_seqlens=start, state_indices=none, has_initial_state=fresh)
        assert not output.any()
        rows = {"state_indices": none[:, None], "cu_seqlens": start, "num_accepted_tokens": none}
        assert not run("gated_delta_net_step", **rows)[0].any()


def test_a_layer_judges_its_tensors_once() -> None:
    """And what does not fit anew, before anything is written."""
    config = GatedDeltaNetConfig(hidden_size=32, num_k_heads=1, num_v_heads=2, head_k_dim=32, head_v_dim=32)
    layer = GatedDeltaNetAttention(config)
    asked: list[object] = []
    layer._tensors = lambda *given: asked.append(None) or type(layer)._tensors(layer, *given)  # type: ignore[method-assign]
    state, batch = StatePool(config, layers=1, slots=3).layer(0), GatedDeltaNetBatch.build([Row(1, 1)])
    with torch.no_grad():
        for _ in range(3):
            layer(normal(1, 32), batch, state)
        assert len(asked) == 1
        for bad in ({"conv": state.conv[:, :-1]}, {"recurrent": state.recurrent.double()}):
            before = state.recurrent.clone()
            for _ in range(2):
                with pytest.raises(ArgumentError, match="state"):
                    layer(normal(1, 32), batch, state._replace(**bad))
            assert same_bits(state.recurrent, before)
        with pytest.raises(ShapeError, match="hidden"):
            layer(normal(1, 31), batch, state)


@pytest.mark.parametrize("rows", [[Row(1, 1), Row(1, 2)], [Row(3, 1, fresh=True), Row(2, 2)], [Row(1, 1), Row(2, 2)]])
def test_a_step_of_a_layer_like_an_earlier_one_is_not_judged(
    rows: list[Row], judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any layer of a pool that lies like the first. (Tickets of three slots would not all be aligned alike.)"""
    monkeypatch.setattr(dispatch, "choose", lambda *_: "triton")
    config = GatedDeltaNetConfig(hidden_size=32, num_k_heads=1, num_v_heads=2, head_k_dim=32, head_v_dim=32)
    torch.manual_seed(0)
    layer, pool = GatedDeltaNetAttention(config).to(DEVICE), StatePool(config, layers=3, slots=4, device=DEVICE)
    batch = GatedDeltaNetBatch.build(rows, device=DEVICE)
    hidden = normal(batch.num_actual_tokens, 32).to(DEVICE)
    with torch.no_grad():
        outputs = [layer(hidden, batch, pool.layer(0))]
        first = judged.copy()
        outputs += [layer(hidden, batch, pool.layer(i)) for i in (1, 2)]
    assert first
    assert judged == first
    assert all(same_bits(y, outputs[0]) for y in outputs)
    for i in (1, 2):
        assert all(same_bits(x, y) for x, y in zip(pool.layer(i)[:2], pool.layer(0)[:2], strict=True))
