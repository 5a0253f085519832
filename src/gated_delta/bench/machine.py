"""What a run was made on: device, driver, versions, commit, and the clocks while it ran."""

from __future__ import annotations

import datetime
import importlib.util
import platform
import shutil
import subprocess
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

SAMPLE_MS = 500


def facts(device: str) -> dict[str, str]:
    """Columns that all rows of a run share."""
    gpu = device == "cuda"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "device": torch.cuda.get_device_name() if gpu else cpu,
        "driver": _said("nvidia-smi", *_selected(), "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else "",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "triton": version("triton") if importlib.util.find_spec("triton") else "",
        "commit": commit(),
    }


def commit() -> str:
    """Of the checkout that this package runs from, "+" behind it if files differ from it; "" if it is installed."""
    folder = str(Path(__file__).parent)
    short = _said("git", "-C", folder, "rev-parse", "--short=10", "HEAD")
    changed = _said("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return short + ("+" if short and changed else "")


def _said(*command: str) -> str:
    """What a command prints, "" if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def _selected() -> Sequence[str]:
    """Of several GPUs the one that torch uses."""
    uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
    return ("-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}") if uuid else ()


class Monitor:
    """Clock and power of the GPU, read twice a second by the driver's own tool while a run lasts."""

    def __init__(self, device: str) -> None:
        self._wanted = device == "cuda" and shutil.which("nvidia-smi") is not None
        self._process: subprocess.Popen[str] | None = None
        self._latest: dict[str, Any] = {}

    def __enter__(self) -> Monitor:
        if self._wanted:
            query = ("--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}")
            self._process = subprocess.Popen(
                ["nvidia-smi", *_selected(), *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._latest = sample(line)

    def latest(self) -> dict[str, Any]:
        """``sm_mhz`` and ``watts`` at most half a second old; empty where nothing reports them."""
        return self._latest


def sample(line: str) -> dict[str, Any]:
    """A line of the tool, such as ``1980, 312.45``; what is no number is left out."""
    found = {}
    for name, text in zip(("sm_mhz", "watts"), line.split(","), strict=False):
        try:
            found[name] = float(text)
        except ValueError:
            continue
    return found
