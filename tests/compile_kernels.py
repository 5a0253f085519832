"""Compile the Triton kernels as the operators launch them, without a GPU, and print what became of them as JSON.

    python compile_kernels.py 90,100 decode verify

It runs in a process of its own, since the suite's interprets the kernels where there is no GPU. The operators get
tensors without memory, and what they would have launched is compiled for the given generation of GPUs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from gated_delta import library
from gluon_shared import placed, taken_operands

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a program may take, by generation."""
BF16, FP16, FP32, INT = torch.bfloat16, torch.float16, torch.float32, torch.int32
LAUNCHES: Any = import_module("gated_delta.kernels.triton.launch")
OPERATORS: Any = import_module("gated_delta.kernels.triton")
PREFILLS: Any = import_module("gated_delta.kernels.triton.prefill")
HOPPERS: Any = import_module("gated_delta.kernels.gluon.prefill")


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recurrent(
    rows: int, *, state: torch.dtype, steps: int = 1, v_first: bool = True, pooled: bool = True, update: bool = True,
    slots: bool = False, snapshots: bool = False, dtype: torch.dtype = BF16,
) -> None:  # fmt: skip
    """16 heads of q and k, 32 of v, K = V = 128."""
    q, v = empty(rows, steps, 16, 128, dtype=dtype), empty(rows, steps, 32, 128, dtype=dtype)
    a, gate = empty(rows, steps, 32), empty(32, dtype=FP32)
    read, after = empty(rows, dtype=INT) if pooled else None, empty(rows, steps, dtype=INT) if slots else None
    buffer = empty(rows, steps, 32, 128, 128, dtype=state) if snapshots else None
    given = library.Recurrent(
        q, q, v, empty(rows + 1, 32, 128, 128, dtype=state), v_first, gate, a, gate, a, 128**-0.5, True, False, read,
        -1, update, None, after, buffer, torch.empty_like(v), True,
    )  # fmt: skip
    OPERATORS.bound_recurrent(given)


def prefill(sequences: int, *, dtype: torch.dtype = BF16, head_k: int = 128, head_v: int = 128) -> None:
    """Eight thousand tokens over a pool of fp32 states, with checkpoints."""
    q, v = empty(8192, 16, head_k, dtype=dtype), empty(8192, 32, head_v, dtype=dtype)
    gate, pool = empty(8192, 32, dtype=FP32), empty(sequences, 32, head_v, head_k, dtype=FP32)
    starts = empty(sequences + 1, dtype=INT)
    slots = empty(sequences, dtype=INT)
    given = library.Prefill(
        q, q, v, gate, gate, 128**-0.5, starts, None, slots.bool(), slots, -1, True, True, True,
        torch.empty_like(v), True, pool, empty(64, 32, head_v, head_k, dtype=FP32), starts, 64, False,
    )  # fmt: skip
    OPERATORS.bound_prefill(given)


def hopper(
    groups: int, part: int = 0, *, dtype: torch.dtype = BF16, norm: bool = True, log: bool = True,
    checkpoints: bool = True,
) -> None:  # fmt: skip
    """The same by the kernels for Hopper, and by their other plans: so many groups (the third prepares; 0 is one, for
    parts of one sequence in turn), parts of so many tokens.
    """
    HOPPERS.plan = lambda *_: HOPPERS.Plan(min(groups, 2) or 1, part, groups == 3, groups == 0)
    count = 8 if groups else 1
    q, v, gate = empty(8192, 16, 128, dtype=dtype), empty(8192, 32, 128, dtype=dtype), empty(8192, 32, dtype=FP32)
    starts, slots = empty(count + 1, dtype=INT), empty(count, dtype=INT)
    pool = empty(64, 32, 128, 128, dtype=FP32)
    kept = (pool, starts, 64) if checkpoints else (None, None, 0)
    given = library.Prefill(
        q, q, v, gate, gate, 128**-0.5, starts, None, slots.bool(), slots, -1, True, norm, log, torch.empty_like(v),
        True, pool, *kept, False,
    )  # fmt: skip
    HOPPERS.bound_prefill(given)


def conv(head_k: int = 0) -> None:
    """Channels flat, or in groups of 16 key heads as interleaved projections have them."""
    x, weight, states = empty(4096, 8192), empty(8192, 4), empty(65, 3, 8192).transpose(1, 2)
    y, starts, slots = torch.empty_like(x), empty(65, dtype=INT), empty(64, dtype=INT)
    x = empty(4096, 16, 768)[..., :512] if head_k else x
    rows = starts, slots, slots.bool()
    OPERATORS.bound_causal_conv1d(library.CausalConv1d(x, weight, None, states, *rows, True, -1, head_k, y))


