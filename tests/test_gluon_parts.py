"""Prefill of Hopper, of sequences in parts, side by side or in turn: on a Hopper GPU, and on CPUs by the emulator."""

from __future__ import annotations

import pytest
import torch

from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import to_device
from helpers import DEVICE, nans, prefill, same_bits, sequences
from prefill_helpers import assert_right, run, spread, unit
from test_gluon_prefill import GATES, HOPPER, host, in_place_of_triton, pool_of, small

__all__ = ["in_place_of_triton"]
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not HOPPER, reason="needs a Hopper GPU, or none")


@pytest.mark.parametrize("slot", [3, -1])
@pytest.mark.parametrize("tokens_in_turn", [64, 128, 256, 512])
def test_turns_change_no_bit(tokens_in_turn: int, slot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of 200 tokens, or padding, before 150 that are padding: there may be turns behind its end."""
    inputs, found = small([200, 150], hv=2, gates="weak"), []
    for plan in (host.Plan(2, make=True), host.Plan(1, tokens_in_turn, in_turn=True)):
        monkeypatch.setattr(host, "plan", lambda *_, plan=plan: plan)
        pool, stored = pool_of(inputs["initial_state"][:1], [3], 5), pool_of(nans(3, 2, 128, 128), [0, 1, 2], 4)
        given = {**to_device(inputs, DEVICE), "initial_state": pool.view, "state_indices": spread([slot])}
        given |= {"cu_seqlens": inputs["cu_seqlens"][:2].to(DEVICE), "checkpoint_cu_starts": spread([0, 3])}
        given |= {"state_checkpoints": stored.view, "checkpoint_every_n_tokens": 64}
        output, _ = prefill(given, backend="triton")
        assert bool((output[200:] == 0).all())
        assert pool.untouched_except([3] if slot == 3 else [])
        found.append((output, pool.view, stored.view))
    assert all(same_bits(x, y) for x, y in zip(*found, strict=True))


@pytest.fixture(params=[(1, 64), (2, 64), (2, 128), (1, 64, False, True)])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a part, for the tests that want parts of short sequences."""
    monkeypatch.setattr(host, "plan", lambda *_: host.Plan(*request.param))
    return request.param[1]


@pytest.mark.parametrize("name", ["weak", "strong", "alpha 0 and 1", "similar keys", "similar keys, no decay"])
def test_parts(name: str, part: int) -> None:
    inputs = GATES[name](torch.bfloat16)
    assert_right(inputs, *run(inputs))


def test_parts_of_many_sequences(part: int) -> None:
    inputs = unit(small([0, 130, 64, 1, 0, 129, 0], hv=2, gates="weak"), 3.0)
    for some in ({}, {"initial_state": None}):
        assert_right(inputs | some, *run(inputs | some))


def test_parts_with_padding_and_checkpoints(part: int) -> None:
    """A pool in place; the second sequence is padding, the third has no state before, and tokens are left over."""
    inputs, slots, has = small([200, 130, 140, 33], gates="weak"), [5, -1, 1], [1, 1, 0]
    chosen = [0, 2]
    logical = sequences(inputs, chosen)
    logical["initial_state"] = logical["initial_state"] * torch.tensor([1.0, 0.0])[:, None, None, None]
    pool = pool_of(torch.where(logical["initial_state"] == 0, torch.nan, logical["initial_state"]), [5, 1], 9)
    stored = pool_of(nans(1, 1, 128, 128), [0], 8)
    given = {**to_device(inputs, DEVICE), "initial_state": pool.view, "cu_seqlens": inputs["cu_seqlens"][:4].to(DEVICE)}
    for name in ("q", "k", "v", "g", "beta"):
        given[name] = given[name].clone()
        given[name][200:330] = given[name][470:] = torch.nan
    given |= {"state_indices": spread(slots), "has_initial_state": spread(has, torch.bool)}
    given |= {"state_checkpoints": stored.view, "checkpoint_every_n_tokens": 64}
    output, _ = prefill({**given, "checkpoint_cu_starts": spread([1, 4, 4, 6])}, backend="triton")
    assert_right(logical, torch.cat((output[:200], output[330:470])), pool.view[[5, 1]])
    assert bool((output[200:330] == 0).all() and (output[470:] == 0).all())
    assert pool.untouched_except([5, 1])
    assert stored.untouched_except([1, 2, 3, 4, 5])
    logical["checkpoint_every_n_tokens"] = 64
    plain = oracle.prefill(**logical, dtype=torch.float32, operands=torch.bfloat16).kept
    exact = oracle.prefill(**logical).kept
    assert_within_budget("checkpoints", stored.view[1:6].cpu(), torch.stack(plain), torch.stack(exact))
