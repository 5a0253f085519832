"""Plans of prefill: which calls go straight to launches that were kept, what these get, and what stays as it was."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gated_delta as gd
from gated_delta import plans
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import ArgumentError, GradientError, ShapeError
from gated_delta.testing.inputs import Inputs, prefill_inputs, to_device, with_state
from gated_delta.validation import operators
from helpers import DEVICE, assert_prefill, nans, same_bits

pytest.importorskip("triton")
module: Any = sys.modules["gated_delta.warmup"]
launch: Any = pytest.importorskip("gated_delta.kernels.triton.launch")
Result = tuple[Tensor, ...]


def inputs() -> Inputs:
    """Of a small call, the same numbers every time."""
    return with_state(prefill_inputs([3, 2], hq=1, hk=1, hv=2, head_k=32, head_v=32, dtype=torch.float32))


def given(**changes: Any) -> Inputs:
    """The call by Triton's kernels, its states apart from each other."""
    return to_device({**inputs(), "output_final_state": True, "backend": "triton", **changes}, DEVICE)


def pooled(**changes: Any) -> Inputs:
    """The same over a pool, in place, as a layer has it."""
    x = given()
    pool = torch.cat((x["initial_state"], x["initial_state"]))
    slots, has = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([True, False])
    x |= to_device({"state_indices": slots, "has_initial_state": has, "null_slot": 1}, DEVICE)
    return {**x, "initial_state": pool, "output_state": pool, "output_final_state": False, **changes}


