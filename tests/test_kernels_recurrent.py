"""Triton's decode and several tokens against the contract, on shapes that Triton's interpreter can bear; the real
ones, and what needs a GPU, are in test_kernels_recurrent_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import plans, reference
from gated_delta.errors import OptionError
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, recurrent_inputs, to_device
from helpers import DEVICE, FLOATS, ROUTES, Pool, assert_recurrent, evaluations, nans, rows, same_bits

host = import_module("gated_delta.kernels.triton.recurrent")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that the interpreter computes in vain
FP32, BF16, FP16 = FLOATS
PER_TOKEN = ("q", "k", "v", "a", "b")


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU fewer programs to interpret."""
    if DEVICE == "cpu":
        monkeypatch.setattr(host, "_token_tile", lambda *_: host.Tile(32, 1))
        monkeypatch.setattr(host, "_verify_tile", lambda *_: host.Tile(32, 1, 32, 3, 32))


def small(batch: int = 2, tokens: int = 1, **options: Any) -> Inputs:
    return recurrent_inputs(batch, tokens, **{"h": 1, "hv": 2, "head_k": 64, "head_v": 32, **options})


def spread(values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """An index tensor on the device with strides, whose other elements name no slot of any pool."""
    dense = torch.tensor(values, dtype=dtype, device=DEVICE)
    return torch.stack((dense, torch.full_like(dense, 1 << 20), torch.full_like(dense, 1 << 20)), -1)[..., 0]


def pooled(inputs: Inputs, slots: list[int], operator: str = "mtp", *, size: int = 9, **options: Any) -> Any:
    """The output of an operator over a poisoned pool with the states in ``slots``, and the pool."""
    pool = Pool(inputs["state"], slots, size=size)
    pool.page, pool._before = pool.page.to(DEVICE), pool._before.to(DEVICE)
    pool.view = pool._cut(pool.page)
    given = to_device({name: x for name, x in inputs.items() if name != "state"}, DEVICE)
    given |= {"initial_state": pool.view, "initial_state_indices": spread(slots), "backend": "triton", **options}
    if operator == "pool":
        return gd.gated_delta_rule_decode_pretranspose(**given, state=None)[0], pool
    return gd.gated_delta_rule_mtp(**{"disable_state_update": False, **given})[0], pool


def flipped(states: Tensor) -> Tensor:
    """A copy in the other layout."""
    return states.mT.clone(memory_format=torch.contiguous_format)


def run(route: str, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and states of any operator, from copies of the states."""
    if route in ("pool", "mtp"):
        slots = [2 * i + 1 for i in reversed(range(len(inputs["state"])))]
        output, pool = pooled({**inputs, **options}, slots, route, size=2 * len(slots) + 2)
        assert pool.untouched_except(slots)
        return output, pool.view[slots]
    given = {**to_device({**inputs, **options}, DEVICE), "backend": "triton"}
    if route == "V-major":
        return gd.gated_delta_rule_decode_pretranspose(**{**given, "state": given["state"].clone()})
    output, after = gd.gated_delta_rule_decode(**{**given, "state": flipped(given["state"])})
    return output, after.mT


# --- one token --------------------------------------------------------------------------------------------------------

SHORT_KEYS = {"use_qk_l2norm": False}
ONE_TOKEN: list[tuple[Inputs, Inputs]] = [
    ({}, {}),
    ({"state_dtype": BF16, "head_k": 96}, {"allow_neg_eigval": True}),
    ({"state_dtype": FP16, "head_k": 32, "head_v": 96}, {"scale": -1.5}),
    ({"state_dtype": FP16, "dtype": FP16}, SHORT_KEYS),
    ({"state_dtype": BF16, "dtype": FP32, "h": 2}, {**SHORT_KEYS, "allow_neg_eigval": True}),
    ({"state_dtype": FP32, "dtype": FP32, "head_k": 32}, {}),
]
every_route = pytest.mark.parametrize("route", ROUTES)
three_routes = pytest.mark.parametrize(("route", "tokens"), [("K-major", 1), ("V-major", 1), ("mtp", 3)])


@every_route
@pytest.mark.parametrize(("sizes", "options"), ONE_TOKEN)
def test_one_token(route: str, sizes: Inputs, options: Inputs) -> None:
    inputs = small(**sizes)
    inputs["k"] = inputs["k"] * (1.0 if options.get("use_qk_l2norm", True) else 0.2)
    output, state = run(route, inputs, **options)
    assert (output.dtype, state.dtype) == (inputs["q"].dtype, inputs["state"].dtype)
    assert_recurrent({**inputs, **options}, output, state)


@three_routes
def test_scale_zero_is_zero(route: str, tokens: int) -> None:
    inputs = small(tokens=tokens)
    output, state = run(route, inputs, scale=0.0)
    assert bool((output == 0).all())
    assert same_bits(state, run(route, inputs)[1])


def _filled(name: str, value: float) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: torch.full_like(inputs[name], value)}


def _middle(name: str, value: float) -> Callable[[Inputs], Inputs]:
    """One token of several."""

    def change(inputs: Inputs) -> Inputs:
        changed = inputs[name].clone()
        changed[:, changed.shape[1] // 2] = value
        return {**inputs, name: changed}

    return change


EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "a + dt_bias = 200": lambda x: _filled("a", 200.0)(_filled("dt_bias", 0.0)(x)),
    "a + dt_bias = -200": lambda x: _filled("a", -200.0)(_filled("dt_bias", 0.0)(x)),
    "softplus of a small number": _filled("a", -12.0),
    "b = 100": _filled("b", 100.0),
    "b = -100": _filled("b", -100.0),
    "alpha 0 in the middle": _middle("a", 3e38),
    "zero keys": _filled("k", 0.0),
    "zero queries": _filled("q", 0.0),
    "similar keys": lambda x: {**x, "k": 0.1 * x["k"] + x["k"][:, :1]},
    "short vectors to normalise": lambda x: {**x, "q": x["q"] * 2e-4, "k": x["k"] * 2e-4},
    "large states": lambda x: {**x, "state": 64.0 * x["state"]},
    "long vectors to normalise": lambda x: {**x, "q": x["q"] * 1e4, "k": x["k"] * 1e4},
}


@three_routes
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(route: str, tokens: int, name: str) -> None:
    inputs = EXTREMES[name](small(tokens=tokens))
    assert_recurrent(inputs, *run(route, inputs))


@three_routes
@pytest.mark.parametrize("a", [200.0, 1e4, 3e38])
def test_a_gate_that_closes_forgets_everything(route: str, tokens: int, a: float) -> None:
    inputs = {**_filled("a", a)(small(tokens=tokens)), "A_log": torch.full((2,), 2.0)}
    output, state = run(route, inputs)
    empty = run(route, {**inputs, "state": torch.zeros_like(inputs["state"])})
    assert_recurrent(inputs, output, state)
    assert torch.equal(output, empty[0])
    assert torch.equal(state, empty[1])


@three_routes
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_ready_gates(route: str, tokens: int, dtype: torch.dtype) -> None:
    """A closed gate and a doubled beta among them."""
    inputs = _middle("a", 3e38)(small(tokens=tokens))
    raw = {name: inputs[name] for name in ("A_log", "a", "dt_bias")}
    beta = reference.write_strength(inputs["b"], allow_neg_eigval=True).to(dtype)
    output, state = run(route, {**inputs, "A_log": None, "dt_bias": None, "a": reference.log_decay(**raw), "b": beta})
    inputs["b"] = torch.logit(beta.double() / 2)
    assert_recurrent({**inputs, "allow_neg_eigval": True}, output, state)
    with pytest.raises(
        OptionError, match="allow_neg_eigval=True is given; it must be left out: without A_log b is beta"
    ):
        run(route, {**inputs, "A_log": None, "dt_bias": None, "b": beta}, allow_neg_eigval=True)


# --- several tokens ---------------------------------------------------------------------------------------------------

STEPS = [(2, BF16, BF16), (3, FP16, FP32), (3, BF16, FP16), (8, FP16, BF16), (9, BF16, BF16), (17, BF16, BF16)]
STEPS += [(16, FP32, FP32), (16, BF16, FP16)]
if DEVICE == "cuda":
    STEPS += [(n, dtype, state) for n in range(2, 18) for dtype in FLOATS for state in FLOATS]
several = pytest.mark.parametrize(("tokens", "dtype", "state_dtype"), STEPS)


def inputs_of(tokens: int, dtype: torch.dtype, state_dtype: torch.dtype) -> Inputs:
    return small(tokens=tokens, dtype=dtype, state_dtype=state_dtype)


@several
def test_outputs_alone_touch_no_state(tokens: int, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    inputs = inputs_of(tokens, dtype, state_dtype)
    output, pool = pooled(inputs, [4, 1], disable_state_update=True)
    assert_recurrent(inputs, output)
    assert pool.untouched_except([])


@several
def test_final_states(tokens: int, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    inputs = inputs_of(tokens, dtype, state_dtype)
    assert_recurrent(inputs, *run("pool", inputs))


@several
@pytest.mark.parametrize("update", [True, False])
def test_states_after_each_token(tokens: int, dtype: torch.dtype, state_dtype: torch.dtype, update: bool) -> None:
    inputs = inputs_of(tokens, dtype, state_dtype)
    wide = nans(5, tokens + 3, 3, 34, 72, dtype=state_dtype).to(DEVICE)
    buffer = wide[1:4, 1 : tokens + 2, 1:, 2:, :64]
    output, pool = pooled(inputs, [4, 1], disable_state_update=not update, intermediate_states_buffer=buffer)
    assert_recurrent(inputs, output, pool.view[[4, 1]] if update else None, buffer[:2, :tokens])
    assert pool.untouched_except([4, 1] if update else [])
    buffer[:2, :tokens] = torch.nan
    assert bool(wide.isnan().all())


@several
@pytest.mark.parametrize("finals", [None, [5, -1]])
def test_a_slot_for_each_token(
    tokens: int, dtype: torch.dtype, state_dtype: torch.dtype, finals: list[int] | None
) -> None:
    """Row 0 skips its second token, row 1 names the slot that it reads for its first."""
    inputs = inputs_of(tokens, dtype, state_dtype)
    targets = torch.arange(2 * tokens).view(2, tokens) + 6
    targets[0, 1], targets[1, 0] = -1, 1
    options: Inputs = {"ssm_state_indices": spread(targets.tolist(), torch.int32)}
    options["output_state_indices"] = None if finals is None else spread(finals)
    output, pool = pooled(inputs, [4, 1], size=2 * tokens + 6, **options)
    plain, exact = evaluations(oracle.recurrent, inputs)
    written = targets >= 0
    kept = pool.view[targets[written].tolist()]
    judged = (torch.stack(x.kept, 1)[written] for x in (plain, exact))
    assert_within_budget("states after tokens", kept, *judged)
    if finals is not None:
        assert_within_budget("final state", pool.view[5], plain.state[0], exact.state[0])
    assert_recurrent(inputs, output)
    assert pool.untouched_except([*targets[written].tolist(), *([] if finals is None else [5])])


@pytest.mark.parametrize(
    ("tokens", "state_dtype", "options", "kernel"),
    [
        (1, BF16, {}, "tokens"),
        (2, FP32, {}, "verify"),
        (16, BF16, {"intermediate_states_buffer": nans(1, 16, 2, 32, 64).to(DEVICE)}, "verify"),
        (2, FP32, {"intermediate_states_buffer": nans(1, 2, 2, 32, 64).to(DEVICE)}, "tokens"),
        (17, BF16, {}, "tokens"),
    ],
)
def test_which_kernel_serves(
    tokens: int, state_dtype: torch.dtype, options: Inputs, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(plans, "_PLANS", {})
    monkeypatch.setattr(host.Launches, "add", lambda _, kernel, *args, **options: used.append(kernel))
    pooled(small(1, tokens, state_dtype=state_dtype), [1], **options)
    assert used == [getattr(host, kernel)]


@pytest.mark.parametrize("name", PER_TOKEN)
def test_no_output_looks_at_later_tokens(name: str) -> None:
    """Engines leave draft tokens that do not exist as they are."""
    inputs = small(tokens=4)
    given = {**inputs, name: inputs[name].clone()}
    given[name][:, 2:] = torch.nan
    output, _ = pooled(given, [4, 1], disable_state_update=True)
    first = {**inputs, **{n: inputs[n][:, :2] for n in PER_TOKEN}}
    assert_recurrent(first, output[:, :2])


# --- memory of the caller ---------------------------------------------------------------------------------------------


@three_routes
@pytest.mark.parametrize("ahead", [0, 3])
def test_slices_of_fused_buffers(route: str, tokens: int, ahead: int) -> None:
    """``ahead`` numbers in front of everything: no pointer begins at a multiple of 16 bytes."""
    inputs = small(tokens=tokens) | {"dt_bias": torch.full((2,), -4.0, dtype=BF16)}
    given = to_device(inputs, DEVICE)
    for names in (("q", "k", "v"), ("a", "b")):
        parts = [given[name].flatten(2) for name in names]
        fused = torch.cat((nans(2, tokens, ahead, dtype=BF16).to(DEVICE), *parts), 2)
        cut = fused[..., ahead:].split([x.shape[2] for x in parts], 2)
        given |= {name: x.unflatten(2, inputs[name].shape[2:]) for name, x in zip(names, cut, strict=True)}
    given["A_log"] = torch.cat((nans(ahead).to(DEVICE), given["A_log"]))[ahead:]
    mine = nans(2, tokens + 1, 3, 32 + ahead, dtype=FP32).to(DEVICE)
    view = mine[:, 1:, 1:, ahead:]
    output, state = run(route, given, output=view)
    assert output.data_ptr() == view.data_ptr()
    assert_recurrent(inputs, view, state)
    assert all(torch.equal(given[name].cpu(), inputs[name]) for name in PER_TOKEN)
    view.fill_(torch.nan)
    assert bool(mine.isnan().all())


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("null_slot", "targets"), [(None, None), (0, None), (0, [7, 2, 8]), (3, [3, 2, -1])])
@pytest.mark.parametrize("ours", [True, False])
def test_padding_rows(tokens: int, null_slot: int | None, targets: list[int] | None, ours: bool) -> None:
    """Row 1 is padding: nothing of it may be looked at or written. With targets a row may write nowhere."""
    inputs, slots = small(3, tokens, state_dtype=BF16, head_k=32), [4, -1 if null_slot is None else null_slot, 6]
    given = {**inputs, **{name: inputs[name].clone() for name in PER_TOKEN}, "state": inputs["state"].clone()}
    for name in (*PER_TOKEN, "state"):
        given[name][1] = torch.nan
    mine = None if ours else nans(3, tokens, 2, 32, dtype=BF16).to(DEVICE)
    buffer = nans(3, tokens, 2, 32, 32).to(DEVICE)
    index = torch.int32 if ours else torch.int64
    output, pool = pooled(
        given, slots, "pool", output=mine, null_slot=null_slot, intermediate_states_buffer=buffer,
        initial_state_indices=spread(slots, index), output_state_indices=spread(targets, index) if targets else None,
    )  # fmt: skip
    assert bool((output[1] == 0).all() if ours else output[1].isnan().all())
    assert bool(buffer[1].isnan().all())
    live = rows(inputs, [0, 2])
    assert_recurrent(live, output[[0, 2]], None, buffer[[0, 2]])
    ends = {row: (targets or slots)[row] for row in (0, 2)}
    ends = {row: slot for row, slot in ends.items() if slot >= 0 and slot != null_slot}
    if ends:
        assert_recurrent(rows(inputs, list(ends)), output[list(ends)], pool.view[list(ends.values())])
    assert pool.untouched_except(list(ends.values()))


def far(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype = BF16) -> Tensor:
    """Untouched memory with as much in front of it as an offset of 32 bits could wrongly step back."""
    size = 2**31 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    storage = torch.UntypedStorage(size * dtype.itemsize, device=DEVICE)
    return torch.empty(0, dtype=dtype, device=DEVICE).set_(storage, 2**31, shape, strides)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("wide", ["K-major states", "V-major states", "snapshots"])
def test_states_whose_lines_lie_far_apart(tokens: int, wide: str) -> None:
    inputs, line = small(1, tokens, hv=1, head_k=32, state_dtype=BF16), 2**26 + 2**23
    given = {**to_device(inputs, DEVICE), "state": inputs["state"].to(DEVICE).clone(), "backend": "triton"}
    if wide == "K-major states":
        inputs = {**inputs, **{name: inputs[name][:, :1] for name in PER_TOKEN}}
        given |= to_device({name: inputs[name] for name in PER_TOKEN}, DEVICE)
        given["state"] = far((1, 1, 32, 32), (32, 32, line, 1)).copy_(given["state"].mT)
        output, after = gd.gated_delta_rule_decode(**given)
        assert_recurrent(inputs, output, after.mT)
        return
    kept = nans(1, tokens, 1, 32, 32).to(DEVICE)
    if wide == "snapshots":
        kept = far((1, tokens, 1, 32, 32), (32, 32, 32, line, 1))
    else:
        given["state"] = far((1, 1, 32, 32), (32, 32, line, 1)).copy_(given["state"])
    output, after = gd.gated_delta_rule_decode_pretranspose(**given, intermediate_states_buffer=kept)
    assert_recurrent(inputs, output, after, kept)


@pytest.mark.parametrize("tokens", [3, 17])
def test_snapshots_whose_tokens_lie_far_apart(tokens: int) -> None:
    inputs = small(1, tokens, hv=1, head_k=32, state_dtype=BF16)
    kept = far((1, tokens, 1, 32, 32), (1024, 2**31 // (tokens - 1) // 64 * 64 + 64, 1024, 32, 1))
    output, _ = pooled(inputs, [1], intermediate_states_buffer=kept)
    assert_recurrent(inputs, output, None, kept)


# --- bits -------------------------------------------------------------------------------------------------------------


@three_routes
@pytest.mark.parametrize("state_dtype", FLOATS)
def test_bits_of_a_row_are_its_own(route: str, tokens: int, state_dtype: torch.dtype) -> None:
    """Alone, and beside a row of NaN."""
    inputs = small(3, tokens, state_dtype=state_dtype)
    inputs["v"][1] = torch.nan
    output, state = run(route, inputs)
    for i in (0, 2):
        alone = run(route, rows(inputs, [i]))
        assert same_bits(output[i : i + 1], alone[0])
        assert same_bits(state[i : i + 1], alone[1])
