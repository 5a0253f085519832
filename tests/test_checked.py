"""Checked mode: what only the values on the device can tell, and that nothing looks at them outside of it."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gated_delta as gd
from gated_delta import library
from gated_delta.errors import DataError
from gated_delta.testing.inputs import Inputs
from test_validation import CALLS, CONV, MTP, POOLED, PREFILL, UPDATE, assert_fault

KERNELS = ("prefill", "recurrent", "causal_conv1d", "causal_conv1d_update", "rms_norm_gated")
"""Every way from an operator to a backend."""
T = torch.tensor
TWICE = "more than once; it must be different for every row that writes"


def at(*index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same tensor with one value changed."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def call(name: str, **changes: Any) -> object:
    operator, make = CALLS[name]
    given = make()
    given.update({key: new(given[key]) if callable(new) else new for key, new in changes.items()})
    return getattr(gd, operator)(**given)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that calls reach, in order; none of them runs, so values that are out of range do no harm."""
    names: list[str] = []
    for kernel in KERNELS:
        monkeypatch.setattr(library, kernel, lambda *args, kernel=kernel: names.append(kernel))
    return names


def longer(starts: list[int], rows: int) -> Inputs:
    """Sequences of 130 and 70 tokens, so two checkpoints and one."""
    full = CALLS[PREFILL][1]()
    long = {
        name: full[name].repeat(25, *[1] * (full[name].dim() - 1)) for name in ("q", "k", "v", "g", "beta", "output")
    }
    kept = torch.zeros(rows, *full["state_checkpoints"].shape[1:])
    seams = {"cu_seqlens": T([0, 130, 200]), "checkpoint_cu_starts": T(starts), "max_seqlen": None}
    return {**long, **seams, "state_checkpoints": kept}


