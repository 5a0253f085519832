"""Context parallelism: parts of a sequence on several ranks give the whole sequence's results, to the error budget.

Most tests run the ranks one after the other in this process: a rank needs the maps of those before it alone, so each
finds in the collective what they left there. Two and three processes then give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from gated_delta import causal_conv1d, context_parallel
from gated_delta.context_parallel import context_parallel_gated_delta_rule, partition
from gated_delta.errors import DtypeError, GradientError, OptionError, ShapeError
from gated_delta.parallel import Parallel
from gated_delta.testing.inputs import BLIND_SPOTS, Inputs, prefill_inputs, to_device, with_state
from helpers import DEVICE, PER_TOKEN, assert_prefill, normal, prefill, same_bits
from prefill_helpers import assert_right, constant, serve

Cut = Sequence[int]
"""First tokens of the ranks' parts, and one past the last token."""


def part(inputs: Inputs, first: int, last: int) -> Inputs:
    """What a rank with these tokens is given."""
    given = {name: x for name, x in inputs.items() if name != "cu_seqlens"}
    return {**given, **{name: inputs[name][first:last] for name in PER_TOKEN}}


class InTurns(Parallel):
    """A rank of several that run one after the other. ``group`` is where each leaves what it gives to the others."""

    def gathered(self, x: Tensor) -> Tensor:
        left: Any = self.group
        left.append(x.clone())
        return torch.stack([*left, *[torch.full_like(x, torch.nan)] * (self.size - len(left))])


@contextmanager
def turn(rank: int, size: int, left: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parallel, "of", staticmethod(lambda group=None: InTurns(rank, size, left)))
        yield


def in_turns(inputs: Inputs, cuts: Cut, **options: Any) -> tuple[Tensor, Tensor]:
    """All outputs, and the final state as the last rank, which has all maps, gives it."""
    left: list[Tensor] = []
    outputs, state = [], torch.empty(0)
    for rank, (first, last) in enumerate(pairwise(cuts)):
        with turn(rank, len(cuts) - 1, left):
            given = to_device(part(inputs, first, last), DEVICE)
            output, state = context_parallel_gated_delta_rule(**given, output_final_state=True, **options)
        outputs.append(output)
    return torch.cat(outputs), state


@pytest.fixture
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_parallel, "LEAST", 64)


def _with(name: str, value: float, **options: Any) -> Inputs:
    return constant(with_state(prefill_inputs([400], similar_keys=True, **options)), name, value)


CASES: dict[str, Callable[[], Inputs]] = {
    **{
        f"{gates}, {dtype}": lambda g=gates, t=dtype: with_state(prefill_inputs([500], gates=g, dtype=t))
        for gates in ("none", "weak", "model", "strong")
        for dtype in (torch.float32, torch.bfloat16)
    },
    "fp16": lambda: with_state(prefill_inputs([500], dtype=torch.float16)),
    "no state": lambda: prefill_inputs([500], dtype=torch.float32),
    "bf16 state": lambda: with_state(prefill_inputs([500], gates="weak"), dtype=torch.bfloat16),
    "fp16 state": lambda: with_state(prefill_inputs([500], gates="weak"), dtype=torch.float16),
    "linear gates": lambda: with_state(prefill_inputs([500], g_space="linear", dtype=torch.float32)),
    "K != V": lambda: with_state(prefill_inputs([500], head_k=96, head_v=32, dtype=torch.float32)),
    "grouped queries": lambda: with_state(prefill_inputs([500], hq=4, hv=2, dtype=torch.float32)),
    "similar keys, beta 2": lambda: _with("beta", 2.0, gates="weak"),
    "similar keys, beta 2, fp32": lambda: _with("beta", 2.0, gates="none", dtype=torch.float32),
    "normalised, scaled": lambda: {
        **with_state(prefill_inputs([500])), "scale": -2.5, "use_qk_l2norm_in_kernel": True
    },
    "alpha exactly 0": BLIND_SPOTS["alpha exactly 0"],
    "8192 tokens, no decay": lambda: prefill_inputs(
        [8192], hq=1, hk=1, hv=1, head_k=32, head_v=32, gates="none", dtype=torch.float32
    ),
}  # fmt: skip


