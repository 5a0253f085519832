"""Where the compiler places shared memory: on a CPU, from its own text.

It gives a buffer's place away after the last operation that names it. An asynchronous product names its operands when
it is issued, and reads them until it is waited for. What is placed there meanwhile, another buffer or what
``convert_layout`` needs to move values between warps, is a race that a GPU forgives most of the time.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

from triton._C import libtriton
from triton.backends.nvidia.compiler import get_ptx_version_from_options

OPERATION = re.compile(r"^\s*(?:%(\w+)(?::\d+)? = )?\"?([\w.]+)\"?(.*)")
WIDTHS = {"i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2}


def placed(ttgir: str, backend: Any, capability: int) -> str:
    """The text after shared memory has its places."""
    ir, passes, nvidia = libtriton.ir, libtriton.passes, libtriton.nvidia
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ttgir")
        source.write_text(ttgir)
        module = ir.parse_mlir_module(str(source), context)
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    version = get_ptx_version_from_options(backend.parse_options({}), capability)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, version)
    manager.run(module, "places")
    return str(module)


def taken_operands(text: str) -> list[str]:
    """What is placed where a product may still read, along the text. A partition (``warp_specialize``) has names of its
    own; what it took over from the program is followed by its place among the operands.
    """
    places: dict[str, range] = {}
    taken_over: list[range | None] = []
    running: list[list[range]] = []
    found: list[str] = []
    for line in text.splitlines():
        if re.match(r"\s*partition\d+\(", line):
            own = re.findall(r"%(\w+): ", line)
            places = {name: place for name, place in zip(own, taken_over, strict=True) if place is not None}
            running = []
            continue
        name, operation, rest = (x or "" for x in match.groups()) if (match := OPERATION.match(line)) else ("", "", "")
        offset = re.search(r"allocation\.offset = (\d+)", rest)
        if offset and any(int(offset[1]) in place for product in running for place in product):
            found.append(f"{operation} at {offset[1]}")
        if operation == "ttg.warp_specialize":
            taken_over = [places.get(x) for x in re.findall(r"%(\w+)", rest.split(") attributes")[0])]
        elif operation == "ttg.local_alloc" and offset:
            *shape, kind = re.findall(r"memdesc<([\dx]+x\w+)", rest)[0].split("x")
            size = math.prod(map(int, shape)) * WIDTHS[kind]
            places[name] = range(int(offset[1]), int(offset[1]) + size)
        elif operation.startswith("ttg.memdesc_"):
            root = re.findall(r"%(\w+)", rest)[0]
            if root in places:
                places[name] = places[root]
        elif operation == "ttng.warp_group_dot":
            running.append([places[x] for x in re.findall(r"%(\w+)", rest)[:2] if x in places])
        elif operation == "ttng.warp_group_dot_wait":
            left = int(re.findall(r"pendings = (\d+)", rest)[0])
            running = running[len(running) - left :] if left else []
    return found