def gates() -> None:
    ba, gate, made = empty(4096, 16, 4), empty(32, dtype=FP32), empty(4096, 32, dtype=FP32)
    OPERATORS.bound_gates(library.Gates(gate, ba[..., 2:], gate, ba[..., :2], False, made, made))


def conv_update(states: Tensor) -> None:
    x, y, slots = empty(64, 8192), empty(64, 8192), empty(64, dtype=INT)
    OPERATORS.bound_causal_conv1d_update(
        library.CausalConv1dUpdate(x, states, empty(8192, 4), None, True, slots, None, None, -1, y)
    )


def step(
    rows: int, *, state: torch.dtype = FP32, ratio: int = 2, head_k: int = 128, head_v: int = 128, most: int = 1,
    layout: str = "SD", dtype: torch.dtype = BF16,
) -> None:  # fmt: skip
    """16 key heads with the projections' rows grouped by them; with ``most`` above 1 a speculative step."""
    tokens, wide = rows * most, ratio * head_v
    grouped = empty(tokens, 16, 2 * head_k + 2 * wide, dtype=dtype)
    q, k, v, z = grouped.split((head_k, head_k, wide, wide), dim=-1)
    v, z = (x.unflatten(-1, (ratio, head_v)) for x in (v, z))
    b, a = empty(tokens, 16, 2 * ratio, dtype=dtype).split(ratio, dim=-1)
    channels, columns, heads = 16 * (2 * head_k + wide), 2 + most, 16 * ratio
    conv = empty(65, columns, channels, dtype=dtype).transpose(1, 2) if layout == "SD" else empty(65, channels, columns)
    slots, starts, accepted = empty(rows, dtype=INT), None, None
    if most > 1:
        slots, starts, accepted = empty(rows, most, dtype=INT), empty(rows + 1, dtype=INT), empty(rows, dtype=INT)
    gate = empty(heads, dtype=FP32)
    given = library.GatedDeltaNetStep(
        q, k, v, z, b, a, conv, empty(channels, 4, dtype=dtype), empty(65, heads, head_v, head_k, dtype=state), gate,
        gate, empty(head_v), head_k**-0.5, 1e-6, "silu", False, slots, starts, accepted, empty(65, 16, dtype=INT), -1,
        empty(tokens, heads, head_v, dtype=dtype),
    )  # fmt: skip
    OPERATORS.bound_gated_delta_net_step(given)


def norm() -> None:
    x = empty(4096, 32, 128)
    OPERATORS.bound_rms_norm_gated(library.RmsNormGated(x, x, empty(128), 1e-6, "silu", x))


