"""StatePool: slots that are lent and given back, and how the states lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import OptionError, PoolError
from gated_delta.state import StatePool

CONFIG = GatedDeltaNetConfig(hidden_size=16, num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=64)
CHANNELS = 2 * 2 * 32 + 4 * 64


def pool(**options: Any) -> StatePool:
    return StatePool(CONFIG, **{"layers": 3, "slots": 5, **options})


@pytest.mark.parametrize("layout", ["SD", "DS"])
@pytest.mark.parametrize(("num_spec", "columns"), [(0, 3), (4, 7)])
@pytest.mark.parametrize(
    ("conv_dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_states_of_a_layer(
    layout: str, num_spec: int, columns: int, conv_dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    made = pool(num_spec=num_spec, conv_dtype=conv_dtype, state_dtype=state_dtype, conv_layout=layout)
    state = made.layer(1)
    assert (state.conv.dtype, state.recurrent.dtype) == (conv_dtype, state_dtype)
    assert state.conv.shape == (5, CHANNELS, columns)
    inner = (1, CHANNELS) if layout == "SD" else (columns, 1)
    assert state.conv.stride() == (CHANNELS * columns, *inner)
    assert state.recurrent.shape == (5, 4, 64, 32)
    assert state.recurrent.is_contiguous()
    assert state.null_slot is None
    per_layer = CHANNELS * columns * conv_dtype.itemsize + 4 * 64 * 32 * state_dtype.itemsize
    assert made.bytes_per_slot == 3 * per_layer


def test_layers_have_memory_of_their_own_and_keep_it() -> None:
    made = pool()
    for i in range(3):
        made.layer(i).conv.fill_(i + 1)
        made.layer(i).recurrent.fill_(-i - 1)
    for i in range(3):
        assert (made.layer(i).conv == i + 1).all()
        assert (made.layer(i).recurrent == -i - 1).all()


def test_the_window_follows_the_width_of_the_convolution() -> None:
    config = GatedDeltaNetConfig(hidden_size=16, num_k_heads=1, num_v_heads=1, conv_width=2)
    assert StatePool(config, layers=1, slots=1, num_spec=3).layer(0).conv.shape == (1, 3 * 128, 4)


def test_slots_are_lent_once() -> None:
    made = pool()
    assert made.free_slots == made.slots == 5
    first, second = made.allocate(2), made.allocate(3)
    assert sorted(first + second) == list(range(5))
    assert made.free_slots == 0
    made.free(first)
    assert made.free_slots == 2
    assert sorted(made.allocate(2)) == sorted(first)
    assert made.allocate(0) == []


def test_a_reserved_null_slot_is_never_lent() -> None:
    made = pool(reserve_null=True)
    assert made.layer(2).null_slot == made.null_slot == 0
    assert made.free_slots == 4
    assert sorted(made.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(PoolError):
        made.free([0])


ERRORS: dict[str, Callable[[StatePool, list[int]], object]] = {
    "more than are free": lambda made, held: made.allocate(3),
    "fewer than none": lambda made, held: made.allocate(-1),
    "not held": lambda made, held: made.free([*held, 4]),
    "no slot": lambda made, held: made.free([*held, 17]),
    "twice in one call": lambda made, held: made.free([held[0], held[1], held[0]]),
}


@pytest.mark.parametrize("error", ERRORS)
def test_nothing_is_lost_on_an_error(error: str) -> None:
    made = pool()
    held = made.allocate(3)
    assert 4 not in held
    with pytest.raises(PoolError, match=r"StatePool\.\w+: \w+ is .*; it must be "):
        ERRORS[error](made, held)
    assert made.free_slots == 2
    made.free(held)
    assert sorted(made.allocate(5)) == list(range(5))


def test_slots_are_given_back_once() -> None:
    made = pool()
    held = made.allocate(2)
    made.free(held)
    with pytest.raises(PoolError):
        made.free(held[:1])
    assert made.free_slots == 5


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=50, database=None)
def test_no_slot_is_lent_twice_or_lost(data: st.DataObject) -> None:
    made = pool(slots=7)
    held: list[list[int]] = []
    for _ in range(20):
        if held and data.draw(st.booleans()):
            made.free(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif made.free_slots:
            held.append(made.allocate(data.draw(st.integers(1, made.free_slots))))
        lent = [slot for slots in held for slot in slots]
        assert len(set(lent)) == len(lent) == 7 - made.free_slots
        assert set(lent) <= set(range(7))


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 0},
        {"slots": 0},
        {"slots": 1, "reserve_null": True},
        {"num_spec": -1},
        {"conv_dtype": torch.float64},
        {"state_dtype": torch.int8},
        {"conv_layout": "sd"},
    ],
    ids=str,
)
def test_what_no_pool_can_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"StatePool: {next(iter(options))} is "):
        pool(**options)
