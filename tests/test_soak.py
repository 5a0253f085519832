"""The script of random calls: it is content with ours, and finds what is wrong and what leaks."""

from __future__ import annotations

import pytest
import torch

import gated_delta as gd
import soak

CPU = torch.device("cpu")


def test_soak_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.soak(40, CPU)
    assert "40 calls on cpu: 0 wrong; memory grew by " in capsys.readouterr().out
    monkeypatch.setattr(gd, "rms_norm_gated", lambda x, z, weight, eps: x)
    monkeypatch.setattr(gd, "causal_conv1d", lambda *args, **options: 1 / 0)
    assert not soak.soak(40, CPU)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("call ")]
    assert {fault.split(", ")[1].split()[0] for fault in told} == {"norm", "conv"}
    assert any("ZeroDivisionError" in fault for fault in told)


def test_soak_finds_a_leak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    grown = iter((100.0, 1000.0))
    monkeypatch.setattr(soak, "memory_mib", lambda device: next(grown))
    assert not soak.soak(3, CPU)
    assert "3 calls on cpu: 0 wrong; memory grew by 900.0 MiB (up to 512 are no leak)" in capsys.readouterr().out