DECODE: dict[str, Callable[[], None]] = {
    "V-major fp32": lambda: recurrent(64, state=FP32),
    "V-major fp32, many": lambda: recurrent(256, state=FP32),
    "V-major bf16, few": lambda: recurrent(2, state=BF16),
    "V-major bf16": lambda: recurrent(32, state=BF16),
    "V-major bf16, many": lambda: recurrent(512, state=BF16),
    "K-major fp32": lambda: recurrent(16, state=FP32, v_first=False, pooled=False),
    "K-major bf16": lambda: recurrent(32, state=BF16, v_first=False, pooled=False),
}
"""One token: every entry of the table of tiles."""
VERIFY: dict[str, Callable[[], None]] = {
    "2 outputs": lambda: recurrent(2, steps=2, state=BF16, update=False),
    "4 outputs": lambda: recurrent(32, steps=4, state=BF16, update=False),
    "4 outputs, fp32": lambda: recurrent(32, steps=4, state=FP32, update=False),
    "4 outputs, fp32, many": lambda: recurrent(256, steps=4, state=FP32, update=False),
    "4 tokens": lambda: recurrent(32, steps=4, state=BF16),
    "4 slots": lambda: recurrent(32, steps=4, state=BF16, update=False, slots=True),
    "9 outputs": lambda: recurrent(32, steps=9, state=BF16, update=False),
    "3 snapshots": lambda: recurrent(32, steps=3, state=BF16, snapshots=True),
}
TOKENS: dict[str, Callable[[], None]] = {
    "4 snapshots, fp32": lambda: recurrent(32, steps=4, state=FP32, snapshots=True),
    "17 tokens": lambda: recurrent(32, steps=17, state=BF16, slots=True),
}
PREFILL: dict[str, Callable[[], None]] = {
    "many states": lambda: prefill(64),
    "fp32": lambda: prefill(64, dtype=FP32),
    "fp16": lambda: prefill(64, dtype=torch.float16),
    "one sequence": lambda: prefill(1),
    "single chunks": lambda: prefill(128),
    "heads of 64": lambda: prefill(64, head_k=64, head_v=64),
    "heads of 96 and 192": lambda: prefill(64, head_k=96, head_v=192),
    "heads of 256": lambda: prefill(64, head_k=256, head_v=256),
}
HOPPER: dict[str, Callable[[], None]] = {
    "bf16": lambda: hopper(2),
    "fp16": lambda: hopper(2, dtype=FP16),
    "without norm": lambda: hopper(2, norm=False),
    "linear gates": lambda: hopper(2, log=False, checkpoints=False),
    "fp16, plain": lambda: hopper(2, dtype=FP16, norm=False, log=False, checkpoints=False),
    "one group": lambda: hopper(1),
    "one group, plain": lambda: hopper(1, norm=False, log=False, checkpoints=False),
    "one group, fp16": lambda: hopper(1, dtype=FP16),
    "make": lambda: hopper(3),
    "make, plain": lambda: hopper(3, norm=False, log=False, checkpoints=False),
    "make, fp16": lambda: hopper(3, dtype=FP16),
    "make, fp16, plain": lambda: hopper(3, dtype=FP16, norm=False, log=False, checkpoints=False),
    "parts": lambda: hopper(2, 1024),
    "parts, fp16": lambda: hopper(2, 1024, dtype=FP16, checkpoints=False),
    "parts, one group": lambda: hopper(1, 1024),
    "parts, one group, fp16": lambda: hopper(1, 1024, dtype=FP16, checkpoints=False),
    "turns": lambda: hopper(0, 4096),
    "turns, fp16": lambda: hopper(0, 4096, dtype=FP16, checkpoints=False),
}
LAYER: dict[str, Callable[[], None]] = {
    "conv": conv,
    "conv in groups": lambda: conv(128),
    "conv update": lambda: conv_update(empty(65, 3, 8192).transpose(1, 2)),
    "conv update, columns together": lambda: conv_update(empty(65, 8192, 3)),
    "norm": norm,
    "gates": gates,
}
STEP: dict[str, Callable[[], None]] = {
    "step, fp32": lambda: step(64),
    "step, bf16": lambda: step(64, state=BF16),
    "step, no siblings": lambda: step(64, ratio=1),
    "step, columns together": lambda: step(64, layout="DS"),
    "step, heads of 96 and 192": lambda: step(64, ratio=1, head_k=96, head_v=192),
    "step, 4 tokens": lambda: step(64, most=4),
    "step, 4 tokens, bf16": lambda: step(64, most=4, state=BF16),
    "step, all fp32": lambda: step(64, dtype=FP32),
}
GROUPS = {
    "step": STEP, "decode": DECODE, "verify": VERIFY, "tokens": TOKENS, "prefill": PREFILL, "hopper": HOPPER,
    "layer": LAYER,
}  # fmt: skip
ONE_OF_EACH = {
    "V-major bf16", "K-major fp32", "4 tokens", "many states", "fp32", "conv", "conv update", "norm", "gates",
    "step, fp32",
}  # fmt: skip
"""Every kernel, for the generations that need only compile."""


def recorded(case: Callable[[], None], shared: int) -> list[Launch]:
    """What a case would launch."""
    found: list[Launch] = []

    def launch(
        kernel: Any, grid: object, args: Any, constants: Any, *, warps: int, stages: int = 1, registers: Any = None,
        **options: object,
    ) -> None:  # fmt: skip
        found.append(Launch(kernel, tuple(args), dict(constants), warps, stages, registers))

    LAUNCHES.bind = launch
    PREFILLS._limits = lambda device: (shared, 132)
    case()
    return found


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel, specialised as a launch with these arguments would."""
    kernel, backend = launch.kernel, make_backend(target)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
    bind: Any = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, traits, rest = bind(*launch.args, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, rest, bound, traits, None)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    with LAUNCHES.newest_assembler(divmod(int(target.arch), 10)):
        return triton.compile(source, target=target, options=options)


def figures(binary: bytes) -> dict[str, Any]:
    """Registers, spills, instructions, and what the assembler is known to get wrong."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = (int(x) for x in re.findall(r"(?:REG|STACK|LOCAL):(\d+)", usage)[:3])
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?) *;", code)
    names = [line.split()[0] for line in lines]
    usage = {"registers": registers, "stack": stack, "local": local}
    faults = {"wrong_descriptors": wrong_descriptors(lines), "overwritten_operands": overwritten_operands(code)}
    return {**usage, **faults, "instructions": names, "reloads": reloads(code)}


def reloads(code: str) -> dict[int, int]:
    """What loops read from the stack: by their number of wgmmas, of the shortest loop that has so many."""
    steps, labels = steps_of(code)
    found: dict[int, tuple[int, int]] = {}
    for i, step in enumerate(steps):
        back = re.match(r"BRA\b.*`\((\.L_x_\d+)\)", step)
        if back and labels.get(back[1], i + 1) <= i:
            loop = steps[labels[back[1]] : i + 1]
            read, products = (sum(x.startswith(name) for x in loop) for name in ("LDL", "HGMMA"))
            found[products] = min(found.get(products, (len(steps), 0)), (len(loop), read))
    return {products: read for products, (_, read) in found.items() if products}


