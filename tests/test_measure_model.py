"""The script that measures a whole model, on one small enough for a test."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs Transformers: pip install "gated-delta[hf]"')
SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_model.py"


def test_every_path_is_measured_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--repeats", "1", "--csv", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "728,440 parameters in bf16 on " in done.stdout
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = ("prefill 1 x 80", "prefill 2 x 40", "decode 1 x 6", "decode 3 x 6")
    for kind in kinds:
        found = {row["path"]: row for row in rows if row["case"] == kind}
        assert list(found) in (["torch", "gated-delta"], ["torch", "fla", "gated-delta"])
        for row in found.values():
            rate = int(row["batch"]) * int(row["tokens"]) / float(row["seconds"])
            assert float(row["tokens_per_s"]) == pytest.approx(rate, rel=1e-4)
        ours = found["gated-delta"]
        assert float(ours["speedup"]) == pytest.approx(float(found["torch"]["seconds"]) / float(ours["seconds"]), 1e-3)
        if "prefill" in kind:  # rounded at other places than stock: not the same bits, but the same numbers
            assert 0 < float(ours["agreement"].removeprefix("logits to ")) < 0.2
    assert len(rows) == len(kinds) * len({row["path"] for row in rows})
    assert {row["transformers"] for row in rows} != {""}
    assert rows[0]["command"].endswith(f"--tiny --device cpu --repeats 1 --csv {out}")
