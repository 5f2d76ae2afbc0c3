"""Tests a training that changes the storage of its moments in the middle."""

import argparse as some_module_with_a_text
import json
from pathlib import Path

import pytest

from benchmarks.tried import switch
from benchmarks.tried.quality import Language


@pytest.mark.slow
def test_training_continues_after_a_change_of_storage(tmp_path, capsys):
    size = {"steps": 6, "width": 64, "layers": 1, "vocab": 512, "context": 16, "batch_size": 4, "windows": 8}
    text = (Path(some_module_with_a_text.__file__),)
    task = Language(rates=(1e-3, 1e-2), **size, text=text, cache=tmp_path)
    switch.main(["--seeds", "1"], task)
    table = capsys.readouterr().out
    assert all(f"| {before}, then {after} |" in table for before, after in switch.SWITCHES)
    results = json.loads(json.dumps(switch.measure(task, 2)))
    assert all(len(losses) == 2 for losses in results["losses"].values())
    assert all(
        abs(gap) < 0.02 for before, after in switch.SWITCHES for gap in switch.gaps(results, f"{before}, then {after}")
    )
    assert results["losses"]["fp32, then root with moments reset"] != results["losses"]["fp32, then root"]
