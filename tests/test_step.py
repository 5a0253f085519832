"""gated_delta_net_step: one launch, three operators and the CPU, beside float64; who may write a shared window."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import reference
from gated_delta.errors import BackendError, DataError, DtypeError, LayoutError, OptionError, ShapeError
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.validation import operators
from helpers import DEVICE, copied, nans, normal, same_bits, starts, strided

pytest.importorskip("triton")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = ("cpu", "triton", "separate")
PER_ROW = (*"qkvzba", "state_indices")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Shape(NamedTuple):
    heads: int = 2
    ratio: int = 2
    head_k: int = 32
    head_v: int = 32
    width: int = 4

    @property
    def channels(self) -> int:
        return self.heads * (2 * self.head_k + self.ratio * self.head_v)


SMALL = Shape()


def projected(s: Shape, tokens: int, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k, v, z, b and a as views of what projections of either layout give."""
    wide, gates = s.ratio * s.head_v, (s.heads, s.ratio)
    if layout == "interleaved":
        joined = normal(tokens, s.heads, 2 * s.head_k + 2 * wide, seed=1, dtype=dtype)
        q, k, v, z = joined.split((s.head_k, s.head_k, wide, wide), dim=-1)
        b, a = normal(tokens, s.heads, 2 * s.ratio, seed=2, dtype=dtype).split(s.ratio, dim=-1)
    else:
        keys, values = s.heads * s.head_k, s.heads * wide
        q, k, v, z = normal(tokens, 2 * keys + 2 * values, seed=1, dtype=dtype).split((keys, keys, values, values), -1)
        q, k, v, z = (x.unflatten(-1, (s.heads, -1)) for x in (q, k, v, z))
        b, a = (normal(tokens, s.heads * s.ratio, seed=seed, dtype=dtype).unflatten(-1, gates) for seed in (2, 3))
    v, z = (x.unflatten(-1, (s.ratio, s.head_v)) for x in (v, z))
    return {"q": q, "k": k, "v": v, "z": z, "b": b, "a": a}


def call(
    s: Shape = SMALL,
    *,
    lengths: tuple[int, ...] = (1,) * 5,
    drafts: int = 0,
    layout: str = "interleaved",
    order: str = "SD",
    dtype: torch.dtype = FP32,
    state_dtype: torch.dtype = FP32,
) -> dict[str, Any]:
    """A step whose last row but one is padding, over a pool with NaN where no row is, cut out of pages."""
    rows, heads = len(lengths), s.heads * s.ratio
    columns, slots = s.width - 1 + drafts, rows * (drafts + 1) + 3
    page = nans(slots, columns + 1, s.channels + 8, dtype=dtype)
    conv = (
        page[:, 1:, 8:].transpose(1, 2) if order == "SD" else nans(slots, s.channels, columns + 2, dtype=dtype)[..., 2:]
    )
    state = nans(slots, heads + 1, s.head_v, s.head_k, dtype=state_dtype)[:, 1:]
    free = torch.randperm(slots, generator=torch.Generator().manual_seed(0))[: rows * (drafts + 1)]
    index = free.view(rows, drafts + 1).clone()
    conv[index[:, 0]] = normal(rows, s.channels, columns, seed=5).to(dtype)
    state[index.flatten()] = normal(index.numel(), heads, s.head_v, s.head_k, seed=6).to(state_dtype)
    given = projected(s, sum(lengths) + 2 * bool(drafts), layout, dtype)
    index[-2] = -1
    given |= {
        "conv_states": conv, "conv_weight": normal(s.channels, s.width, seed=7, dtype=dtype), "state": state,
        "A_log": normal(heads, seed=8), "dt_bias": normal(heads, seed=9), "norm_weight": normal(s.head_v, seed=10),
        "eps": 1e-6, "tickets": torch.zeros(slots, s.heads, dtype=torch.int32),
    }  # fmt: skip
    if not drafts:
        return {**given, "state_indices": strided(index[:, 0].tolist(), torch.int32)}
    accepted = torch.arange(rows) % (drafts + 1) + 1
    return {**given, "state_indices": index.int(), "cu_seqlens": starts(lengths), "num_accepted_tokens": accepted}


class Result(NamedTuple):
    output: Tensor
    conv: Tensor
    state: Tensor


def run(given: dict[str, Any], backend: str) -> Result:
    own = copied(given) if backend != "cpu" else {**given, **{n: given[n].clone() for n in ("conv_states", "state")}}
    output = gd.gated_delta_net_step(**own, backend=backend)
    if given.get("tickets") is not None:
        assert not own["tickets"].any()
    return Result(output.cpu(), own["conv_states"].cpu(), own["state"].cpu())