FAULTS: list[tuple[str, str, Inputs]] = [
    (PREFILL, "cu_seqlens[0] is 1; it must be 0", {"cu_seqlens": T([1, 5, 8])}),
    (PREFILL, "cu_seqlens[2] is 4; it must be at least cu_seqlens[1] = 5", {"cu_seqlens": T([0, 5, 4])}),
    (PREFILL, "cu_seqlens[2] is 9; it must be at most the 8 packed tokens",
     {"cu_seqlens": T([0, 5, 9], dtype=torch.int32)}),
    (PREFILL, "max_seqlen is 4; it must be at least 5, the length of sequence 0", {"max_seqlen": 4}),
    (PREFILL, "state_indices is 6 somewhere; it must be below 6, the slots of the pool", {"state_indices": T([1, 6])}),
    (PREFILL, "state_indices is 6 somewhere; it must be below 6, the slots of the pool",
     {"state_indices": T([1, 6]), "initial_state": None, "has_initial_state": None}),
    (PREFILL, f"state_indices is 3 {TWICE}", {"state_indices": T([3, 3])}),
    (PREFILL, f"state_indices is 3 {TWICE}",
     {"state_indices": T([3, 3]), "output_state": None, "output_final_state": True}),
    (PREFILL, 'g is between 0.5 and 1.5; it must be in [0, 1] with g_space="linear" (if these are logarithms, pass '
     'g_space="log")', {"g_space": "linear", "g": lambda x: at(3, 1, value=1.5)(torch.full_like(x, 0.5))}),
    (PREFILL, 'g is between -2 and 0.5; it must be in [0, 1] with g_space="linear" (if these are logarithms, pass '
     'g_space="log")', {"g_space": "linear", "g": lambda x: at(0, 0, value=-2.0)(torch.full_like(x, 0.5))}),
    (PREFILL, 'g is as high as 0.5; it must be at most 0 with g_space="log" (if this is alpha itself, pass '
     'g_space="linear")', {"g": at(7, 3, value=0.5)}),
    (MTP, "a is as high as 0.5; it must be at most 0 without A_log (log alpha)",
     {"A_log": None, "dt_bias": None, "a": lambda x: at(0, 0, 0, value=0.5)(-x.abs())}),
    (PREFILL, 'g is as high as nan; it must be at most 0 with g_space="log" (if this is alpha itself, pass '
     'g_space="linear")', {"g": at(2, 2, value=torch.nan)}),
    (PREFILL, "beta is not finite somewhere; it must be finite", {"beta": at(1, 1, value=torch.inf)}),
    (PREFILL, "beta is not finite somewhere; it must be finite", {"beta": at(1, 1, value=torch.nan)}),
    (PREFILL, "checkpoint_cu_starts[0:2] is 0 to 1; it must be room for 2 checkpoints of sequence 0 within 3 rows",
     longer([0, 1, 3], rows=3)),
    (PREFILL, "checkpoint_cu_starts[0:2] is -1 to 2; it must be room for 2 checkpoints of sequence 0 within 3 rows",
     longer([-1, 2, 3], rows=3)),
    (PREFILL, "checkpoint_cu_starts[1:3] is 2 to 3; it must be room for 1 checkpoints of sequence 1 within 2 rows",
     longer([0, 2, 3], rows=2)),
    *((name, "initial_state_indices is 7 somewhere; it must be below 7, the slots of the pool",
       {"initial_state_indices": T([0, 1, 7])}) for name in (POOLED, MTP)),
    (POOLED, f"initial_state_indices is 3 {TWICE}",
     {"initial_state_indices": T([3, 3, 2]), "output_state_indices": None}),
    (POOLED, f"output_state_indices is 4 {TWICE}", {"output_state_indices": T([4, 1, 4], dtype=torch.int32)}),
    (POOLED, "output_state_indices is 8 somewhere; it must be below 7, the slots of the pool",
     {"output_state_indices": T([8, -1, 2])}),
    (MTP, "ssm_state_indices is 9 somewhere; it must be below 7, the slots of the pool",
     {"ssm_state_indices": T([[1, 2], [3, 9], [-1, -1]])}),
    (MTP, f"ssm_state_indices is 5 {TWICE}", {"ssm_state_indices": T([[4, 5], [5, -1], [-1, -1]])}),
    (CONV, "cu_seqlens[0] is 2; it must be 0", {"cu_seqlens": T([2, 5, 8])}),
    (CONV, "cu_seqlens[2] is 3; it must be at least cu_seqlens[1] = 5", {"cu_seqlens": T([0, 5, 3])}),
    (CONV, "cu_seqlens[2] is 9; it must be at most the 8 packed tokens", {"cu_seqlens": T([0, 5, 9])}),
    ("ragged", "cu_seqlens[1] is -1; it must be at least cu_seqlens[0] = 0", {"cu_seqlens": T([0, -1, 5])}),
    ("ragged", "cu_seqlens[2] is 6; it must be at most the 5 packed tokens", {"cu_seqlens": T([0, 3, 6])}),
    ("ragged", "cu_seqlens is a row of 4 tokens; it must be such that no row has more than 3 tokens (a window of 5 "
     "columns)", {"cu_seqlens": T([0, 1, 5])}),
    *((name, "state_indices is 5 somewhere; it must be below 5, the slots of the pool", {"state_indices": T([-1, 5])})
      for name in (CONV, UPDATE, "ragged")),
    *((name, f"state_indices is 2 {TWICE}", {"state_indices": T([2, 2])}) for name in (CONV, UPDATE, "ragged")),
    *((UPDATE, f"num_accepted_tokens is between {low} and {high}; it must be in [1, 3] for a window of 5 columns and a "
       "width of 4", {"num_accepted_tokens": T([low, high])}) for low, high in ((0, 2), (2, 4))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [pytest.param(*row, id=f"{i}-{row[0]}-{row[1][:40]}") for i, row in enumerate(FAULTS)],
)
def test_fault(name: str, message: str, changes: Inputs, reached: list[str]) -> None:
    """Inside: the sentence, before any kernel. Outside: the same call goes straight to its kernel."""
    with gd.checked(), pytest.raises(DataError) as caught:
        call(name, **changes)
    assert_fault(caught.value, DataError, f"{CALLS[name][0]}: {message}")
    assert reached == []
    call(name, **changes)
    assert len(reached) == 1


@pytest.mark.parametrize("name", CALLS)
def test_good_calls_pass(name: str) -> None:
    with gd.checked():
        call(name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(PREFILL, {"state_indices": T([-1, -1])}, id="padding twice"),
        pytest.param(PREFILL, {"state_indices": T([0, 0])}, id="the null slot twice"),
        pytest.param(PREFILL, {"state_indices": T([3, 3]), "output_state": None}, id="one slot read twice"),
        pytest.param(PREFILL, {"cu_seqlens": T([0, 0, 0])}, id="empty sequences"),
        pytest.param(PREFILL, {"cu_seqlens": T([0, 2, 6])}, id="tokens behind the last sequence"),
        pytest.param(PREFILL, {"g": at(0, 0, value=-torch.inf)}, id="alpha 0 as a logarithm"),
        pytest.param(PREFILL, {"g": torch.ones(8, 4), "g_space": "linear"}, id="alpha 1"),
        pytest.param(PREFILL, {"g": torch.zeros(8, 4), "g_space": "linear"}, id="alpha 0"),
        pytest.param(PREFILL, {"beta": torch.full((8, 4), 2.0)}, id="beta 2"),
        pytest.param(PREFILL, longer([0, 2, 3], rows=3), id="room for every checkpoint"),
        pytest.param(PREFILL, longer([1, 4, 9], rows=9), id="more room than needed"),
        pytest.param(
            POOLED,
            {"initial_state_indices": T([3, 3, 3]), "disable_state_update": True, "output_state_indices": None},
            id="one slot read by every row",
        ),
        pytest.param(
            POOLED, {"initial_state_indices": T([3, 3, 3]), "output_state_indices": T([1, 2, -1])}, id="one slot forked"
        ),
        pytest.param(MTP, {"ssm_state_indices": T([[0, 0], [-1, -1], [5, 6]])}, id="steps that are not kept"),
        pytest.param(MTP, {"initial_state_indices": T([-1, -1, -1])}, id="nothing but padding"),
        pytest.param(UPDATE, {"num_accepted_tokens": T([1, 3])}, id="fewest and most accepted tokens"),
        pytest.param("ragged", {"cu_seqlens": T([0, 0, 3])}, id="a row without tokens"),
    ],
)
def test_what_looks_like_a_fault_and_is_none(name: str, changes: Inputs) -> None:
    with gd.checked():
        call(name, **changes)