def steps_of(code: str) -> tuple[list[str], dict[str, int]]:
    """Instructions without their predicates, and which of them a label stands before."""
    steps: list[str] = []
    labels: dict[str, int] = {}
    for label, step in re.findall(r"(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?) *;", code):
        labels |= {label: len(steps)} if label else {}
        steps += [step] if step else []
    return steps, labels


def wrong_descriptors(lines: list[str]) -> list[str]:
    """Where the upper half of a wgmma descriptor, a constant above 2^29, is added to what is not a cleared register."""
    written: dict[str, str] = {}
    found: list[str] = []
    for line in lines:
        upper = re.match(r"UIADD3\.X \w+, (UR\d+), -?0x[2-9a-f]\w{7}, URZ", line)
        if upper and not written.get(upper[1], "").startswith(f"UMOV {upper[1]}, URZ"):
            found.append(f"{line}, after {written.get(upper[1])}")
        target = re.match(r"(?!HGMMA|ST)\S+ (?:UP\d, )?(UR)(\d+)", line)
        if target:
            wide = ".64" in line.split()[0] or ".WIDE" in line.split()[0]
            written |= {f"UR{int(target[2]) + i}": line for i in range(1 + wide)}
    return found


def overwritten_operands(code: str) -> list[str]:
    """What writes a register that a running wgmma reads as its left operand, which ptxas before 13.3 is known to do.

    Along the text, loops twice: a wgmma runs until ``WARPGROUP.DEPBAR`` leaves fewer groups (``gsb0`` ends one) than
    came after it.
    """
    steps, labels = steps_of(code)
    order: list[str] = []
    for i, step in enumerate(steps):
        order.append(step)
        back = re.match(r"BRA\b.*`\((\.L_x_\d+)\)", step)
        order += steps[labels[back[1]] : i + 1] if back and back[1] in labels else []
    found: list[str] = []
    running: list[set[int]] = [set()]
    for step in order:
        product = re.match(r"[A-Z]GMMA\S* R\d+, (?:R(\d+)|gdesc)", step)
        wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", step)
        if wait:
            groups = running[:-1]
            running = [*groups[len(groups) - min(len(groups), int(wait[1], 16)) :], running[-1]]
        elif product:
            running[-1] |= {int(product[1]) + i for i in range(4)} if product[1] else set()
            running += [set()] if "gsb0" in step else []
        elif written(step) & set().union(*running) and step not in found:
            found.append(step)
    return found


def written(step: str) -> set[int]:
    """Numbers of the registers that an instruction writes."""
    target = re.match(r"(?!\w*SETP|PLOP3|R2P|VOTE|BAR)(\S+) (?:P[0-6T], )?R(\d+)", step)
    if target is None:
        return set()
    parts = target[1].split(".")
    wide = 4 if {"128", "4"} & set(parts) else 2 if {"64", "WIDE", "2"} & set(parts) or parts == ["CS2R"] else 1
    return {int(target[2]) + i for i in range(wide)}


def serialised(ptx: str, capability: int) -> list[str]:
    """What the assembler says of wgmmas that it does not let run side by side."""
    with tempfile.TemporaryDirectory() as folder, LAUNCHES.newest_assembler(divmod(capability, 10)):
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{capability}a", source, "-o", Path(folder, "cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [line for line in said.splitlines() if "wgmma" in line]


def results(capability: int, groups: list[str]) -> Iterator[dict[str, Any]]:
    target = GPUTarget("cuda", capability, 32)
    for group in groups or GROUPS:
        for name, case in GROUPS[group].items():
            if capability != 90 and name not in ONE_OF_EACH:
                continue
            for launch in recorded(case, SHARED[capability]):
                kernel = compiled(launch, target)
                facts = {
                    "capability": capability,
                    "case": name,
                    "kernel": launch.kernel.__name__,
                    "warps": launch.warps,
                }
                facts |= {"shared": kernel.metadata.shared, "constants": launch.constants}
                if "wgmma" in kernel.asm["ptx"]:
                    facts["serialised"] = serialised(kernel.asm["ptx"], capability)
                    text = placed(kernel.asm["ttgir"], make_backend(target), capability)
                    facts["taken_operands"] = taken_operands(text)
                yield {**facts, **figures(kernel.asm["cubin"])}


if __name__ == "__main__":
    found = (results(int(capability), sys.argv[2:]) for capability in sys.argv[1].split(","))
    json.dump([kernel for kernels in found for kernel in kernels], sys.stdout)
