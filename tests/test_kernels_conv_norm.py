"""The Triton kernels of the convolutions and of the gated norm, beside the CPU backend and the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import library
from gated_delta.library import CausalConv1dUpdate as Update
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from helpers import DEVICE, FLOATS, nans, normal, same_bits, starts, strided

pytest.importorskip("triton")
from gated_delta.kernels.triton import conv as kernels
from gated_delta.kernels.triton import norm as norms

D = 24
LENGTHS = (3, 0, 1, 20, 2, 0, 4)
SLOTS: tuple[int, ...] = (5, 2, 9, 0, 7, 4, 3)
every_width = pytest.mark.parametrize("width", [2, 3, 4, 5])
both_layouts = pytest.mark.parametrize("order", ["D", "W"])
every_dtype = pytest.mark.parametrize("dtype", FLOATS)
two_dtypes = pytest.mark.parametrize("dtype", FLOATS[:2])
mixed_dtypes = pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)


def memory(x: Tensor) -> Tensor:
    """All memory that x is a part of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def copied(x: Tensor, device: str) -> Tensor:
    """A copy of x with its strides and all memory around it."""
    return memory(x).to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def wide(count: int, dtype: torch.dtype = torch.float32, channels: int = D) -> Tensor:
    """``[count, channels]`` inputs as rows of a wider buffer of NaN."""
    buffer = nans(count, channels + 16, dtype=dtype)
    buffer[:, 8:-8] = normal(count, channels)
    return buffer[:, 8:-8]


def pool(slots: int, columns: int, order: str = "D", dtype: torch.dtype = torch.float32, channels: int = D) -> Tensor:
    """Random convolution states between NaN, ``order`` contiguous; negative slots are in memory too."""
    if order == "W":
        states = nans(7 + slots, channels + 3, columns + 2, dtype=dtype)[7:, 2:-1, 1:-1]
    else:
        states = nans(7 + slots, columns + 2, channels + 24, dtype=dtype)[7:, 1:-1, 8:-16].transpose(1, 2)
    return states.copy_(normal(slots, channels, columns, seed=9))


def weights(width: int, dtype: torch.dtype = torch.float32, channels: int = D, order: str = "W") -> dict[str, Any]:
    weight = normal(channels, width, seed=1, dtype=dtype)
    weight = weight if order == "W" else weight.T.contiguous().T
    return {"weight": weight, "bias": normal(channels, seed=2, dtype=dtype)}


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: in any dtype and any order their sums of products are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def live_rows(options: dict[str, Any], rows: int) -> list[int]:
    slots, null = options.get("state_indices"), options.get("null_slot")
    return list(range(rows)) if slots is None else [i for i in range(rows) if slots[i] >= 0 and slots[i] != null]


