"""Plans: which calls go straight to a launch that was kept, and with what. Only the real launches need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gated_delta as gd
from gated_delta import decode, library, plans
from gated_delta.errors import ArgumentError
from gated_delta.testing.inputs import Inputs, recurrent_inputs, to_device
from gated_delta.validation import operators
from helpers import DEVICE, assert_recurrent, nans, same_bits


class RecurrentCall(NamedTuple):
    """What :func:`gated_delta.decode._recurrent` takes, by name."""

    where: str
    state_name: str
    scale: float | None
    use_qk_l2norm: bool
    allow_neg_eigval: bool
    backend: str
    disable_state_update: bool
    null_slot: int | None
    state_v_first: bool
    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    A_log: Tensor
    a: Tensor
    dt_bias: Tensor
    b: Tensor
    output: Tensor | None
    read_slots: Tensor | None = None
    write_slots: Tensor | None = None
    token_slots: Tensor | None = None
    snapshots: Tensor | None = None


TENSORS = library.TENSORS[library.Recurrent]
FEW = ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")
OPTIONAL = ("output", "read_slots", "write_slots", "token_slots", "snapshots")


class Launch:
    """What is launched here: it notes its pointers, in the order of :class:`gated_delta.library.Recurrent`."""

    def __init__(self) -> None:
        self.calls: list[tuple[int | None, ...]] = []

    def __call__(self, *pointers: Any) -> None:
        self.calls.append(tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in pointers))


def call_of(**changes: Any) -> RecurrentCall:
    """A call of two rows over one state each, as the operator makes it."""
    inputs = recurrent_inputs(2, h=1, hv=2, head_k=32, head_v=32)
    where = ("gated_delta_rule_decode_pretranspose", "state", None, True, False, "auto", False, None, True)
    return RecurrentCall(*where, **inputs, output=None)._replace(**changes)


def full_call(**changes: Any) -> RecurrentCall:
    """The same with every tensor that there can be, whether or not that makes sense."""
    slots = {name: torch.arange(2) for name in ("read_slots", "write_slots")}
    slots |= {"token_slots": torch.arange(2)[:, None], "snapshots": nans(2, 1, 2, 32, 32)}
    return call_of(**slots, output=nans(2, 1, 2, 32, dtype=torch.bfloat16), **changes)


def split(call: RecurrentCall) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Options and tensors, as plans look for them."""
    return ("recurrent", *call[:9]), tuple(call[9:])


def kept(call: RecurrentCall) -> Launch:
    """A plan for this call."""
    launch, (options, given) = Launch(), split(call)
    output = call.q.new_empty(call.v.shape) if call.output is None else call.output
    named = {**dict.fromkeys(library.Recurrent._fields), **call._asdict(), "output": output}
    record = library.Recurrent(*(named[name] for name in library.Recurrent._fields))
    if plans.keeps(given):
        plans.keep(options, given, plans._again(record, given, output, launch))
    return launch


def run(call: RecurrentCall) -> Tensor | None:
    """Run a call for which there is a plan, else None."""
    return (
        None
        if plans.find(*split(call)) is None
        else plans.run("recurrent", call[:9], tuple(call[9:]), decode._recurrent)
    )


def pointers(call: RecurrentCall, output: Tensor) -> tuple[int | None, ...]:
    """In the order of the record."""
    named = {**call._asdict(), "output": output}
    return tuple(None if named[name] is None else named[name].data_ptr() for name, *_ in TENSORS)


# --- hits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [call_of, full_call])
def test_a_hit_launches_with_the_pointers_of_the_call(make: Callable[[], RecurrentCall]) -> None:
    launch = kept(make())
    call = make()
    output = run(call)
    assert output is not None
    assert launch.calls == [pointers(call, output)]
    assert output is call.output or (call.output is None and bool(output.isnan().all()))
    assert (output.shape, output.dtype) == (call.v.shape, call.q.dtype)


@pytest.mark.parametrize("left_out", OPTIONAL)
def test_what_is_left_out_is_none(left_out: str) -> None:
    call = full_call()._replace(**{left_out: None})
    launch = kept(call)
    output = run(call)
    assert output is not None
    assert launch.calls == [pointers(call, output)]
    assert left_out == "output" or launch.calls[0][[name for name, *_ in TENSORS].index(left_out)] is None


def test_every_hit_has_its_own_output() -> None:
    launch, call = kept(call_of()), call_of()
    outputs = [run(call) for _ in range(3)]
    assert len({x.data_ptr() for x in outputs if x is not None}) == len(launch.calls) == 3


