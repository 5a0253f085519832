"""The causal convolution through the arguments of flash-linear-attention and of vLLM, against its definition.

Their signatures are recorded here, and compared with their source files where these are.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gated_delta.errors import ArgumentError
from gated_delta.interop import fla, vllm_conv
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from helpers import normal, same_bits, starts

WIDTH, DIM = 4, 8
OPS = "vllm/model_executor/layers/mamba/ops/causal_conv1d.py"
PREFILL = (
    "x weight bias conv_states query_start_loc cache_indices=None has_initial_state=None activation=silu "
    "pad_slot_id=-1 null_block_id=0"
)
UPDATE = (
    "x conv_state weight bias=None activation=None conv_state_indices=None num_accepted_tokens=None "
    "query_start_loc=None max_query_len=-1 null_block_id=0"
)
SIGNATURES = {
    "FLA 0.6.0": {
        "causal_conv1d": (
            "x weight=None bias=None residual=None initial_state=None output_final_state=False activation=None "
            "backend=triton cu_seqlens=None cu_seqlens_cpu=None chunk_indices=None cp_context=None"
        ),
        "causal_conv1d_update": "x cache residual=None weight=None bias=None activation=None",
    },
    "vLLM 0.33": {
        "causal_conv1d_fn": f"{PREFILL} metadata=None validate_data=False",
        "causal_conv1d_update": f"{UPDATE} validate_data=False out=None",
    },
    "vLLM 0.32": {
        "causal_conv1d_fn": (
            f"{PREFILL} block_idx_first_scheduled_token=None block_idx_last_scheduled_token=None "
            "initial_state_idx=None num_computed_tokens=None block_size_to_align=0 metadata=None validate_data=False"
        ),
        "causal_conv1d_update": (
            f"{UPDATE} block_idx_last_scheduled_token=None initial_state_idx=None validate_data=False out=None"
        ),
    },
}
"""Parameters in their order, with their defaults."""
KEYWORDS = {"causal_conv1d": "seq_idx=None"}
"""What flash-linear-attention takes out of its ``**kwargs``."""


def written(function: Callable[..., Any], kind: Any) -> str:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is kind]
    return " ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)


def in_source(root: Path, file: str, name: str) -> str:
    """The same of a function in a file that need not be imported."""
    (found,) = (x for x in ast.parse((root / file).read_text()).body if getattr(x, "name", "") == name)
    assert isinstance(found, ast.FunctionDef)
    names = [arg.arg for arg in found.args.args]
    defaults = [ast.unparse(x).strip("'") for x in found.args.defaults]
    first = len(names) - len(defaults)
    parts = names[:first] + [f"{n}={d}" for n, d in zip(names[first:], defaults, strict=True)]
    return " ".join(parts).replace("=PAD_SLOT_ID", "=-1").replace("=NULL_BLOCK_ID", "=0")


@pytest.mark.parametrize("version", SIGNATURES)
def test_signatures_are_theirs(version: str) -> None:
    """0.33's parameter by parameter; of 0.32 the same names with the same defaults, those of its own by name alone."""
    module: Any = fla if version.startswith("FLA") else vllm_conv
    for name, theirs in SIGNATURES[version].items():
        function = getattr(module, name)
        ours = written(function, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        own = written(function, inspect.Parameter.KEYWORD_ONLY)
        if version == "vLLM 0.32":
            assert set(f"{ours} {own}".split()) == set(theirs.split())
        else:
            assert ours == theirs
            assert version == "vLLM 0.33" or own == KEYWORDS.get(name, "")


@pytest.mark.parametrize(("package", "file"), [("fla", "fla/modules/causal_conv1d/ops.py"), ("vllm", OPS)])
def test_the_record_is_what_their_source_says(package: str, file: str) -> None:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    root = Path(found.submodule_search_locations[0]).parent
    versions = ("FLA 0.6.0",) if package == "fla" else ("vLLM 0.33", "vLLM 0.32")
    theirs = {name: in_source(root, file, name) for name in SIGNATURES[versions[0]]}
    assert theirs in [SIGNATURES[version] for version in versions]
    if package == "vllm":
        constants = (root / "vllm/v1/attention/backends/utils.py").read_text()
        assert "\nPAD_SLOT_ID = -1\n" in constants
        assert "\nNULL_BLOCK_ID = 0\n" in constants


def assert_convolved(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, lengths: list[int], act: Any = None,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    """``y [L, D]`` of packed x behind histories ``[N, D, W-1]``; a residual is added to what has been rounded."""
    given = (x, weight, bias, history.mT, starts(lengths), act)
    plain, exact = (oracle.conv(*given, dtype=dtype) for dtype in (torch.float32, torch.float64))
    if residual is not None:
        plain, exact = plain.to(y.dtype) + residual, exact + residual
    assert_within_budget("y", y, plain, exact)


def shifted(history: Tensor, x: Tensor, lengths: list[int]) -> Tensor:
    """States ``[N, D, C]`` after packed x ``[L, D]``."""
    rows = zip(history, x.split(lengths), strict=True)
    return torch.stack([torch.cat((old, new.mT), -1)[:, -old.shape[1] :] for old, new in rows])


# --- flash-linear-attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [7, 7, 7], [5, 0, 2, 9, 3]])
@pytest.mark.parametrize("known", [False, True])
def test_fla(dtype: torch.dtype, activation: str | None, lengths: list[int], known: bool) -> None:
    rows, equal, total = len(lengths), len({*lengths}) == 1, sum(lengths)
    x = normal(total, DIM + 3, dtype=dtype)[:, 3:]  # rows of something wider
    residual = normal(total, DIM, seed=4, dtype=dtype)
    weight, bias = normal(DIM, WIDTH, seed=1), normal(DIM, seed=2)
    states = normal(rows, DIM, WIDTH, seed=3, dtype=dtype) if known else None
    before = torch.zeros(rows, DIM, WIDTH, dtype=dtype) if states is None else states.clone()
    shape = (rows, lengths[0]) if equal else (1, total)
    ends = None if equal else starts(lengths).long()
    y, final = fla.causal_conv1d(x.unflatten(0, shape), weight, bias, None, states, True, activation, cu_seqlens=ends)
    assert y.shape == (*shape, DIM)
    assert_convolved(y.flatten(0, 1), x, weight, bias, before[..., 1:], lengths, activation)
    assert final is not None
    assert same_bits(final, shifted(before, x, lengths))
    assert states is None or same_bits(states, before)
    heads = x.unflatten(0, shape).unflatten(-1, (2, DIM // 2))
    y, final = fla.causal_conv1d(
        heads, weight, residual=residual.view(heads.shape), activation=activation, cu_seqlens=ends
    )
    assert final is None
    nothing = torch.zeros_like(before)[..., 1:]
    assert_convolved(y.flatten(0, 1).flatten(1), x, weight, None, nothing, lengths, activation, residual)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_fla_update(shape: tuple[int, ...], activation: str | None) -> None:
    x, weight, bias = normal(3, DIM), normal(DIM, WIDTH, seed=1), normal(DIM, seed=2)
    cache, residual = normal(3, DIM, WIDTH, seed=3), normal(3, DIM, seed=4)
    before = cache.clone()
    y, same = fla.causal_conv1d_update(x.view(*shape, DIM), cache, residual.view(*shape, DIM), weight, bias, activation)
    assert same is cache
    assert y.shape == (*shape, DIM)
    assert_convolved(y.reshape(3, DIM), x, weight, bias, before[..., 1:], [1] * 3, activation, residual)
    assert same_bits(cache, shifted(before, x, [1] * 3))


def test_what_is_not_served_of_fla_is_named() -> None:
    x, weight, some = normal(2, 5, DIM), normal(DIM, WIDTH), torch.zeros(2, 5, dtype=torch.int32)
    for name in ("cp_context", "seq_idx"):
        with pytest.raises(ArgumentError, match=f"{name} is given; it must be left out"):
            fla.causal_conv1d(x, weight, **{name: some})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="weight is None; it must be a tensor"):
        fla.causal_conv1d(x)
    with pytest.raises(ArgumentError, match=r"initial_state is of shape \[2, 8, 3\]; it must be \[B, D, W\] with B=2"):
        fla.causal_conv1d(x, weight, initial_state=normal(2, DIM, WIDTH - 1))
    with pytest.raises(ArgumentError, match=r"cache is of shape \[2, 8, 3\]; it must be \[N, D, W\]"):
        fla.causal_conv1d_update(x[:, 0], normal(2, DIM, WIDTH - 1), weight=weight)


# --- vLLM -------------------------------------------------------------------------------------------------------------

LENGTHS, SLOTS = [5, 3, 0, 1, 9, 2], [3, 0, 5, -1, 1, 2]
ROWS = [0, 2, 4, 5]
"""Those that are not padding: slot 0 is vLLM's own for that."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", True, False])
@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH + 1])
def test_vllm(dtype: torch.dtype, channels_last: bool, activation: Any, columns: int) -> None:
    x = normal(sum(LENGTHS), DIM, dtype=dtype).mT
    x = x if channels_last else x.contiguous()
    weight, bias, pool = normal(DIM, WIDTH, seed=1), normal(DIM, seed=2), normal(6, DIM, columns, seed=3, dtype=dtype)
    known, before, kept = torch.tensor([True, False, True, True, False, True]), pool.clone(), x.clone()
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    y = vllm_conv.causal_conv1d_fn(x, weight, bias, pool, starts(LENGTHS), slots, known, activation)
    history = before[slots, :, : WIDTH - 1].where(known[:, None, None], 0)
    parts = y.mT.split(LENGTHS)
    mine, own = x.mT.split(LENGTHS), [LENGTHS[row] for row in ROWS]
    given = torch.cat([mine[row] for row in ROWS])
    act = "silu" if activation else None
    assert_convolved(torch.cat([parts[row] for row in ROWS]), given, weight, bias, history[ROWS], own, act)
    expected = before.clone()
    expected[slots[ROWS], :, : WIDTH - 1] = shifted(history[ROWS], given, own)
    assert same_bits(pool, expected)
    assert same_bits(x, kept)
    assert not torch.cat((parts[1], parts[3])).any()


def test_vllm_without_slots_or_flags_begins_from_nothing() -> None:
    x, weight, pool = normal(7, DIM).mT, normal(DIM, WIDTH, seed=1), torch.full((2, DIM, WIDTH - 1), torch.nan)
    y = vllm_conv.causal_conv1d_fn(x, weight, None, pool, starts([4, 3]))
    nothing = torch.zeros(2, DIM, WIDTH - 1)
    assert_convolved(y.mT, x.mT, weight, None, nothing, [4, 3], "silu")
    assert same_bits(pool, shifted(nothing, x.mT, [4, 3]))


@pytest.mark.parametrize("form", ["token", "tokens", "ragged"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", True])
def test_vllm_update(form: str, given: bool, activation: Any) -> None:
    lengths = {"token": [1, 1, 1], "tokens": [4, 4, 4], "ragged": [2, 1, 4]}[form]
    rows, weight, bias = normal(sum(lengths), DIM), normal(DIM, WIDTH, seed=1), normal(DIM, seed=2)
    pool, slots = normal(4, DIM, WIDTH - 1, seed=3), torch.tensor([3, 0, 1], dtype=torch.int32)
    x = rows.view(3, 4, DIM).mT.contiguous() if form == "tokens" else rows.clone()
    before, out = pool.clone(), torch.full_like(x, torch.nan) if given else None
    y = vllm_conv.causal_conv1d_update(
        x, pool, weight, bias, activation, slots, query_start_loc=starts(lengths) if form == "ragged" else None,
        max_query_len=4, out=out,
    )  # fmt: skip
    assert y is (x if out is None else out)
    packed = (y.mT.flatten(0, 1) if form == "tokens" else y).split(lengths)
    new, own, act = rows.split(lengths), [lengths[0], lengths[2]], "silu" if activation else None
    mine = torch.cat((new[0], new[2]))
    assert_convolved(torch.cat((packed[0], packed[2])), mine, weight, bias, before[[3, 1]], own, act)
    assert not packed[1].any()  # slot 0 is padding
    expected = before.clone()
    expected[[3, 1]] = shifted(before[[3, 1]], mine, own)
    assert same_bits(pool, expected)


def test_vllm_update_behind_drafts() -> None:
    """A window over the last step: the history begins where the accepted tokens end."""
    x, weight, lengths = normal(5, DIM), normal(DIM, WIDTH, seed=1), [3, 2]
    pool, accepted, kept = normal(3, DIM, WIDTH + 1, seed=3), torch.tensor([1, 3], dtype=torch.int32), x.clone()
    before = pool.clone()
    y = vllm_conv.causal_conv1d_update(
        x, pool, weight, None, "silu", torch.tensor([2, 1]), accepted, starts(lengths), 3, out=torch.empty_like(x)
    )
    history = torch.stack([before[slot, :, n - 1 : n + WIDTH - 2] for slot, n in ((2, 1), (1, 3))])
    assert_convolved(y, kept, weight, None, history, lengths, "silu")
    assert same_bits(pool[2], torch.cat((history[0, :, 1:], kept[:3].mT), -1))
    assert same_bits(pool[1, :, :WIDTH], torch.cat((history[1, :, 1:], kept[3:].mT), -1))


def test_what_is_not_served_of_vllm_is_named() -> None:
    x, weight, pool = normal(5, DIM).mT, normal(DIM, WIDTH), normal(2, DIM, WIDTH - 1)
    some: Any = torch.zeros(1)
    refused: dict[str, Any] = {
        "block_idx_first_scheduled_token": some, "block_idx_last_scheduled_token": some, "initial_state_idx": some,
        "num_computed_tokens": some, "block_size_to_align": 16,
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(ArgumentError, match=f"{name} is given; it must be left out: a row has one slot"):
            vllm_conv.causal_conv1d_fn(x, weight, None, pool, starts([2, 3]), **{name: value})
    with pytest.raises(ArgumentError, match="pad_slot_id is 0; it must be -1: every negative slot is padding"):
        vllm_conv.causal_conv1d_fn(x, weight, None, pool, starts([2, 3]), pad_slot_id=0)
    for name in ("block_idx_last_scheduled_token", "initial_state_idx"):
        with pytest.raises(ArgumentError, match=f"{name} is given; it must be left out: a row has one slot"):
            vllm_conv.causal_conv1d_update(x.mT[:2], pool, weight, **{name: some})
    with pytest.raises(ArgumentError, match=r"out is of shape \[1, 8\]; it must be \[N, D\]"):
        vllm_conv.causal_conv1d_update(x.mT[:2], pool, weight, out=normal(1, DIM))
    with pytest.raises(ArgumentError, match="out is bfloat16; it must be float32"):
        vllm_conv.causal_conv1d_update(x.mT[:2], pool, weight, out=normal(2, DIM).bfloat16())
