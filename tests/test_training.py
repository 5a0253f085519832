"""The script that trains the bundled model, on a text small enough for a test."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from gated_delta.model.network import load_model, weights_facts

ROOT = Path(__file__).parents[1]


def test_training_writes_what_the_model_loads(tmp_path: Path) -> None:
    for kind in ("train", "valid", "test"):
        (tmp_path / f"{kind}.txt").write_text("In the beginning was the word. " * 40)
    out = tmp_path / "weights.safetensors"
    size = ["--steps", "6", "--batch", "4", "--length", "64", "--warmup", "2", "--evaluate-every", "3"]
    command = [sys.executable, str(ROOT / "scripts" / "train_model.py"), str(tmp_path), str(out), *size]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    facts = weights_facts(out)
    assert 0 < float(facts["bits_per_byte_test"]) < 8
    assert "of 6 steps of 4 x 64 bytes, seed 0" in facts["trained_on"]
    stored = load_file(out)
    assert {x.dtype for name, x in stored.items() if name.endswith("A_log")} == {torch.float32}
    assert {x.dtype for name, x in stored.items() if not name.endswith("A_log")} == {torch.bfloat16}
    for name, parameter in load_model(path=out).state_dict().items():
        assert torch.equal(parameter, stored[name].float()), name
