"""What a run was made on: device, driver, versions, commit, and the clocks while it ran."""

from __future__ import annotations

import datetime
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

SAMPLE_MS = 500


def facts(device: str) -> dict[str, str]:
    """Columns that all rows of a run share."""
    folder = str(Path(__file__).parent)
    commit = _said("git", "-C", folder, "rev-parse", "--short=10", "HEAD")
    changed = _said("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "triton": version("triton") if importlib.util.find_spec("triton") else "",
        "commit": commit + ("+" if commit and changed else ""),
    }
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["driver"] = _said(*_ask("driver_version"))
    return found


def _said(*command: str) -> str:
    """What a command prints, "" if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def _ask(what: str) -> list[str]:
    """The command that tells ``what`` about the GPU that torch uses."""
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    return ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]


@contextmanager
def clocks(device: str) -> Iterator[Callable[[], dict[str, float]]]:
    """A function that tells ``sm_mhz`` and ``watts`` as the driver's own tool has read them at most half a second ago;
    nothing where there is no such tool.
    """
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield dict
        return
    command = [*_ask("clocks.sm,power.draw"), f"--loop-ms={SAMPLE_MS}"]
    with NamedTemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL) as process:
        try:
            yield lambda: latest(Path(log.name).read_text())
        finally:
            process.kill()


def latest(log: str) -> dict[str, float]:
    """The last whole line of such as ``1980, 312.45``; a value that is no number is left out."""
    line = log.rpartition("\n")[0].rpartition("\n")[2]
    texts = zip(("sm_mhz", "watts"), line.split(","), strict=False)
    return {name: float(text) for name, text in texts if re.fullmatch(r" *\d+(\.\d+)? *", text)}
