"""Every Triton kernel compiled for three generations of GPUs, without a GPU, and what the assembly of sm_90 says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import compile_kernels
import gluon_shared
from gated_delta.errors import BackendError
from gated_delta.kernels.triton import launch

Kernels = dict[str, dict[str, Any]]
"""By case and kernel."""

LENGTHS = {
    "V-major fp32": 496,
    "V-major fp32, many": 976,
    "V-major bf16, few": 520,
    "V-major bf16": 976,
    "V-major bf16, many": 680,
    "K-major fp32": 1192,
    "K-major bf16": 1368,
}
"""Instructions of one token by Triton 3.6 for sm_90. A fifth more is a change that should be looked at."""
STEP_REGISTERS = {"step, heads of 96 and 192": 255, "step, 4 tokens": 255, "step, 4 tokens, bf16": 255}
"""What a thread of the fused step may take; 128, so that two programs share a processor, where this says nothing."""
SPILLED = {("step_kernel", None): 16, ("chain", 1): 184, ("chain", 3): 32}
"""Bytes of the stack that kernels may take, by stages; all others none."""

HOPPER_SPILLED: dict[str, tuple[int, dict[str, int]]] = {
    "make": (152, {"16": 1, "24": 1, "36": 4}),
    "make, plain": (112, {"16": 3, "24": 0, "36": 0}),
    "make, fp16": (216, {"16": 22, "24": 7, "36": 3}),
    "make, fp16, plain": (192, {"16": 19, "24": 0, "36": 0}),
    "parts": (8, {}),
    "parts, fp16": (8, {}),
}
"""Bytes of the stack that Hopper's prefill takes by Triton 3.6: in one launch, where 512 threads share the registers of
a processor, and for jobs that are parts; and what a chunk reads from there, by its group's number of wgmmas: 16 has the
one that loads (K K and Q K), 24 the one that inverts (T in two parts for P' and for X) or that keeps a state, 36 one
that keeps and has few registers. More are loops over jobs. All others take none.
"""


def compiled(cache: Path, capabilities: str, *groups: str) -> Kernels:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, compile_kernels.__file__, capabilities, *groups]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Kernels = {}
    for x in json.loads(done.stdout):
        name = f"sm_{x['capability']}, {x['case']}, {x['kernel']}"
        found[f"{name} again" if name in found else name] = x
    return found


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Kernels]:
    return partial(compiled, tmp_path)


def count(kernel: dict[str, Any], name: str, *parts: str) -> int:
    """Instructions of that name with all the parts, such as 128."""
    split = (x.split(".") for x in kernel["instructions"])
    return sum(first == name and set(parts) <= set(rest) for first, *rest in split)


def assert_in_registers(kernels: Kernels) -> None:
    assert kernels
    found = {name: (x["registers"], x["stack"], x["local"]) for name, x in kernels.items()}
    allowed = {name: SPILLED.get((x["kernel"], x["constants"].get("STAGES")), 0) for name, x in kernels.items()}
    assert {name: x for name, x in found.items() if x[0] > 255 or x[1] > allowed[name] or x[2] > 0} == {}
    assert {name: x["wrong_descriptors"] for name, x in kernels.items() if x["wrong_descriptors"]} == {}


def test_decode(build: Callable[..., Kernels]) -> None:
    kernels = build("90", "decode")
    assert_in_registers(kernels)
    assert {x["case"] for x in kernels.values()} == set(LENGTHS)
    for kernel in kernels.values():
        width = 4 if "fp32" in kernel["case"] else 2
        accesses = kernel["constants"]["BV"] * 128 * width // (16 * 32 * kernel["warps"])  # of 16 bytes, by a thread
        assert count(kernel, "STG", "128") == accesses, kernel["case"]
        assert accesses <= count(kernel, "LDG", "128") <= accesses + 2, kernel["case"]  # v may take two
        assert len(kernel["instructions"]) <= 1.2 * LENGTHS[kernel["case"]], kernel["case"]
        wide = [i for i, x in enumerate(kernel["instructions"]) if x.startswith("LDG") and x.endswith("128")]
        first_sum = next(i for i, x in enumerate(kernel["instructions"]) if x.startswith("SHFL"))
        assert max(wide) < first_sum or not kernel["constants"]["EARLY"], kernel["case"]


def test_several_tokens(build: Callable[..., Kernels]) -> None:
    kernels = build("90", "verify", "tokens")
    assert_in_registers(kernels)
    verify = [x for x in kernels.values() if x["kernel"] == "verify"]
    assert [x["case"] for x in verify] == list(compile_kernels.VERIFY)
    for kernel in verify:
        assert count(kernel, "HMMA") > 0, kernel["case"]
        assert count(kernel, "LDGSTS", "128") > 0, kernel["case"]
        assert count(kernel, "LDS") + count(kernel, "LDSM") > 0, kernel["case"]
        writes = kernel["constants"]["UPDATE"] or "slots" in kernel["case"] or "snapshots" in kernel["case"]
        assert (count(kernel, "STG", "EF", "128") > 0) == writes, kernel["case"]


def test_fused_step(build: Callable[..., Kernels]) -> None:
    """The state passes through registers once: read before the first sum, in pieces of 16 bytes, written a token."""
    kernels = build("90", "step")
    assert_in_registers(kernels)
    assert [x["case"] for x in kernels.values()] == list(compile_kernels.STEP)
    for kernel in kernels.values():
        constants, width = kernel["constants"], 2 if kernel["case"].endswith("bf16") else 4
        padded = constants["BLOCKS"] * constants["SEGMENT"] * constants["BV"] * width
        accesses = padded // (16 * constants["LANES"])
        assert kernel["registers"] <= STEP_REGISTERS.get(kernel["case"], 128), kernel["case"]
        assert count(kernel, "STG", "128") <= accesses * constants["MOST"] + 8, kernel["case"]
        assert count(kernel, "LDG", "128") <= accesses + 8, kernel["case"]
        wide = [i for i, x in enumerate(kernel["instructions"]) if x.startswith("LDG") and x.endswith("128")]
        first_sum = next(i for i, x in enumerate(kernel["instructions"]) if x.startswith("SHFL"))
        assert max(wide) < first_sum, kernel["case"]
        assert count(kernel, "ATOMG") == (constants["R"] > 1), kernel["case"]
        assert count(kernel, "SHFL") < 100 * constants["MOST"], kernel["case"]


def test_prefill_and_layer(build: Callable[..., Kernels]) -> None:
    kernels = build("90", "prefill", "layer")
    assert_in_registers(kernels)
    for kernel in kernels.values():
        apart = kernel["case"] == "conv update, columns together"
        assert apart or count(kernel, "LDG", "128") > 0, kernel["case"]
        if kernel["kernel"] in ("prepare", "chain") and kernel["case"] != "fp32":  # that goes token by token
            assert count(kernel, "HMMA") + count(kernel, "HGMMA") > 0, kernel["case"]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    kernels = compiled(tmp_path_factory.mktemp("hopper"), "90", "hopper")
    return {name.removeprefix("sm_90, "): x for name, x in kernels.items()}


def makes(name: str) -> bool:
    return name.startswith("make")


def test_prefill_of_hopper(hopper: Kernels) -> None:
    parts = ("summary", "states_before")
    launched = {case: ("prepare", "chain", *(parts if "parts" in case else ())) for case in compile_kernels.HOPPER}
    launched |= {case: ("chain",) for case in launched if makes(case)}
    launched |= {case: ("prepare", "chain", "prepare again", "chain again") for case in launched if "turns" in case}
    assert hopper.keys() == {f"{case}, {kernel}" for case, kernels in launched.items() for kernel in kernels}
    for name, kernel in hopper.items():
        stack, reloads = HOPPER_SPILLED.get(kernel["case"], (0, {}))
        assert kernel["stack"] <= stack, name
        assert all(kernel["reloads"][loop] <= loads for loop, loads in reloads.items()), (name, kernel["reloads"])
        assert count(kernel, "LDL") == 0 or stack > 0, name
        assert kernel["local"] == 0, name
        assert kernel["wrong_descriptors"] == kernel["overwritten_operands"] == kernel.get("serialised", []) == [], name
        assert kernel["shared"] <= compile_kernels.SHARED[90], name
        rows = kernel["kernel"] == "states_before"  # of states; others bring vectors so, or make them
        copies = kernel["kernel"] != "prepare" and not makes(name)
        assert (count(kernel, "LDGSTS", "128" if rows else "64") > 0) == (count(kernel, "LDGSTS") > 0) == copies, name


def test_nothing_of_hopper_takes_the_place_of_what_a_product_reads(hopper: Kernels) -> None:
    assert {name: x["taken_operands"] for name, x in hopper.items() if x.get("taken_operands")} == {}


def test_chunks_of_hopper_are_prepared_five_to_a_processor(hopper: Kernels) -> None:
    """Four in fp16."""
    for name, kernel in hopper.items():
        if kernel["kernel"] == "prepare":
            programs = 4 if "fp16" in name else 5
            assert -(-kernel["registers"] // 8) * 8 * 128 * programs <= 65536, name  # they are given by eights
            shared = (kernel["shared"] + 1024) * programs  # 1024 go with a program
            assert shared <= compile_kernels.SHARED[90] + 1024, name


def test_processors_of_hopper_have_the_registers_for_a_chain(hopper: Kernels) -> None:
    """For one program, and for two where sequences have one chunk."""
    for name, kernel in hopper.items():
        if kernel["kernel"] in ("chain", "summary"):
            programs, threads = 1 + ("one chunk" in name), 128 * (1 + len(kernel["constants"]["REGISTERS"]))
            assert kernel["registers"] * threads * programs <= 65536, name
            assert (kernel["shared"] + 1024) * programs <= compile_kernels.SHARED[90] + 1024, name


def test_products_of_hopper(hopper: Kernels) -> None:
    """To prepare, K K and Q K, and T in two parts for P' and for X; a group has K S, Q S, P' Y, and X Y. Where another
    group prepares, Q S and P' Y are for 32 tokens at once, and else P' T. The inverse has 20 of a warp's own: two join
    blocks of 8, and of blocks of 16 two make each one above the diagonal, and two more multiply what they come to.
    """
    for name, kernel in hopper.items():
        groups, prepares = kernel["constants"].get("GROUPS", 2), kernel["kernel"] == "prepare" or makes(name)
        narrow, wide = {
            "prepare": (8 + 8 + 2 * 8, 0),
            "chain": (groups * (8 + 8 + 4) if not makes(name) else groups * 8 + 8 + 8 + 2 * 4 + 2 * 8, groups * 4),
            "summary": (groups * 8, groups * 4),
            "states_before": (0, 0),
        }[kernel["kernel"]]
        halves = groups * 2 * (8 + 4) * makes(name) + 2 * 2 * 4 * (kernel["kernel"] == "prepare")
        expected = {"64x64x16": narrow, "64x128x16": wide, "64x32x16": halves}
        assert {shape: count(kernel, "HGMMA", shape) for shape in expected} == expected, name
        assert count(kernel, "HGMMA") == sum(expected.values()), name
        if kernel["kernel"] != "states_before":
            assert count(kernel, "HMMA") == prepares * 20 * (3 if "fp16" in name else 1), name


def test_the_copy_engine_loads_and_stores_on_hopper(hopper: Kernels) -> None:
    """The tiles k, q, X and P', and one of v for a group; without outputs no q and no P'. Where X and P' are made, k
    and q of the first chunk, and of the next one. To prepare, k and q, and X and P' are stored.
    """
    for name, kernel in hopper.items():
        chain = 4 + kernel["constants"].get("GROUPS", 2)
        tiles = {"chain": chain, "summary": 2 + 2, "prepare": 2}.get(kernel["kernel"], 0)
        assert count(kernel, "UTMALDG", "2D") == tiles, name
        assert count(kernel, "UTMASTG", "2D") == 2 * (kernel["kernel"] == "prepare"), name


def test_other_generations(build: Callable[..., Kernels]) -> None:
    kernels = build("80,100")
    known = {"tokens", "verify", "_prefill_kernel", "_update_kernel", "_norm_kernel", "_gates_kernel", "step_kernel"}
    for capability in (80, 100):
        own = [x for x in kernels.values() if x["capability"] == capability]
        assert {x["case"] for x in own} == compile_kernels.ONE_OF_EACH
        assert {x["kernel"] for x in own} >= known
        assert all(x["shared"] <= compile_kernels.SHARED[capability] for x in own)


def test_a_descriptor_made_from_another_register_is_found() -> None:
    before = ["S2UR UR6, SR_CTAID.X", "UMOV UR9, URZ", "UIADD3 UR10, UP0, UR6, 0x20, URZ"]
    wrong = "UIADD3.X UR11, UR6, -0x3ffffff0, URZ, UP0, !UPT"
    assert compile_kernels.wrong_descriptors([*before, wrong]) == [f"{wrong}, after {before[0]}"]
    assert compile_kernels.wrong_descriptors([*before, wrong.replace("UR6", "UR9")]) == []
    assert compile_kernels.wrong_descriptors([*before, "UIADD3.64 UR8, UR6, 0x2, URZ", wrong.replace("UR6", "UR9")])


ISSUED = """
    %sQ = ttg.local_alloc {allocation.offset = 1024 : i32} : () -> !ttg.memdesc<2x8x64xbf16, #shared, #smem, mutable>
    %0 = ttg.memdesc_index %sQ[%c0] : !ttg.memdesc<2x8x64xbf16, #shared> -> !ttg.memdesc<8x64xbf16, #shared>
    %z = ttng.warp_group_dot %1, %0, %cst, %false {isAsync = true} : tensor<64x64xbf16> * !ttg.memdesc<8x64xbf16>
"""
WAITED = "    %9:2 = ttng.warp_group_dot_wait %z, %y {pendings = 0 : i32} : tensor<64x64xf32>, tensor<64x64xf32>\n"


@pytest.mark.parametrize(("offset", "is_taken"), [(0, False), (1024, True), (3071, True), (3072, False)])
@pytest.mark.parametrize("operation", ["ttg.convert_layout %x", "ttg.local_alloc"])
def test_memory_given_away_while_a_product_reads_it_is_found(operation: str, offset: int, is_taken: bool) -> None:
    step = f"    %2 = {operation} {{allocation.offset = {offset} : i32}} : () -> !ttg.memdesc<64xf32, #shared>\n"
    found = [f"{operation.split(maxsplit=1)[0]} at {offset}"] if is_taken else []
    assert gluon_shared.taken_operands(ISSUED + step + WAITED) == found
    assert gluon_shared.taken_operands(ISSUED + WAITED.replace("= 0", "= 1") + step) == found
    assert gluon_shared.taken_operands(ISSUED + WAITED + step) == []


SPECIALIZED = """
    ttg.warp_specialize(%rest, %sQ) attributes {allocation.offset = 4096 : i32}
    partition0(%arg8: i32 loc(#loc), %arg9: !ttg.memdesc<2x8x64xbf16, #shared, #smem, mutable> loc(#loc)) num_warps(4) {
"""


@pytest.mark.parametrize(("offset", "is_taken"), [(0, False), (1024, True), (3072, False)])
def test_memory_that_a_partition_took_over_is_known_to_it(offset: int, is_taken: bool) -> None:
    allocated, *product = ISSUED.strip("\n").splitlines()
    inside = "\n".join(product).replace("%sQ", "%arg9")
    step = f"    %2 = ttg.convert_layout %x {{allocation.offset = {offset} : i32}} : tensor<64xf32>\n"
    text = f"{allocated}{SPECIALIZED}{inside}\n{step}{WAITED}"
    assert gluon_shared.taken_operands(text) == [f"ttg.convert_layout at {offset}"] * is_taken
    assert gluon_shared.taken_operands(text.replace("%arg9[", "%sQ[")) == []


def sass(*steps: str) -> str:
    return "\n".join(
        step if step.startswith(".L") else f"        /*{i:04x}*/  {step} ;" for i, step in enumerate(steps)
    )


PRODUCT = "HGMMA.64x64x16.F32.BF16 R88, R32, gdesc[UR16], RZ, !UPT, gsb0"
SECOND = PRODUCT.replace("R32", "R40")
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    "step",
    [
        "MOV R33, R2",
        "@!P0 MOV R35, R2",
        "LDS.128 R32, [R2]",
        "IMAD.WIDE R34, R2, R3, R4",
        "SHFL.BFLY PT, R32, R2, R3, R4",
    ],
)
def test_an_operand_overwritten_while_a_product_reads_it_is_found(step: str) -> None:
    found = [step.removeprefix("@!P0 ")]
    assert compile_kernels.overwritten_operands(sass(PRODUCT, step, WAIT)) == found
    assert compile_kernels.overwritten_operands(sass(PRODUCT, WAIT, step)) == []
    assert compile_kernels.overwritten_operands(sass(PRODUCT, SECOND, WAIT.replace("x0", "x1"), step)) == []
    assert compile_kernels.overwritten_operands(sass(SECOND, PRODUCT, WAIT.replace("x0", "x1"), step)) == found
    assert compile_kernels.overwritten_operands(sass(".L_x_1:", step, PRODUCT, "BRA `(.L_x_1)", WAIT)) == found
    assert compile_kernels.overwritten_operands(sass(".L_x_1:", step, PRODUCT, WAIT, "BRA `(.L_x_1)")) == []


def test_what_loops_read_from_the_stack() -> None:
    inner = (".L_x_2:", PRODUCT, "LDL R2, [R1]", "@P0 BRA `(.L_x_2)")
    code = sass(
        "LDL R2, [R1]", ".L_x_1:", "LDL.64 R4, [R1]", *inner, PRODUCT, "BRA `(.L_x_1)", "BRA `(.L_x_3)", ".L_x_3:"
    )
    assert compile_kernels.reloads(code) == {1: 1, 2: 2}


@pytest.mark.parametrize(
    "step",
    ["STS [R32], R33", "ISETP.GE.AND P0, PT, R33, R2, PT", "MOV R36, R32", "STG.E.64 desc[UR4][R32.64], R34", SECOND],
)
def test_an_operand_that_is_read_again_is_none(step: str) -> None:
    assert compile_kernels.overwritten_operands(sass(PRODUCT, step, WAIT)) == []


def test_the_newer_assembler_is_used_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia, versions = launch.knobs.nvidia, []
    monkeypatch.setattr(launch, "_version", lambda tool: (12, 8) if tool.path == nvidia.ptxas.path else (13, 1))
    default = nvidia.ptxas.path
    for capability in ((8, 0), (9, 0), (10, 0)):
        with launch.newest_assembler(capability):
            versions.append(nvidia.ptxas.path)
    assert versions == [default, nvidia.ptxas_blackwell.path, default]
    assert nvidia.ptxas.path == default


def test_an_assembler_with_the_fault_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_version", lambda tool: (12, 8))
    with (
        pytest.raises(BackendError, match=r"triton: ptxas is .* of version 12\.8; it must be 12\.9 or later on Hopper"),
        launch.newest_assembler((9, 0)),
    ):
        pass
