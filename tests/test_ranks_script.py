"""The script that measures several GPUs, on two processes of a CPU."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_script_runs_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "ranks.csv"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "measure_ranks.py"),
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "0 results over their budget" in done.stdout
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    judged = [row for row in rows if row["error"]]
    assert all(0 < float(row["error"]) <= float(row["budget"]) < 0.05 for row in judged)
    found = Counter((row["part"], row["ranks"], bool(row["us"]), bool(row["error"])) for row in rows)
    assert found == {
        ("tensor", "1", False, True): 1, ("tensor", "1", True, False): 3,
        ("tensor", "2", False, True): 1, ("tensor", "2", True, False): 3,
        ("context", "2", False, True): 2, ("context", "1", True, False): 1, ("context", "2", True, True): 3,
    }  # fmt: skip
    assert all(float(row["us"]) > 0 and float(row["speedup"]) > 0 for row in rows if row["us"])
    assert all(row["torch"] and row["date"] and "--tiny" in row["command"] for row in rows)
