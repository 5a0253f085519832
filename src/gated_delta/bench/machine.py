"""What a run is made on: device, driver, versions, commit, and the clocks while it goes."""

import datetime
import importlib.util
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from gated_delta.dispatch import OPERATORS, explain
from gated_delta.errors import OptionError
from gated_delta.validation.arguments import Arguments


def pick_device(name: str) -> str:
    """The device to run on: "auto" is a GPU if every operator is served there, else the CPU."""
    Arguments("command line").word("--device", name, ("auto", "cpu", "cuda"), '"auto", "cpu" or "cuda"')
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("command line", "--device", '"cuda"', '"cpu": torch sees no GPU here')
    if name != "auto":
        return name
    served = all(explain(operator, device="cuda").chosen for operator in OPERATORS)
    return "cuda" if torch.cuda.is_available() and served else "cpu"


def facts(device: str) -> dict[str, str]:
    """Columns that all rows of a run share."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit, changed = _said(*git, "rev-parse", "--short=10", "HEAD"), _said(*git, "status", "--porcelain", "-uno")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "driver": _asked("driver_version") if device == "cuda" else "",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "triton": version("triton") if importlib.util.find_spec("triton") else "",
        "commit": commit + ("+" if commit and changed else ""),
    }


def clocks(device: str) -> dict[str, float]:
    """``sm_mhz`` and ``watts`` as the driver's own tool tells them now; what it does not know is left out."""
    texts = _asked("clocks.sm,power.draw").split(",") if device == "cuda" else []
    named = zip(("sm_mhz", "watts"), texts, strict=False)
    return {name: float(text) for name, text in named if re.fullmatch(r" *\d+(\.\d+)? *", text)}


def _asked(what: str) -> str:
    """About the GPU that torch uses."""
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    return _said("nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={what}", "--format=csv,noheader,nounits")


def _said(*command: str) -> str:
    """What a command prints, "" if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
