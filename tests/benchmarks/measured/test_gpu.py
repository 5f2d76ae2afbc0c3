"""Tests that a quick run of the benchmark for GPUs works on any machine."""

import pytest

from benchmarks.harness import tree_steps
from benchmarks.measured import gpu


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


def test_without_a_gpu_a_message_is_printed(capsys):
    gpu.main([])
    assert "JAX finds no GPU" in capsys.readouterr().out
