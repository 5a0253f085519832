"""What importing costs and touches, each time in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import gated_delta

_BLOCK_TRITON = "import sys; sys.modules['triton'] = None"
_REPORT = """
import sys
import gated_delta
import torch
loaded = set(sys.modules)
assert all(hasattr(gated_delta, name) for name in gated_delta.__all__)
assert not torch.cuda.is_initialized()
print(*sorted(name for name in loaded if name.startswith("gated_delta.kernels.")))
print(*sorted({"typer", "rich", "safetensors", "matplotlib", "transformers"} & loaded))
x = torch.ones(1, 4)
print(gated_delta.rms_norm_gated(x, x, x[0], 0.0, "sigmoid").tolist()[0][0] == torch.sigmoid(x).tolist()[0][0])
print(*sorted(name for name in set(sys.modules) if name.startswith("gated_delta.kernels.")))
"""


def python(program: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        pytest.param("", {}, id="as it is"),
        pytest.param(_BLOCK_TRITON, {}, id="no triton"),
        pytest.param("", {"CUDA_VISIBLE_DEVICES": ""}, id="no GPU"),
        pytest.param(_BLOCK_TRITON, {"CUDA_VISIBLE_DEVICES": ""}, id="neither"),
    ],
)
def test_import_loads_no_kernel_and_warns_of_nothing(before: str, environment: dict[str, str]) -> None:
    """No kernel and no extra comes in with the package; the kernel that a call needs comes with the call."""
    done = python(before + _REPORT, "-W", "error", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kernels, extras, result, afterwards = done.stdout.splitlines()
    assert (kernels, extras, result) == ("", "", "True")
    assert "gated_delta.kernels.cpu" in afterwards.split()


def test_importing_again() -> None:
    program = """
import importlib
import gated_delta
first = gated_delta.rms_norm_gated
import gated_delta
assert gated_delta.rms_norm_gated is first
assert importlib.reload(gated_delta).rms_norm_gated is first
from gated_delta import *
assert rms_norm_gated is first
"""
    done = python(program, "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names() -> None:
    assert len(set(gated_delta.__all__)) == len(gated_delta.__all__)
    for name in gated_delta.__all__:
        public = getattr(gated_delta, name)
        assert callable(public), name
        assert public.__doc__, name


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_line_says_what_it_misses(missing: str) -> None:
    done = python(f"import sys; sys.modules[{missing!r}] = None\nfrom gated_delta.cli import main")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        'gated-delta: the command line needs more packages: pip install "gated-delta[cli]"'
    ]