def finds_faults() -> bool:
    try:
        call(PREFILL, max_seqlen=1)
    except DataError:
        return True
    return False


def test_nesting() -> None:
    assert not finds_faults()
    with gd.checked():
        assert finds_faults()
        with gd.checked(False):
            assert not finds_faults()
            with gd.checked(True):
                assert finds_faults()
            assert not finds_faults()
        assert finds_faults()
    assert not finds_faults()


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(KeyError), gd.checked():
        raise KeyError
    assert not finds_faults()


def in_thread(function: Callable[[], bool]) -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(timeout=60)
    return found[0]


def test_of_two_threads_one_is_checked() -> None:
    """A thread that turns it on leaves the others alone, while it is on and afterwards."""
    inside, done = threading.Event(), threading.Event()

    def other() -> bool:
        with gd.checked():
            inside.set()
            assert done.wait(timeout=60)
            return finds_faults()

    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(other()))
    thread.start()
    assert inside.wait(timeout=60)
    here = finds_faults()
    done.set()
    thread.join(timeout=60)
    assert (here, found, finds_faults()) == (False, [True], False)


def test_a_copied_context_takes_it_along() -> None:
    with gd.checked():
        context = contextvars.copy_context()
    assert not finds_faults()
    assert in_thread(lambda: context.run(finds_faults))


_PROGRAM = """
import torch, gated_delta as gd
from gated_delta.errors import DataError
x = torch.zeros(4, 1, 32)
def faulty():
    try:
        gd.chunk_gated_delta_rule(x, x, x, cu_seqlens=torch.tensor([0, 4]), max_seqlen=1)
    except DataError:
        return "found"
    return "passed"
with gd.checked(False):
    off = faulty()
print(faulty(), off)
"""


@pytest.mark.parametrize(
    ("value", "expected"), [("1", "found passed"), ("0", "passed passed"), (None, "passed passed")]
)
def test_environment(value: str | None, expected: str) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "GATED_DELTA_CHECK"}
    if value is not None:
        environment["GATED_DELTA_CHECK"] = value
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
