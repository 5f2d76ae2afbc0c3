"""Tests that a killed training on several processes continues on another number of them with the same losses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "multihost.py"


def run(folder, *options):
    command = [sys.executable, str(SCRIPT), "--dir", str(folder), "--steps", "14", "--checkpoint-every", "5", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def losses(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.recent_compiler  # JAX 0.8.1 rounds a sum over 4 processes differently from one over 2
def test_a_killed_training_continues_on_other_processes_to_the_same_losses(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 processes, 8 devices: loss \d\.\d+ after 14", done.stdout)
    total, each = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) bytes, ([\d,]+) of them", done.stdout).groups()
    )
    assert each < total / 7.9  # each of the 8 devices has a shard of every moment

    killed = run(broken, "--kill-at", "13")
    assert killed.returncode == 1 and "A process died. Run it with --resume" in killed.stderr
    assert sorted(path.name for path in (broken / "checkpoints").iterdir() if path.name.isdigit()) == ["10", "5"]
    resumed = run(broken, "--resume", "--processes", "4")
    assert resumed.returncode == 0, resumed.stderr
    assert "4 processes, 8 devices" in resumed.stdout
    assert losses(broken) == losses(whole)
