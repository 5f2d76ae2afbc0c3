"""The benchmark for GPUs runs on any machine when it is quick, and its picture shows what its results say."""

import json

import pytest

from benchmarks.counted import compiled
from benchmarks.harness import tree_steps
from benchmarks.measured import gpu
from benchmarks.published import roofline


@pytest.mark.slow
def test_a_quick_run_fills_every_part(capsys):
    measured = gpu.measure(quick=True)
    assert all(row["codes"] and not row["codes_apart"] for row in measured["answers"])  # here both are the reference
    assert list(measured["model"]) == list(tree_steps.field()) and list(measured["arrays"]) == list(gpu.ARRAYS)
    assert list(measured["training"]) == ["adamw", "adamw8bit", "adamw8bit, `fused_update`"]
    assert list(measured["small"]) == [tree_steps.BASELINE, tree_steps.OURS] and len(measured["stable_embed"]) == 12
    assert measured["model"][tree_steps.BASELINE]["ratio"] == [1, 1, 1]
    table = gpu._of_training(measured)
    assert all(f"| {name} |" in table for name in measured["training"])


def test_a_machine_without_a_gpu_is_told_so(capsys):
    gpu.main([])
    assert "There is no GPU here" in capsys.readouterr().out


def test_the_picture_shows_every_step_that_was_measured_or_counted(tmp_path):
    on_gpus, counted = gpu.everywhere(), json.loads(compiled.FILE.read_text())
    groups = roofline.bars(on_gpus, counted)
    for results, (title, rows) in zip(on_gpus, groups):
        assert results["environment"]["device"] in title
        assert {name for name, *_ in rows} >= set(results["arrays"])
    assert all(0 < share <= 1.02 for _, rows in groups for _, share, _ in rows)
    steps = {row["step"] for row in counted["rows"] if row["bundles"]}
    assert all({name for name, *_ in rows} == steps for _, rows in groups[len(on_gpus) :])
    roofline.draw(on_gpus, counted, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