def evaluated(given: dict[str, Any], dtype: torch.dtype, **options: Any) -> Result:
    """Row by row and token by token, from the definitions of the parts; states of float64 are not rounded."""
    x = torch.cat([given[name].flatten(1) for name in "qkv"], dim=-1)
    slots = given["state_indices"].view(len(given["state_indices"]), -1).long()
    bounds = given.get("cu_seqlens", torch.arange(len(slots) + 1)).tolist()
    accepted = given.get("num_accepted_tokens", torch.ones(len(slots), dtype=torch.int64)).tolist()
    past = given["conv_weight"].shape[1] - 1
    heads, keys = given["v"].shape[1] * given["v"].shape[2], given["q"].shape[1:].numel()
    conv, state = given["conv_states"].clone(), given["state"].to(dtype)
    output = torch.zeros(len(x), heads, given["v"].shape[-1], dtype=dtype)
    for row, (first, last) in enumerate(pairwise(bounds)):
        if slots[row, 0] < 0 or first == last:
            continue
        column, own = accepted[row] - 1, slice(first, last)
        history = given["conv_states"][slots[row, 0], :, column : column + past].T
        cu = torch.tensor([0, last - first])
        mixed = oracle.conv(x[own], given["conv_weight"], None, history[None], cu, "silu", dtype=dtype)
        if dtype != torch.float64:
            mixed = mixed.to(x.dtype)
        parts = mixed.split((keys, keys, x.shape[1] - 2 * keys), dim=-1)
        q, k, v = (y.unflatten(-1, (-1, given[n].shape[-1]))[None] for y, n in zip(parts, "qkv", strict=True))
        found = oracle.recurrent(
            q, k, v, given["state"][slots[row, column]][None].to(dtype), given["A_log"],
            given["a"][own].flatten(1)[None], given["dt_bias"], given["b"][own].flatten(1)[None],
            options.get("scale"), dtype=dtype, allow_neg_eigval=options.get("allow_neg_eigval", False),
        )  # fmt: skip
        z, gate = given["z"][own].flatten(1, 2), options.get("activation", "silu")
        output[own] = reference.rms_norm_gated(
            found.output[0], z, given["norm_weight"], given["eps"], gate, dtype=dtype
        )
        for t, after in enumerate(found.kept):
            state[slots[row, t]] = after[0]
        inputs = torch.cat((history[1:], x[own].to(conv.dtype)))
        conv[slots[row, 0], :, : len(inputs)] = inputs.T
    return Result(output, conv, state)


def same(x: Tensor, y: Tensor) -> bool:
    return same_bits(*(z.clone(memory_format=torch.contiguous_format) for z in (x, y)))


def check(given: dict[str, Any], backend: str, **options: Any) -> None:
    found = run({**given, **options}, backend)
    plain, exact = (evaluated(given, dtype, **options) for dtype in (FP32, torch.float64))
    assert same(found.conv, exact.conv)
    unread = given["state"].isnan()
    assert torch.equal(found.state.isnan(), unread)
    assert_within_budget("output", found.output, plain.output, exact.output)
    assert_within_budget("state", found.state[~unread], plain.state[~unread], exact.state[~unread])


@every_backend
@pytest.mark.parametrize(("layout", "order"), [("interleaved", "SD"), ("flat", "DS")])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP16)], ids=str)
@pytest.mark.parametrize("drafts", [0, 2])
def test_step(backend: str, layout: str, order: str, dtypes: tuple[torch.dtype, torch.dtype], drafts: int) -> None:
    """Rows of every length, one without tokens, one that is padding, tokens behind the last row."""
    lengths = (2, 1, 0, 3, 1, 3) if drafts else (1,) * 5
    dtype, state_dtype = dtypes
    given = call(lengths=lengths, drafts=drafts, layout=layout, order=order, dtype=dtype, state_dtype=state_dtype)
    check(given, backend)