def test_every_look_of_one_call_has_its_plan() -> None:
    calls = [call_of(), *(changed(call_of(), name, "strides") for name in FEW)]
    launches = [kept(call) for call in calls]
    for call in reversed(calls):
        assert run(call) is not None
    assert [len(launch.calls) for launch in launches] == [1] * len(calls)


# --- misses -----------------------------------------------------------------------------------------------------------


def misaligned(x: Tensor) -> Tensor:
    """A copy one number further than torch puts it, of the same strides."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].as_strided(x.shape, x.stride()).copy_(x)


def changed(call: RecurrentCall, name: str, how: str) -> RecurrentCall:
    """The call with another look of one tensor."""
    x = getattr(call, name)
    if how == "dtype":
        y = x.int() if x.dtype == torch.int64 else x.half()
    elif how == "size":
        y = x[:1]
    elif how == "strides":
        y = torch.stack((x, x), -1)[..., 0] if x.dim() == 1 else torch.cat((x, x), -1)[..., : x.shape[-1]]
    elif how == "requires_grad":
        y = x.clone().requires_grad_()
    elif how == "subclass":
        y = torch.Tensor._make_subclass(Named, x)
    else:
        y = misaligned(x)
    return call._replace(**{name: y})


class Named(torch.Tensor):
    """A tensor that may do anything."""


@pytest.mark.parametrize("name", [*FEW, *OPTIONAL])
@pytest.mark.parametrize("how", ["dtype", "size", "strides", "requires_grad", "subclass", "alignment"])
def test_another_look_is_judged_anew(name: str, how: str) -> None:
    call = full_call()
    if how == "requires_grad" and not getattr(call, name).is_floating_point():
        return
    launch = kept(call)
    other = changed(call, name, how)
    assert run(other) is None
    assert run(call) is not None
    assert len(launch.calls) == 1


OPTIONS = {
    "where": "gated_delta_rule_mtp", "state_name": "initial_state", "scale": 0.5, "use_qk_l2norm": False,
    "allow_neg_eigval": True, "backend": "cpu", "disable_state_update": True, "null_slot": 0, "state_v_first": False,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_other_options_are_judged_anew(name: str) -> None:
    launch, other = kept(call_of()), call_of(**{name: OPTIONS[name]})
    assert run(other) is None
    own = kept(other)
    assert run(other) is not None
    assert (len(launch.calls), len(own.calls)) == (0, 1)
    assert tuple(OPTIONS) == RecurrentCall._fields[: len(OPTIONS)]


@pytest.mark.parametrize("name", OPTIONAL)
def test_presence_is_judged_anew(name: str) -> None:
    full = full_call()
    launches = [kept(full), kept(call_of())]
    assert run(full._replace(**{name: None})) is None
    assert run(call_of(**{name: getattr(full, name)})) is None
    assert not any(launch.calls for launch in launches)


@pytest.mark.parametrize("name", ["q", "state", "snapshots"])
def test_what_no_plan_can_serve_is_not_kept(name: str) -> None:
    kept(changed(full_call(), name, "subclass"))
    assert not plans._PLANS


def test_a_gradient_that_nobody_asks_for_needs_no_judge() -> None:
    call = call_of(A_log=torch.nn.Parameter(call_of().A_log))
    with torch.no_grad():
        launch = kept(call)
        assert run(call) is not None
    assert run(call) is None
    assert len(launch.calls) == 1


def test_a_fresh_output_may_not_stand_in_for_a_misaligned_one() -> None:
    call = call_of(output=misaligned(nans(2, 1, 2, 32, dtype=torch.bfloat16)))
    kept(call)
    assert run(call) is call.output
    assert run(call._replace(output=None)) is None


def test_checked_mode_checks() -> None:
    launch = kept(call_of())
    with gd.checked():
        assert run(call_of()) is None
        with gd.checked(False):
            assert run(call_of()) is not None
    assert len(launch.calls) == 1


class Watching(TorchDispatchMode):
    """Sees what is dispatched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator() -> None:
    call, launch = call_of(), kept(call_of())
    with Watching():
        assert run(call) is None
    assert not launch.calls


def test_a_dispatch_mode_sees_every_call() -> None:
    call = call_of()
    with Watching():
        kept(call)
        assert run(call) is None


def test_looks_of_one_key_are_forgotten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST_ALIKE", 3)
    for room in range(5):
        kept(call_of(a=nans(2, 1, 2 + room, dtype=torch.bfloat16)[..., :2]))
    assert sum(map(len, plans._PLANS.values())) <= 3