def run(x: Inputs) -> Result:
    """The call, and everything that it wrote."""
    result = gd.chunk_gated_delta_rule(**x)
    written = [x[name] for name in ("output_state", "state_checkpoints") if x.get(name) is not None]
    return (*(result if isinstance(result, tuple) else (result,)), *(y.clone() for y in written))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One more for every call that is judged."""
    asked: list[object] = []
    real = operators.prefill
    monkeypatch.setattr(operators, "prefill", lambda *args: asked.append(None) or real(*args))
    return asked


CHECKPOINTS = {"checkpoint_every_n_tokens": 64, "state_checkpoints": nans(2, 2, 32, 32)}
CHECKPOINTS |= {"checkpoint_cu_starts": torch.tensor([0, 1, 2])}
FORMS: dict[str, Callable[[], Inputs]] = {
    "states of their own": given,
    "a pool in place": pooled,
    "a pool, its states returned": lambda: pooled(output_state=None, output_final_state=True),
    "into an output": lambda: given(output=nans(5, 2, 32)),
    "from nothing": lambda: given(initial_state=None),
    "no states": lambda: given(initial_state=None, output_final_state=False),
    "with checkpoints": lambda: given(**{k: x.clone() if isinstance(x, Tensor) else x for k, x in CHECKPOINTS.items()}),
    "without gates": lambda: given(g=None, beta=None),
    "activations of 16 bits": lambda: given(**{name: given()[name].bfloat16() for name in "qkv"}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_repeated_call_is_judged_once(name: str, judged: list[object]) -> None:
    results = [run(FORMS[name]()) for _ in range(3)]
    assert len(judged) == 1
    for again in results[1:]:
        assert len({x.data_ptr() for x in (results[0][0], again[0])}) == 2 or name == "into an output"
        assert all(map(same_bits, again, results[0]))
    if name == "states of their own":
        assert_prefill(inputs(), *(x.cpu() for x in results[2]))


def test_a_repeated_call_gives_what_was_given() -> None:
    for _ in range(2):
        x = pooled(output=nans(5, 2, 32).to(DEVICE), output_final_state=True)
        output, final = gd.chunk_gated_delta_rule(**x)
        assert output is x["output"]
        assert final is x["output_state"]


def strided(x: Tensor) -> Tensor:
    return torch.cat((x, x), -1)[..., : x.shape[-1]]


def misaligned(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].as_strided(x.shape, x.stride()).copy_(x)


TENSORS = ("q", "k", "v", "g", "beta", "cu_seqlens", "initial_state", "state_indices", "has_initial_state")
CHANGES: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    **{f"{name} aligned otherwise": lambda x, name=name: {name: misaligned(x[name])} for name in TENSORS},
    **{f"{name} strided": lambda x, name=name: {name: strided(x[name])} for name in ("q", "k", "v", "g", "beta")},
    "the pool strided": lambda x: dict.fromkeys(("initial_state", "output_state"), strided(x["initial_state"])),
    "slots strided": lambda x: {"state_indices": x["state_indices"].repeat_interleave(2)[::2]},
    "wide indices": lambda x: {"cu_seqlens": x["cu_seqlens"].long()},
    "a pool of 16 bits": lambda x: dict.fromkeys(("initial_state", "output_state"), x["initial_state"].bfloat16()),
    "another pool to write": lambda x: {"output_state": x["initial_state"].clone()},
    "fewer sequences": lambda x: {n: x[n][: 2 if n == "cu_seqlens" else 1] for n in TENSORS if n in (
        "cu_seqlens", "state_indices", "has_initial_state")},
    "an output": lambda x: {"output": nans(5, 2, 32).to(DEVICE)},
    "no slots": lambda x: {"state_indices": None, "null_slot": None, **dict.fromkeys(
        ("initial_state", "output_state"), x["initial_state"][:2].clone())},
    "all with a state": lambda x: {"has_initial_state": None},
    "no g": lambda x: {"g": None},
    "no beta": lambda x: {"beta": None},
    "scale": lambda x: {"scale": 0.5},
    "a whole scale": lambda x: {"scale": 1},
    "g_space": lambda x: {"g_space": "linear", "g": x["g"].exp()},
    "norms": lambda x: {"use_qk_l2norm_in_kernel": True},
    "null_slot": lambda x: {"null_slot": 2},
    "max_seqlen": lambda x: {"max_seqlen": 3},
    "deterministic": lambda x: {"deterministic": "batch_invariant"},
    "final states": lambda x: {"output_final_state": True},
    "another backend": lambda x: {"backend": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_another_look_is_judged_anew(name: str, judged: list[object]) -> None:
    def changed() -> Inputs:
        x = pooled()
        return {**x, **CHANGES[name](x)}

    run(pooled())
    first = run(changed())
    assert len(judged) == 2
    plans._PLANS.clear()
    fresh = run(changed())
    assert all(map(same_bits, first, fresh))


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.set_grad_enabled(False), torch.inference_mode, gd.checked],
    ids=["no_grad", "inference", "checked"],
)
def test_another_mode_is_judged_anew(mode: Callable[[], AbstractContextManager[Any]], judged: list[object]) -> None:
    x = pooled()
    run(x)
    with mode():
        run(x)
    assert len(judged) == 2
    run(x)
    assert len(judged) == 2


def test_an_alias_is_no_look(judged: list[object]) -> None:
    """What is known of a call with one tensor twice says nothing about another with two."""
    x = given()
    for _ in range(2):
        run({**x, "k": x["q"]})
    assert len(judged) == 2
    output, state = run(x)
    assert_prefill(inputs(), output.cpu(), state.cpu())


BAD: dict[str, tuple[dict[str, Any], type[ArgumentError]]] = {
    "a shape": ({"beta": torch.ones(5, 3)}, ShapeError),
    "no tensor": ({"k": 3}, ArgumentError),
    "a list": ({"cu_seqlens": [0, 3, 5]}, ArgumentError),
    "no sequences": ({"cu_seqlens": None}, ArgumentError),
    "an option that cannot be kept": ({"scale": [1.0]}, ArgumentError),
    "an option equal to a good one": ({"use_qk_l2norm_in_kernel": 0}, ArgumentError),
    "a flag for a count": ({"max_seqlen": True}, ArgumentError),
    "a backend": ({"backend": "tpu"}, ArgumentError),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_raised_every_time(name: str) -> None:
    change, error = BAD[name]
    run(given(max_seqlen=1 if "max_seqlen" in change else None))
    for _ in range(2):
        with pytest.raises(error):
            run(given(**change))


def test_gradients_are_refused_every_time() -> None:
    x = given(q=given()["q"].requires_grad_())
    for _ in range(2):
        with torch.no_grad():
            run(x)
        with pytest.raises(GradientError, match="q is a tensor that requires grad"):
            run(x)


class Watching(TorchDispatchMode):
    """Notes what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("before", [0, 2])
def test_a_dispatch_mode_sees_every_call(before: int) -> None:
    for _ in range(before):
        run(given())
    with Watching() as watching:
        run(given())
        run(given())
    assert watching.seen.count("gated_delta.prefill.default") == 2
    assert len(plans._PLANS) == (before > 0)


def test_a_traced_call_is_an_operator() -> None:
    """And a plan that was kept before has no part in it."""
    expected = run(given())
    torch.compiler.reset()
    found: list[str] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        found.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = given()
    compiled = torch.compile(gd.chunk_gated_delta_rule, fullgraph=True, backend=backend)
    assert all(map(same_bits, compiled(**x), expected))
    assert found.count("gated_delta.prefill.default") == 1