@every_backend
@pytest.mark.parametrize(
    "shape",
    [Shape(3, 1, 32, 32), Shape(1, 3, 64, 32), Shape(1, 1, 96, 192), Shape(1, 2, 32, 32, 2), Shape(1, 2, 32, 32, 3),
     Shape(1, 2, 32, 32, 5)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("drafts", [0, 1])
def test_shapes(backend: str, shape: Shape, drafts: int) -> None:
    check(call(shape, lengths=(2, 2, 1) if drafts else (1, 1, 1), drafts=drafts), backend)


@every_backend
@pytest.mark.parametrize("options", [{"activation": "sigmoid"}, {"activation": "swish", "scale": 0.5},
                                     {"allow_neg_eigval": True}, {"tickets": None}], ids=str)  # fmt: skip
def test_options(backend: str, options: dict[str, Any]) -> None:
    check(call(), backend, **options)


@every_backend
def test_padding_may_hold_anything(backend: str) -> None:
    """NaN in the inputs of padding and of tokens behind the last row reaches nothing; the null slot is padding too."""
    given = call(lengths=(2, 1, 2), drafts=1)
    clean = run(given, backend)
    dirty = {
        **given,
        **{name: given[name].clone() for name in "qkvzba"},
        "state_indices": given["state_indices"].clone(),
    }
    for name in "qkvzba":
        dirty[name][[2, 5, 6]] = torch.nan
    null = int(set(range(len(given["state"]))).difference(given["state_indices"].flatten().tolist()).pop())
    dirty["state_indices"][1] = null
    found = run({**dirty, "null_slot": null}, backend)
    assert not found.output[[2, 5, 6]].any()
    assert all(same_bits(x, y) for x, y in zip(found, clean, strict=True))
    nothing = {n: x[:0] if n in PER_ROW else x for n, x in call().items()}
    assert run(nothing, backend).output.shape == (0, 4, 32)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter alone runs programs one after the other")
def test_a_window_is_written_by_its_last_reader() -> None:
    """Were it written by the first sibling (here: tickets that are said to be the last), the next one would convolve
    another window.
    """
    given = call(Shape(1, 3, 32, 32))
    right = run(given, "triton")
    given["tickets"] += 2  # the first to come believes that all others have been
    own = copied(given)
    wrong = gd.gated_delta_net_step(**own, backend="triton")
    assert not torch.allclose(wrong[:, 1:], right.output[:, 1:])
    assert torch.equal(wrong[:, :1], right.output[:, :1])


def test_a_row_depends_on_itself_alone() -> None:
    given = call(dtype=BF16)
    whole = run(given, "triton").output
    for row in (0, 4):
        part = {
            n: x[row : row + 1] if n in ("q", "k", "v", "z", "b", "a", "state_indices") else x for n, x in given.items()
        }
        assert same_bits(run(part, "triton").output, whole[row : row + 1])


@pytest.mark.skipif(DEVICE == "cpu", reason="siblings meet on a GPU only")
@pytest.mark.parametrize("shape", [Shape(16, 2, 128, 128), Shape(16, 4, 128, 128), Shape(16, 3, 128, 128)], ids=str)
def test_siblings_do_not_disturb_each_other(shape: Shape) -> None:
    """Many rows, many times: always the same bits, zero tickets, and the windows of the separate operators."""
    given = call(shape, lengths=(1,) * 64, dtype=BF16)
    first, separate = run(given, "triton"), run(given, "separate")
    assert same_bits(first.conv, separate.conv)
    for _ in range(200):
        again = run(given, "triton")
        assert all(same_bits(x, y) for x, y in zip(again, first, strict=True))


def test_explain_names_what_serves() -> None:
    large = gd.explain("gated_delta_net_step", device="cuda", head_k=256, head_v=256)
    small = gd.explain("gated_delta_net_step", device="cuda")
    assert (small.chosen, large.chosen) == ("triton", "separate")
    assert small.reasons["triton"].startswith("can serve it")
    assert "its fused step holds states of up to 32768 numbers, and these have 65536" in large.reasons["triton"]
    with pytest.raises(BackendError, match="serves gated_delta_net_step, which it makes of other operators"):
        gd.rms_norm_gated(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), 1e-6, backend="separate")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": ({"z": torch.ones(5, 2, 3, 32)}, ShapeError, "z is of shape [5, 2, 3, 32]; it must be [L, H, R, V] with"),
    "dtype": ({"k": torch.ones(5, 2, 32).half()}, DtypeError, "k is float16; it must be float32, as q is"),
    "channels": ({"conv_states": torch.ones(8, 100, 3)}, ShapeError, "conv_states is of shape [8, 100, 3]"),
    "pools": ({"state": torch.ones(7, 4, 32, 32)}, ShapeError, "state is of shape [7, 4, 32, 32]; it must be [P, HV"),
    "width": ({"conv_weight": torch.ones(256, 6)}, ShapeError, "conv_weight is of width 6; it must be of width 2 to 5"),
    "slots": ({"state_indices": torch.zeros(4).int()}, ShapeError, "state_indices is of shape [4]; it must be [L]"),
    "ragged": (
        {"cu_seqlens": starts((1,) * 5)}, OptionError,
        "num_accepted_tokens is None; it must be given: rows of cu_seqlens go on from a draft",
    ),
    "packed": (
        {"num_accepted_tokens": torch.ones(5).int()}, OptionError,
        "cu_seqlens is None; it must be given: num_accepted_tokens speaks of ragged rows",
    ),
    "drafts": (
        {"cu_seqlens": starts((1,) * 5), "num_accepted_tokens": torch.ones(5).int(),
         "state_indices": torch.zeros(5, 3).int()},
        ShapeError, "state_indices is of 3 columns; it must be of at most 1 columns, as conv_states has 3 for a width",
    ),
    "tickets": ({"tickets": torch.zeros(8, 3).int()}, ShapeError, "tickets is of shape [8, 3]; it must be [P, H]"),
    "gate": ({"activation": "gelu"}, OptionError, "activation is 'gelu'; it must be 'silu' or 'swish' or 'sigmoid'"),
    "eps": ({"eps": -1.0}, OptionError, "eps is -1.0; it must be at least 0"),
    "output": ({"output": torch.ones(5, 2, 32)}, ShapeError, "output is of shape [5, 2, 32]"),
    "gaps": ({"output": torch.ones(5, 8, 32)[:, ::2]}, LayoutError, "output is of strides [256, 64, 1]; it must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    change, error, message = REFUSED[name]
    given = call()
    before = {n: x.clone() for n, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises(error) as raised:
        gd.gated_delta_net_step(**{**given, **change})
    assert str(raised.value).startswith(f"gated_delta_net_step: {message}")
    assert all(same_bits(given[n], x) for n, x in before.items())


def test_a_call_like_another_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that looks otherwise anew: other sizes, other options, checked mode."""
    asked: list[object] = []
    real = operators.step
    monkeypatch.setattr(operators, "step", lambda *given: asked.append(given) or real(*given))
    given = {**call(Shape(1, 1, 32, 32)), "backend": "triton"}
    outputs = [gd.gated_delta_net_step(**copied(given)) for _ in range(3)]
    assert len(asked) == 1
    assert all(same_bits(x, outputs[0]) for x in outputs)
    gd.gated_delta_net_step(**copied({**given, "eps": 1e-5}))
    gd.gated_delta_net_step(**copied({**given, "tickets": None}))
    with gd.checked():
        gd.gated_delta_net_step(**copied(given))
    assert len(asked) == 4
    for _ in range(2):
        with pytest.raises(ShapeError, match="norm_weight is of shape"):
            gd.gated_delta_net_step(**copied({**given, "norm_weight": torch.ones(31)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_indices": torch.tensor([0, 1, 2, 3, 8])}, "state_indices is 8 somewhere; it must be below 8"),
        ({"state_indices": torch.tensor([0, 1, 2, 3, 1])}, "state_indices is 1 more than once"),
    ],
)
def test_checked_mode(change: dict[str, Any], message: str) -> None:
    with gd.checked(), pytest.raises(DataError) as raised:
        gd.gated_delta_net_step(**{**call(), **change})
    assert message in str(raised.value)


def test_checked_mode_knows_the_window() -> None:
    given = call(lengths=(2, 1, 2), drafts=1)
    given["num_accepted_tokens"] = torch.tensor([3, 1, 1])
    with (
        gd.checked(),
        pytest.raises(DataError, match=r"num_accepted_tokens is between 1 and 3; it must be in \[1, 2\]"),
    ):
        gd.gated_delta_net_step(**given)


def test_inside_torch() -> None:
    """opcheck: schema, fake and mutations are declared as they are."""
    given = call(lengths=(2, 1, 2), drafts=1)
    del given["eps"]
    order = ("q", "k", "v", "z", "b", "a", "conv_states", "conv_weight", "state", "A_log", "dt_bias", "norm_weight")
    args = [given[name].contiguous() for name in order]
    output = torch.zeros(len(given["q"]), 4, 32)
    rest = (0.5, 1e-6, "silu", False, given["state_indices"], given["cu_seqlens"], given["num_accepted_tokens"],
            given["tickets"], -1, output, "cpu")  # fmt: skip
    args[6] = torch.nan_to_num(args[6])
    args[8] = torch.nan_to_num(args[8])
    torch.library.opcheck(torch.ops.gated_delta.gated_delta_net_step.default, (*args, *rest))