def test_all_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST_KINDS", 3)
    calls = [call_of(scale=float(i)) for i in range(5)]
    launches = [kept(call) for call in calls]
    assert [run(call) is not None for call in calls] == [False, False, False, True, True]
    assert [len(launch.calls) for launch in launches] == [0, 0, 0, 1, 1]


# --- through the operators --------------------------------------------------------------------------------------------


def given() -> Inputs:
    return recurrent_inputs(2, h=1, hv=2, head_k=32, head_v=32)


def test_the_operator_runs_the_plan() -> None:
    launch, inputs = kept(call_of()), given()
    output, state = gd.gated_delta_rule_decode_pretranspose(**inputs)
    assert launch.calls == [pointers(call_of(**inputs), output)]
    assert state is inputs["state"]


def test_a_traced_call_is_an_operator() -> None:
    launch, inputs = kept(call_of()), given()
    traced = {name: x.clone() for name, x in inputs.items()}
    torch.compiler.reset()
    compiled = torch.compile(gd.gated_delta_rule_decode_pretranspose, fullgraph=True, backend="eager")
    output, state = compiled(**traced)
    assert not launch.calls
    assert_recurrent(inputs, output, state)


def test_a_cpu_call_is_not_remembered() -> None:
    gd.gated_delta_rule_decode_pretranspose(**given())
    assert not plans._PLANS


BAD: dict[str, list[Any]] = {
    **{name: [None, 3, "x", [1.0]] for name in ("q", "k", "v", "A_log", "a", "dt_bias", "b")},
    "state": [3, "x", [1.0]],
    "scale": ["x", [1.0], {}, torch.ones(3), float("nan")],
    "use_qk_l2norm": [None, [True], {}],
    "allow_neg_eigval": [None, [True], {}],
    "backend": [None, ["cpu"], {}, "tpu"],
    "null_slot": [[0], {}, "x", 0],
    "output": [3, [1.0], "x"],
    "disable_state_update": [None, [False]],
    "initial_state_indices": [[0, 1], 3, torch.arange(2)],
    "output_state_indices": [[0, 1], 3, torch.arange(2)],
    "intermediate_states_buffer": [[0, 1], 3, torch.arange(2)],
}


CASES = [(name, value) for name, values in BAD.items() for value in values]
CASES += [("use_qk_l2norm", 1), ("allow_neg_eigval", 0), ("scale", True)]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_bad_arguments_reach_validation(name: str, value: Any) -> None:
    full, inputs = full_call(), given()
    launches = [kept(full), kept(call_of()), *(kept(call_of(**{x: getattr(full, x)})) for x in ("output", "snapshots"))]
    with pytest.raises(ArgumentError):
        gd.gated_delta_rule_decode_pretranspose(**{**inputs, name: value})
    assert not any(x.calls for x in launches)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def forbid_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(*_: object, **__: object) -> None:
        raise AssertionError("this call is judged again")

    monkeypatch.setattr(operators, "recurrent", judged)


def on_gpu(batch: int, tokens: int = 1, **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same call each time, on new tensors."""
    inputs = recurrent_inputs(batch, tokens, h=2, hv=4, head_k=128, head_v=128, state_dtype=torch.bfloat16)

    def run() -> tuple[Tensor, Tensor]:
        fresh = {name: x.clone() for name, x in to_device({**inputs, **options}, DEVICE).items()}
        return gd.gated_delta_rule_decode_pretranspose(**fresh)

    return run


@gpu
@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize("options", [{}, {"output": nans(3, 1, 4, 128)}])
def test_the_second_call_is_not_judged(tokens: int, options: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = on_gpu(3, tokens, **{name: x.expand(3, tokens, 4, 128) for name, x in options.items()})
    first = run()
    between = on_gpu(5, tokens)
    expected = between()
    forbid_validation(monkeypatch)
    for again, results in ((run, first), (between, expected), (run, first)):
        assert all(map(same_bits, again(), results))


@gpu
def test_another_look_is_judged_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = recurrent_inputs(3, h=2, hv=4, head_k=128, head_v=128)
    room = torch.empty(inputs["q"].numel() + 1, dtype=torch.bfloat16, device=DEVICE)
    looks = [inputs["q"].to(DEVICE), torch.cat((inputs["q"], inputs["q"]), -1).to(DEVICE)[..., :128]]
    looks.append(room[1:].view(inputs["q"].shape).copy_(inputs["q"]))
    for q in (*looks, *looks):
        assert_recurrent(inputs, *gd.gated_delta_rule_decode_pretranspose(**{**to_device(inputs, DEVICE), "q": q}))
    forbid_validation(monkeypatch)
    for q in looks:
        gd.gated_delta_rule_decode_pretranspose(**{**to_device(inputs, DEVICE), "q": q})