def test_nothing_of_a_call_is_kept() -> None:
    x = pooled()
    output, _ = run(x)
    held = [weakref.ref(y) for y in (output, *(y for y in x.values() if isinstance(y, Tensor)))]
    assert plans._PLANS
    del x, output
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_warm_up_asks_and_keeps_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls take the plan of Hopper's kernels that they are given, which an earlier call may have had otherwise."""
    config = GatedDeltaNetConfig(hidden_size=64, num_k_heads=1, num_v_heads=2, head_k_dim=32, head_v_dim=32)
    shapes = module._Shapes(config, torch.float32, torch.float32, 1, 0, DEVICE)
    monkeypatch.setattr(module._Shapes, "backend", lambda *_: "triton")
    monkeypatch.setattr(plans, "find", None)
    for pooled_ in (True, False):
        for known in (True, False):
            module._prefill(shapes, 3, pooled=pooled_, known=known)
    assert not plans._PLANS


# --- what Triton's launcher gets --------------------------------------------------------------------------------------


class Launcher:
    """A kernel of a pointer, two descriptors, a pointer and two numbers, as Triton would launch it, without a GPU."""

    GRID, STREAM, DEVICE = (3, 2, 1), 77, 0

    def __init__(self, scratch: int) -> None:
        from triton.backends.nvidia import driver  # noqa: PLC0415 (with Triton only)

        self.got: list[Any] = []
        meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 64], "fp4_padded": False}
        tile = "tensordesc<bf16[64, 64]>"
        signature = {"a": "*fp32", "b": tile, "c": tile, "d": "*fp32", "e": "i32", "f": "constexpr"}
        self.run: Any = object.__new__(driver.CudaLauncher)
        self.run.__dict__ |= {
            "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": scratch,
            "global_scratch_align": 1, "profile_scratch_size": 0, "profile_scratch_align": 1, "gsan_enabled": False,
            "arg_annotations": "annotations", "kernel_signature": "signature",
            "launch": driver.wrap_handle_tensordesc(lambda *args: self.got.append(args), signature, [meta, meta]),
        }  # fmt: skip
        self.function, self.packed_metadata = 1234, (4, 1, 0)
        self.launch_metadata = lambda *args: None

    def base(self, address: int) -> Any:
        x = torch.empty(64, 128, dtype=torch.bfloat16)
        descriptor = launch.TensorDescriptor(x, [64, 128], [128, 1], [64, 64], layout())
        return launch.at(descriptor, launch._Base(address))


def layout() -> Any:
    gl = pytest.importorskip("triton.experimental.gluon.language")
    return gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)


@pytest.mark.parametrize("scratch", [0, 64])
@pytest.mark.parametrize("profiled", [False, True])
def test_the_launcher_gets_what_triton_would_give_it(
    scratch: int, profiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import _allocation, driver  # noqa: PLC0415 (with Triton only)

    def fill(*args: Any) -> tuple[Any, ...]:
        return ("map", str(args))

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr(type(driver), "active", SimpleNamespace(utils=utils))
    monkeypatch.setattr(_allocation, "_allocator", SimpleNamespace(get=lambda: lambda *size: ("scratch", size)))
    for name, value in (("_cuda_getDevice", Launcher.DEVICE), ("_cuda_getCurrentRawStream", Launcher.STREAM)):
        monkeypatch.setattr(torch._C, name, lambda *_, value=value: value, raising=False)
    hook = SimpleNamespace(calls=["a profiler"] * profiled)
    monkeypatch.setattr(launch.knobs, "runtime", SimpleNamespace(launch_enter_hook=hook, launch_exit_hook=hook))
    kernel = Launcher(scratch)
    tiles = [(1, kernel.base(0)), (2, kernel.base(0))]
    start = launch._start(kernel, Launcher.GRID, tiles, (6,), Launcher.DEVICE)
    for addresses in ((16, 32, 48, 64), (16, 32, 48, 80), (16, 32, 96, 64)):
        a, b, c, d = addresses
        start(*addresses, 5)
        hooks = (None, hook, hook) if profiled else (None, None, None)
        whole = (a, kernel.base(b), kernel.base(c), d, 5, 6)
        kernel.run(*Launcher.GRID, Launcher.STREAM, kernel.function, kernel.packed_metadata, *hooks, *whole)
        ours, theirs = kernel.got[-2:]
        flat = [[y for x in args for y in (x if isinstance(x, (list, tuple)) else [x])] for args in (ours, theirs)]
        assert flat[0] == flat[1]