def cuts_of(inputs: Inputs, ranks: int) -> Cut:
    """Uneven, and away from the ends of chunks."""
    tokens = len(inputs["q"])
    return [0, *(tokens * r // ranks + 5 - r for r in range(1, ranks)), tokens]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_give_the_whole(name: str, ranks: int) -> None:
    inputs = CASES[name]()
    output, state = in_turns(inputs, cuts_of(inputs, ranks))
    assert_right(inputs, output, state) if DEVICE == "cuda" else assert_prefill(inputs, output, state)


@pytest.mark.usefixtures("many_pieces")
@pytest.mark.parametrize("name", ["weak, torch.float32", "model, torch.bfloat16", "K != V", "grouped queries"])
def test_pieces_of_parts_give_the_whole(name: str) -> None:
    inputs = CASES[name]()
    output, state = in_turns(inputs, [0, 1, 320, 500])  # one of four, one of two, and the last of each is short
    assert_right(inputs, output, state) if DEVICE == "cuda" else assert_prefill(inputs, output, state)


@pytest.mark.usefixtures("many_pieces")
@pytest.mark.parametrize("cuts", [[0, 0, 100], [0, 100, 100], [0, 60, 60, 100], [0, 1, 2, 100], [0, 0, 0]])
def test_parts_may_be_empty(cuts: Cut) -> None:
    inputs = with_state(prefill_inputs([cuts[-1]], dtype=torch.float32))
    output, state = in_turns(inputs, cuts)
    assert_prefill(inputs, output.cpu(), state.cpu())


@pytest.mark.usefixtures("many_pieces")
def test_an_output_in_another_dtype() -> None:
    """Nothing on the way to an fp32 output of bf16 activations is rounded to bf16."""
    inputs = with_state(prefill_inputs([300], gates="weak"))
    given, left = part(inputs, 100, 300), []
    with turn(0, 2, left):
        context_parallel_gated_delta_rule(**part(inputs, 0, 100))
    wide = torch.full((200, 4, 70), torch.nan)
    with turn(1, 2, left):
        output = context_parallel_gated_delta_rule(**given, output=wide[..., :64])
    assert isinstance(output, Tensor) and wide[..., 64:].isnan().all()
    whole = torch.cat((prefill(inputs, output=torch.empty(300, 4, 64))[0][:100], output))
    assert_prefill(inputs, whole)


@pytest.mark.usefixtures("many_pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [False, True])
def test_on_hopper(dtype: torch.dtype, make: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that all heads share, and are nothing, are taken by the copy engine as they are."""
    host = import_module("gated_delta.kernels.gluon.prefill")
    serve(monkeypatch, host)
    if DEVICE == "cpu":
        launch = import_module("gated_delta.kernels.triton.launch")
        monkeypatch.setattr(launch, "bind", import_module("gluon_emulator").bind)
    monkeypatch.setattr(host, "plan", lambda *_: host.Plan(2, make=make))
    options: dict[str, Any] = {"hq": 1, "hk": 1, "hv": 2, "head_k": 128, "head_v": 128}
    inputs = with_state(prefill_inputs([230], dtype=dtype, gates="weak", **options))
    assert host.tileable(torch.zeros(230, 1, 128, dtype=dtype).expand(-1, 2, -1))
    assert_right(inputs, *in_turns(inputs, [0, 70, 230], backend="triton"))


@pytest.mark.usefixtures("many_pieces")
def test_on_any_gpu() -> None:
    """The portable kernels, in Triton's interpreter where there is no GPU."""
    inputs = with_state(prefill_inputs([170], gates="weak", head_k=32, head_v=32))
    assert_right(inputs, *in_turns(inputs, [0, 40, 170], backend="triton"))


def _without_state(state: Tensor, maps: Tensor) -> Tensor:
    return maps[..., maps.shape[-1] :, :]


def _transposed(state: Tensor, maps: Tensor) -> Tensor:
    a, b = maps.tensor_split([maps.shape[-1]], dim=-2)
    return state @ a.mT + b


FAULTS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "parts that forget the state before them": (context_parallel, "_applied", _without_state),
    "maps that are transposed": (context_parallel, "_applied", _transposed),
    "maps of pieces that are not joined": (torch.Tensor, "baddbmm_", lambda x, *_: x),
    "a state of another rank": (InTurns, "gathered", lambda self, x: x.expand(self.size, *x.shape)),
}


@pytest.mark.usefixtures("many_pieces")
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = CASES["weak, torch.bfloat16"]()
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError, match="over its budget"):
        assert_prefill(inputs, *(x.cpu() for x in in_turns(inputs, [0, 150, 500])))


def history(x: Tensor, width: int) -> Tensor:
    """The recipe of docs/parallel.md: what stands before this rank's inputs of a convolution."""
    own = Parallel.of()
    lasts = own.gathered(x[1 - width :].contiguous())
    before = lasts[own.rank - 1] if own.rank else torch.zeros_like(lasts[0])
    return before[None].mT


def convolved(x: Tensor, states: Tensor) -> Tensor:
    weight, cu_seqlens = normal(8, 4, seed=2), torch.tensor([0, len(x)])
    return causal_conv1d(
        x, weight, conv_states=states, cu_seqlens=cu_seqlens, state_indices=None, has_initial_state=None
    )


def _process(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    for name in PROCESSED:
        inputs = CASES[name]()
        first, last = cuts_of(inputs, size)[rank : rank + 2]
        result = context_parallel_gated_delta_rule(**part(inputs, first, last), output_final_state=True)
        torch.save(result, folder / f"{name}-{rank}.pt")
    x = normal(30, 8, seed=1)[10 * rank : 10 * rank + 10]
    states = history(x, 4)
    torch.save((convolved(x, states), states), folder / f"conv-{rank}.pt")
    dist.destroy_process_group()


PROCESSED = ("weak, torch.float32", "model, torch.bfloat16", "bf16 state")


@pytest.mark.parametrize("size", [2, 3])
def test_processes(size: int, tmp_path: Path) -> None:
    mp.spawn(_process, (size, tmp_path), nprocs=size)  # pyright: ignore[reportPrivateImportUsage]
    for name in PROCESSED:
        inputs = CASES[name]()
        outputs, states = zip(*(torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(size)), strict=True)
        assert all(same_bits(state, states[0]) for state in states)
        assert states[0].dtype == inputs["initial_state"].dtype
        if DEVICE == "cpu":
            output, state = in_turns(inputs, cuts_of(inputs, size))
            assert same_bits(torch.cat(outputs), output) and same_bits(states[0], state)
        assert_prefill(inputs, torch.cat(outputs), states[0])
    x, states = normal(30, 8, seed=1)[: 10 * size], torch.zeros(1, 8, 3)
    whole = convolved(x, states)
    parts, ends = zip(*(torch.load(tmp_path / f"conv-{rank}.pt") for rank in range(size)), strict=True)
    assert same_bits(torch.cat(parts), whole) and same_bits(ends[-1], states)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["no state", "bf16 state", "fp16", "K != V", "grouped queries"])
def test_one_rank_is_the_operator(name: str) -> None:
    inputs = CASES[name]()
    output, state = prefill(inputs)
    given = part(inputs, 0, len(inputs["q"]))
    found = context_parallel_gated_delta_rule(**given, output_final_state=True)
    assert same_bits(found[0], output) and same_bits(found[1], state)
    lone = context_parallel_gated_delta_rule(**given)
    assert isinstance(lone, Tensor) and same_bits(lone, output)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a batch": ({"q": torch.zeros(1, 9, 2, 64)}, ShapeError, r"q is of shape \[1, 9, 2, 64\]; it must be \[L, HQ, K\]"),
    "no tensor": ({"k": None}, DtypeError, r"k is None; it must be a tensor \[L, HK, K\]"),
    "lengths": ({"v": torch.zeros(8, 4, 64)}, ShapeError, r"v is of shape \[8, 4, 64\]; .*with L=9 \(from q\)"),
    "heads": ({"v": torch.zeros(9, 3, 64)}, ShapeError, r"\(HQ, HK, HV\) is \(2, 2, 3\)"),
    "gates": ({"g": torch.zeros(9, 3)}, ShapeError, r"g is of shape \[9, 3\]"),
    "several states": ({"initial_state": torch.zeros(2, 4, 64, 64)}, ShapeError, r"initial_state is of shape \[2, 4,"),
    "gradient": ({"q": torch.zeros(9, 2, 64, requires_grad=True)}, GradientError, "q is a tensor that requires grad"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, rank: int) -> None:
    """On every rank alike, so that none waits for the others, and before anything is exchanged."""
    change, error, message = BAD[name]
    inputs = part(prefill_inputs([9], dtype=torch.float32), 0, 9)
    left: list[Tensor] = []
    with turn(rank, 2, left), pytest.raises(error, match=message):
        context_parallel_gated_delta_rule(**{**inputs, **change})
    assert not left


def test_no_group() -> None:
    inputs = part(prefill_inputs([9]), 0, 9)
    with pytest.raises(OptionError, match="group is None, and torch"):
        context_parallel_gated_delta_rule(**inputs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("heads", [2, 8, 32, 64])
@pytest.mark.parametrize("tokens", [0, 1, 64, 1000, 131072])
def test_partition(tokens: int, ranks: int, heads: int) -> None:
    cuts = partition(tokens, ranks, heads)
    lengths = [last - first for first, last in pairwise(cuts)]
    assert (cuts[0], cuts[-1], len(lengths)) == (0, tokens, ranks)
    assert all(cut % 64 == 0 for cut in cuts[:-1]) and min(lengths) >= 0
    if tokens == 131072 and ranks > 1:
        assert lengths[0] >= lengths[1] - 64 and max(lengths[1:]) - min(lengths[1:]) <= 64
        assert (lengths[0] > 1.1 * lengths[1]) == (heads >= 32)


@pytest.mark.parametrize("change", [{"tokens": -1}, {"ranks": 0}, {"state_heads": 0}])
def test_partition_of_nonsense(change: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=f"partition: {next(iter(change))} is"):
        partition(**{"tokens": 100, "ranks": 2, "state_heads": 4, **change})