def compare(operator: Callable[..., Tensor], x: Tensor, cu: Tensor, histories: Tensor, **given: Any) -> None:
    """Run ``operator`` on both backends: states and all memory around them must have the same bits, padding must give
    zeros, and what is left is judged by the oracle, with ``histories [N, W-1, D]``.
    """
    results = {}
    for backend, device in (("cpu", "cpu"), ("triton", DEVICE)):
        inputs = {"x": x, **given}
        inputs = {name: copied(v, device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        y = operator(**inputs, backend=backend)
        assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
        results[backend] = y.cpu(), inputs["conv_states"]
        for name, value in inputs.items():
            if isinstance(value, Tensor) and name != "conv_states":
                assert same_bits(memory(value).cpu(), memory(given.get(name, x)))
    y, states = results["triton"]
    if states is not None:
        assert same_bits(memory(states).cpu(), memory(results["cpu"][1]))
    y, flat = y.flatten(0, -2), x.flatten(0, -2)
    own = torch.zeros(len(flat), dtype=torch.bool)
    for i in live_rows(given, len(cu) - 1):
        own[cu[i] : cu[i + 1]] = True
    assert bool((y[~own] == 0).all())
    rest = given["weight"], given["bias"], histories, cu, given.get("activation", "silu")
    plain, exact = (oracle.conv(flat, *rest, dtype=dtype)[own] for dtype in (torch.float32, torch.float64))
    assert_within_budget("output", y[own], plain, exact)


# --- prefill ----------------------------------------------------------------------------------------------------------


def prefill(
    x: Tensor, lengths: Sequence[int], states: Tensor | None, parameters: dict[str, Any], **options: Any
) -> None:
    """Compare prefills; ``has_initial_state`` decides about histories."""
    cu = options.pop("cu_seqlens", starts(lengths))
    options = {"state_indices": None, "has_initial_state": None, **options}
    slots, has, weight = options["state_indices"], options["has_initial_state"], parameters["weight"]
    histories = torch.zeros(len(lengths), weight.shape[1] - 1, len(weight))
    if states is not None:
        read = torch.arange(len(lengths)) if slots is None else slots.long().clamp(min=0)
        histories = states[read, :, : weight.shape[1] - 1].transpose(1, 2).float()
        if has is not None:
            histories = torch.where(has[:, None, None], histories, 0.0)
    compare(gd.causal_conv1d, x, cu, histories, conv_states=states, cu_seqlens=cu, **parameters, **options)


@every_width
@both_layouts
@every_dtype
def test_prefill(width: int, order: str, dtype: torch.dtype) -> None:
    """Sequences of every kind, fresh ones over NaN, columns for speculation, tokens behind the last sequence."""
    states = pool(11, width - 1 + 3 * (order == "W"), order, dtype)
    has = [True, False, False, True, False, True, True]
    states[[slot for slot, there in zip(SLOTS, has, strict=True) if not there]] = torch.nan
    x = wide(34, dtype)
    x[30:] = torch.nan
    prefill(
        x, LENGTHS, states, weights(width, order=order), state_indices=strided(SLOTS, torch.int32),
        has_initial_state=strided(has, torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("width", "lengths"),
    [
        (4, ()), (3, (0,)), (5, (1,)), (4, (70,)), (5, (0, 0, 5, 0)), (4, (1,) * 25), (5, (9, 8, 7, 40, 2)),
        (5, (3,) * 9), (2, (2, 0, 1, 33, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("programs", [0, 2048])
def test_prefill_lengths(width: int, lengths: Sequence[int], programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 and of 8 tokens, with and without many tokens behind the last sequence."""
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    for behind in (0, 35):
        states, has = pool(len(lengths), width - 1), torch.arange(len(lengths)) % 3 > 0
        prefill(wide(sum(lengths) + behind), lengths, states, weights(width), has_initial_state=has)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "swish"])
@pytest.mark.parametrize("stateless", [True, False])
def test_prefill_options(bias: bool, activation: str | None, stateless: bool) -> None:
    states = None if stateless else pool(7, 3)
    parameters = weights(4) if bias else {**weights(4), "bias": None}
    prefill(wide(31, torch.bfloat16), LENGTHS, states, parameters, activation=activation)


@pytest.mark.parametrize("null_slot", [None, 0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prefill_padding(null_slot: int | None, dtype: torch.dtype) -> None:
    """No state of padding is read or written, and its inputs reach nothing."""
    slots, x, cu = list(SLOTS), wide(34), starts(LENGTHS)
    slots[3] = 8
    for i in (1, 3, 4):
        slots[i] = -3 if null_slot is None else null_slot
        x[cu[i] : cu[i + 1]] = torch.nan
    states = pool(11, 3)
    states[0] = torch.nan
    prefill(
        x, LENGTHS, states, weights(4), state_indices=strided(slots, dtype), null_slot=null_slot,
        cu_seqlens=strided(cu.tolist(), dtype),
    )  # fmt: skip


@mixed_dtypes
def test_prefill_mixes_dtypes(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Several blocks of channels, bf16 weights."""
    states = pool(7, 4, dtype=state_dtype, channels=300)
    prefill(wide(30, dtype, 300), LENGTHS, states, weights(4, torch.bfloat16, 300))


def test_prefill_of_nothing() -> None:
    """Fresh states are cleared, and no channels are no error."""
    has = torch.tensor([False, True, False])
    prefill(wide(0), (0, 0, 0), pool(3, 4), weights(3), has_initial_state=has)
    prefill(torch.zeros(3, 0), (3,), torch.zeros(1, 0, 3), weights(4, channels=0))


# --- update -----------------------------------------------------------------------------------------------------------


def update(x: Tensor, cu: Tensor, states: Tensor, parameters: dict[str, Any], *, ragged: bool, **options: Any) -> None:
    """Compare updates of rows that start at ``cu``."""
    slots, accepted = options.setdefault("state_indices", None), options.get("num_accepted_tokens")
    rows, past = len(cu) - 1, parameters["weight"].shape[1] - 1
    first = torch.zeros(rows, dtype=torch.int64) if accepted is None else accepted.long() - 1
    histories = torch.zeros(rows, past, x.shape[-1])
    for i in live_rows(options, rows):
        state = states[i if slots is None else slots[i]]
        histories[i] = state[:, first[i] : first[i] + past].T
    given = {**parameters, **options, "cu_seqlens": cu if ragged else None}
    compare(gd.causal_conv1d_update, x, cu, histories, conv_states=states, **given)


@every_width
@both_layouts
@two_dtypes
@pytest.mark.parametrize("shape", ["[N, D]", "[N, 3, D]", "ragged"])
def test_update(width: int, order: str, dtype: torch.dtype, shape: str) -> None:
    each = {"[N, D]": 1, "[N, 3, D]": 3}.get(shape)
    lengths = (1, 0, 2, 6, 3, 0, 4) if each is None else (each,) * 7
    x = wide(sum(lengths) + 2 * (each is None), dtype)
    x[sum(lengths) :] = torch.nan
    if shape.count(",") == 2:
        x = x.unflatten(0, (7, -1))
    states = pool(11, width - 1 + 2 * (order == "W"), order, dtype)
    update(
        x, starts(lengths), states, weights(width), ragged=each is None,
        state_indices=strided(SLOTS, torch.int32 if order == "W" else torch.int64),
    )  # fmt: skip


@every_width
@both_layouts
@pytest.mark.parametrize("lengths", [(1, 4, 2, 3, 0, 1, 2), (4,) * 7, (1,) * 7])
@two_dtypes
def test_speculative_window(width: int, order: str, lengths: Sequence[int], dtype: torch.dtype) -> None:
    """Up to three drafts: any history, columns behind the new window as they were."""
    ragged = len(set(lengths)) > 1
    x, states = wide(sum(lengths), dtype), pool(11, width + 3, order, dtype)
    accepted = strided([1, 2, 3, 4, 2, 1, 4], torch.int32 if ragged else torch.int64)
    update(
        x if ragged else x.unflatten(0, (7, -1)), starts(lengths), states, weights(width), ragged=ragged,
        state_indices=strided(SLOTS), num_accepted_tokens=accepted,
    )  # fmt: skip


@pytest.mark.parametrize("null_slot", [None, 0])
@pytest.mark.parametrize("accepted", [None, [1, 3, 2, -9]])
@pytest.mark.parametrize("lengths", [(2, 3, 1, 1), (2, 0, 3, 0), (1, 1, 1, 1)])
def test_update_padding(null_slot: int | None, accepted: list[int] | None, lengths: Sequence[int]) -> None:
    padding = -7 if null_slot is None else null_slot
    x, cu, states = wide(sum(lengths) + 5), starts(lengths), pool(6, 5)
    for first, last in (cu[1:3], cu[3:5], (cu[4], len(x))):
        x[first:last] = torch.nan
    states[0] = torch.nan
    options: dict[str, Any] = {"state_indices": torch.tensor([4, padding, 2, padding], dtype=torch.int32)}
    if accepted is not None:
        options["num_accepted_tokens"] = torch.tensor(accepted)
    update(x, strided(cu.tolist()), states, weights(3), ragged=True, null_slot=null_slot, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_update_options(bias: bool, activation: str | None) -> None:
    parameters = weights(4, torch.bfloat16) if bias else {**weights(4, torch.bfloat16), "bias": None}
    update(wide(5, torch.bfloat16), starts([1] * 5), pool(5, 3), parameters, ragged=False, activation=activation)


@mixed_dtypes
@both_layouts
def test_update_mixes_dtypes(dtype: torch.dtype, state_dtype: torch.dtype, order: str) -> None:
    """Several blocks of channels."""
    states = pool(3, 5, order, state_dtype, channels=600)
    update(wide(6, dtype, 600), starts([2] * 3), states, weights(4, channels=600), ragged=True)


def test_update_of_no_rows_clears_padding() -> None:
    update(wide(4), starts([]), pool(2, 3), weights(4), ragged=True, state_indices=torch.tensor([], dtype=torch.int32))


@pytest.mark.parametrize("tokens", [1, 3])
def test_update_of_equal_rows_needs_no_starts(tokens: int) -> None:
    """The kernel itself takes rows of one length without ``cu_seqlens``, at any strides."""
    x = whole(5, 4, D + 4)[:, 1 : 1 + tokens, 2:-2]
    x, weight, outputs = x[:, 0] if tokens == 1 else x, whole(D, 4, seed=1), []
    states = pool(5, 3).copy_(whole(5, D, 3, seed=2))
    for backend, device, cu in (("cpu", "cpu", starts([tokens] * 5)), ("triton", DEVICE, None)):
        given, after = copied(x if cu is None else x.reshape(-1, D), device), copied(states, device)
        call = Update(given, after, weight.to(device), None, False, None, None, cu, -1, given.new_empty(given.shape))
        library.run("causal_conv1d_update", call, backend)
        outputs.append((call.output.view(x.shape).cpu(), memory(after).cpu()))
    assert torch.equal(outputs[1][0], outputs[0][0])
    assert same_bits(outputs[1][1], outputs[0][1])


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """More than 2^31 elements of bf16; on a CPU a file that is all hole."""
    count = 2**31 + 2**28
    if DEVICE == "cuda":
        return torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
    path = tmp_path_factory.mktemp("huge") / "zeros"
    return torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16)


@pytest.mark.parametrize("strides", [(2**30, 1, 17), (5, 2**27, 1), (17, 1, 2**31 // 3 + 1)])
@pytest.mark.parametrize("operator", ["prefill", "update", "window"])
def test_addresses_of_64_bits(huge: Tensor, strides: tuple[int, int, int], operator: str) -> None:
    """Slots, channels, columns and tokens so far apart that their offsets need more than 32 bits."""
    x, states = huge.as_strided((18, 17), (2**27, 1), 512), huge.as_strided((3, 17, 4), strides)
    x.copy_(whole(18, 17))
    states.copy_(whole(3, 17, 4, seed=1))
    given: dict[str, Any] = {"weight": whole(17, 5, seed=2), "cu_seqlens": starts((1, 16, 1)), "state_indices": None}
    if operator == "window":
        x = x[15:]
        given |= {"cu_seqlens": starts((1, 1, 1)), "num_accepted_tokens": torch.ones(3, dtype=torch.int32)}
    given |= {"has_initial_state": None} if operator == "prefill" else {}
    run: Callable[..., Tensor] = gd.causal_conv1d if operator == "prefill" else gd.causal_conv1d_update
    near, results = (x.cpu().clone(), states.cpu().clone()), []
    for backend, device, own in (("cpu", "cpu", near), ("triton", DEVICE, (x, states))):
        moved = {name: value if value is None else value.to(device) for name, value in given.items()}
        y = run(x=own[0], conv_states=own[1], activation=None, backend=backend, **moved)
        results.append((y.cpu(), own[1].cpu().clone()))
    assert torch.equal(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])


# --- the gated norm ---------------------------------------------------------------------------------------------------


def exact_norm(x: Tensor, z: Tensor, weight: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    x, z, weight = x.to(dtype), z.to(dtype), weight.to(dtype)
    gate = 1 / (1 + torch.exp(-z)) * (1 if activation == "sigmoid" else z)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight * gate


def judge_norm(x: Tensor, z: Tensor, weight: Tensor, activation: str = "silu") -> None:
    """Run the kernel on x and z as they are and judge what it gives."""
    y = gd.rms_norm_gated(x, z, weight.to(x.device), 1e-6, activation, backend="triton")
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    x, z = x.cpu(), z.cpu()
    plain, exact = (exact_norm(x, z, weight, activation, dtype) for dtype in (torch.float32, torch.float64))
    assert_within_budget("output", y.cpu(), plain, exact)


def norm(x: Tensor, z: Tensor, activation: str = "silu") -> None:
    """Judge copies of x and z on the device, which must stay as they are."""
    given = copied(x, DEVICE), copied(z, DEVICE)
    judge_norm(*given, normal(x.shape[-1], seed=2, dtype=torch.bfloat16), activation)
    for after, before in zip(given, (x, z), strict=True):
        assert same_bits(memory(after).cpu(), memory(before))


@every_dtype
@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
@pytest.mark.parametrize(
    "shape", [(32,), (7, 96), (3, 1, 128), (2, 0, 64), (2, 3, 5, 192), (130, 33), (1, 300), (4, 0)]
)
def test_norm(dtype: torch.dtype, activation: str, shape: tuple[int, ...]) -> None:
    x, z = (nans(*shape[:-1], shape[-1] + 16, dtype=dtype)[..., 8:-8] for _ in range(2))
    x.copy_(0.1 * normal(*shape))
    z.copy_(3 * normal(*shape, seed=1))
    norm(x, z, activation)


@pytest.mark.parametrize(
    ("orders", "taken"),
    [
        (("012", "012"), True), (("012", "120"), True), (("120", "120"), True), (("201", "201"), True),
        (("102", "012"), False), (("102", "201"), False),
    ],
)  # fmt: skip
def test_norm_takes_two_strides(orders: tuple[str, str], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leading dimensions in any order are read in place if two strides reach them."""
    original, copies = norms.Launches.add, []

    def add(self: Any, *given: Any, **options: Any) -> None:
        copies.extend(given[2][i].is_contiguous() for i in (0, 3))
        original(self, *given, **options)

    monkeypatch.setattr(norms.Launches, "add", add)
    sizes, views = (4, 5, 6), []
    for seed, order in enumerate(orders):
        stored = normal(*(sizes[int(i)] for i in order), 40, seed=seed)
        views.append(stored.permute(*(order.index(i) for i in "012"), 3)[..., 4:-4])
    norm(views[0], views[1])
    assert copies == [not taken] * 2


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_norm_of_zeros_and_extreme_gates(activation: str) -> None:
    x = torch.cat((torch.zeros(1, 64), normal(3, 64)))
    z = torch.tensor([1.0, -1e4, 1e4, 0.0])[:, None].expand(4, 64).contiguous()
    norm(x, z, activation)


def test_norm_of_far_rows(huge: Tensor) -> None:
    x, z = huge.as_strided((3, 3, 16), (2**30, 16, 1)), huge.as_strided((3, 3, 16), (16, 2**30, 1), 512)
    x.copy_(normal(3, 3, 16))
    z.copy_(normal(3, 3, 16, seed=1))
    judge_norm(x, z, torch.ones(16))
