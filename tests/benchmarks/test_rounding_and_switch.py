"""The small experiments beside the grid run at a tiny size, and say what their results show."""

import argparse as some_module_with_a_text
import json
from pathlib import Path

import pytest

from benchmarks.tried import rounding, switch
from benchmarks.tried.quality import Language


@pytest.fixture(scope="module")
def measured():
    return rounding.measure(shorter=30)


def test_rounding_moves_updates_and_the_table_says_how_much(measured):
    exact, *stored = measured["rows"]
    assert (exact["size"], exact["error"], exact["second_moment_after"]) == (1, 0, 1)
    assert [(row["codec"], row["rounding"]) for row in stored] == rounding.STORAGES
    for row in stored:
        assert 0 < row["error"] < 0.3 and 0.5 < row["size"] < 2
    by_rounding = {name: [row for row in stored if row["rounding"] == name] for name in ("nearest", "stochastic")}
    for nearest, stochastic in zip(*by_rounding.values(), strict=True):
        assert abs(stochastic["second_moment_after"] - 1) < abs(nearest["second_moment_after"] - 1)
    assert len(rounding.markdown(measured).splitlines()) == 4 + len(stored)


def test_a_quick_run_writes_nothing(measured, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "measure", lambda shorter: measured)
    saved = []
    rounding.main(["--quick"], save=lambda *given: saved.append(given))
    assert "| root, nearest |" in capsys.readouterr().out and not saved
    rounding.main([], save=lambda *given: saved.append(given))
    assert [path.name for _, path in saved] == ["rounding.json"]


@pytest.mark.slow
def test_a_training_changes_its_storage_in_the_middle(tmp_path, capsys):
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
    assert results["losses"]["fp32, then root begun anew"] != results["losses"]["fp32, then root"]
