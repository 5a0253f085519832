"""What several test files share: poisoned pools, packed sequences cut apart, and results judged by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

import gated_delta as gd
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs

Result = TypeVar("Result")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton kernels are tested; on a CPU they run in Triton's interpreter."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PER_TOKEN = ("q", "k", "v", "g", "beta")
PER_ROW = ("q", "k", "v", "a", "b", "state")
ROUTES = ("K-major", "V-major", "pool", "mtp")
"""The ways to run one token of every row: two layouts with a state a row, and two operators over a pool."""


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that shows where nothing was written."""
    return torch.full(shape, torch.nan, dtype=dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def starts(lengths: Iterable[int]) -> Tensor:
    """``cu_seqlens`` of packed sequences."""
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def strided(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """``values`` as every third element of a larger tensor, whose other elements name no slot of any pool."""
    return torch.tensor([[value, 1 << 20, 1 << 20] for value in values], dtype=dtype)[:, 0]


def copied(given: Inputs) -> Inputs:
    """On :data:`DEVICE`, in memory of their own that lies as theirs does: a plain move makes a cut view contiguous."""

    def copy(x: Tensor) -> Tensor:
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).clone()
        return memory.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: copy(x) if isinstance(x, Tensor) else x for name, x in given.items()}


class Pool:
    """Rows of ``states`` at ``slots`` of a pool full of NaN whose slots are cut out of larger pages.

    With ``paged=False`` the pool is dense. A negative slot is filled nowhere. ``view`` is the pool.
    """

    def __init__(self, states: Tensor, slots: Sequence[int], *, size: int, paged: bool = True) -> None:
        heads, rows, columns = states.shape[1:]
        self._margin = (1, 2, 8) if paged else (0, 0, 0)
        self.page = nans(size, heads + self._margin[0], rows + self._margin[1], columns + self._margin[2])
        self.page = self.page.to(states.dtype)
        self.view = self._cut(self.page)
        for state, slot in zip(states, slots, strict=True):
            if slot >= 0:
                self.view[slot] = state
        self._before = self.page.clone()

    def _cut(self, page: Tensor) -> Tensor:
        heads, rows, columns = self._margin
        return page[:, heads:, rows:, : page.shape[3] - columns]

    def untouched_except(self, slots: Sequence[int]) -> bool:
        """Nothing changed but these slots, whatever they hold now."""
        expected = self._before.clone()
        self._cut(expected)[slots] = self.view[slots]
        return same_bits(expected, self.page)


def span(inputs: Inputs, i: int) -> slice:
    """The packed tokens of sequence i."""
    first, last = inputs["cu_seqlens"][i : i + 2].tolist()
    return slice(first, last)


def sequences(inputs: Inputs, chosen: Sequence[int]) -> Inputs:
    """Packed inputs of the ``chosen`` sequences alone, in that order."""
    spans = [span(inputs, i) for i in chosen]
    cut = {name: torch.cat([inputs[name][own] for own in spans]) for name in PER_TOKEN}
    cut["cu_seqlens"] = starts(own.stop - own.start for own in spans)
    if "initial_state" in inputs:
        cut["initial_state"] = inputs["initial_state"][list(chosen)]
    return {**inputs, **cut}


def tokens(inputs: Inputs, first: int, last: int) -> Inputs:
    """Tokens ``first`` to ``last`` of inputs that hold one sequence."""
    return {**inputs, **{name: inputs[name][first:last] for name in PER_TOKEN}, "cu_seqlens": starts([last - first])}


def rows(inputs: Inputs, chosen: Sequence[int]) -> Inputs:
    """Inputs of the ``chosen`` rows of a recurrent operator, copied."""
    return {**inputs, **{name: inputs[name][list(chosen)] for name in PER_ROW}}


def prefill(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """``chunk_gated_delta_rule`` with its final state."""
    result = gd.chunk_gated_delta_rule(**{**inputs, **options}, output_final_state=True)
    assert isinstance(result, tuple)
    return result


def recurrent(route: str, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """A recurrent operator from copies of the states ``[B, HV, V, K]``: its output, and the states afterwards."""
    given = {**inputs, **options}
    states = given.pop("state").clone()
    if route == "K-major":
        output, after = gd.gated_delta_rule_decode(**given, state=states.transpose(-1, -2).contiguous())
        return output, after.transpose(-1, -2)
    if route == "V-major":
        return gd.gated_delta_rule_decode_pretranspose(**given, state=states)
    slots = [2 * i + 1 for i in reversed(range(len(states)))]
    pool = Pool(states, slots, size=2 * len(states) + 2)
    given |= {"initial_state": pool.view, "initial_state_indices": torch.tensor(slots)}
    if route == "pool":
        output, _ = gd.gated_delta_rule_decode_pretranspose(**given, state=None)
    else:
        output, _ = gd.gated_delta_rule_mtp(**given, disable_state_update=False)
    assert pool.untouched_except(slots)
    return output, pool.view[slots]


def evaluations(evaluate: Callable[..., Result], inputs: Inputs, **options: Any) -> tuple[Result, Result]:
    """The plain and the exact evaluation of one of the oracles."""
    plain, exact = (evaluate(**inputs, **options, dtype=dtype) for dtype in (torch.float32, torch.float64))
    return plain, exact


def assert_prefill(inputs: Inputs, output: Tensor, state: Tensor | None = None) -> None:
    """Judge what prefill gave for ``inputs`` (one initial state a sequence)."""
    plain, exact = evaluations(oracle.prefill, inputs)
    assert_within_budget("output", output, plain.output, exact.output)
    if state is not None:
        assert_within_budget("state", state, plain.state, exact.state)


def assert_recurrent(inputs: Inputs, output: Tensor, state: Tensor | None = None, kept: Tensor | None = None) -> None:
    """Judge what a recurrent operator gave for ``inputs``; ``kept [B, T, HV, V, K]`` are the states after each
    token.
    """
    plain, exact = evaluations(oracle.recurrent, inputs)
    assert_within_budget("output", output, plain.output, exact.output)
    if state is not None:
        assert_within_budget("state", state, plain.state, exact.state)
    if kept is not None:
        assert_within_budget("kept states", kept, torch.stack(plain.kept, 1), torch.stack(exact.kept, 1))
