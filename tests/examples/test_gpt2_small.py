"""Tests that the comparison for a GPU runs, on CPU with a very small model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_all_ways_learn_the_same_and_the_results_are_written(tmp_path):
    command = [sys.executable, str(EXAMPLES / "gpt2_small.py"), "--tiny", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpt2_small.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["optax.adamw", "adamw8bit", "split_weights adamw8bit"]
    for row in rows:
        assert row["losses"][-1] < 0.7 * row["losses"][0]
        assert row["step_ms"] > 0 and row["compiled_bytes"] > row["parameter_bytes"] + row["state_bytes"]
        assert row["validation"]["30"] == pytest.approx(rows[0]["validation"]["30"], rel=0.005)
        assert f"| {row['way']} | {row['validation']['30']:.4f} |" in done.stdout
    assert rows[2]["parameter_bytes"] * 2 == rows[0]["parameter_bytes"]
    assert (tmp_path / "gpt2_small.png").stat().st_size > 10_000
