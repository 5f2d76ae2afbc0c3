"""Tests that the picture of times shows every step that was measured or counted, next to `optax.adamw`."""

import json

import pytest

from benchmarks.counted import compiled
from benchmarks.measured import gpu
from benchmarks.published import roofline


@pytest.fixture
def groups():
    return roofline.bars(gpu.everywhere(), json.loads(compiled.FILE.read_text()))


def test_every_gpu_shows_every_contender_that_ran(groups):
    for results, (title, bars) in zip(gpu.everywhere(), groups):
        assert results["environment"]["device"] in title
        busy = {name: row["device_ms"] for name, row in results["model"].items() if row.get("device_ms")}
        assert {bar.name: bar.ms for bar in bars} == busy


def test_every_tpu_shows_optax_and_every_kernel(groups):
    rows = json.loads(compiled.FILE.read_text())["rows"]
    for chip, (title, bars) in zip(compiled.CHIPS, groups[len(gpu.everywhere()) :], strict=True):
        kernels = {row["step"] for row in rows if row["chip"] == chip and row["bundles"]}
        assert chip in title and {bar.name for bar in bars[1:]} == {name for name in kernels if "clip" not in name}


def test_optax_comes_first_and_no_step_is_faster_than_memory(groups):
    for _, bars in groups:
        assert "optax.adamw" in bars[0].name
        assert all(0 < bar.memory_ms <= 1.02 * bar.ms for bar in bars)  # a copy is measured, too


def test_a_tpu_step_is_limited_by_memory_or_by_instructions():
    row = {"chip": "v5e", "step": "a step", "bundles": None, "cycles_of_memory": 1024 * 16 / (819e9 / 1.5e9)}
    bar = roofline._least(row)
    assert bar.ms == bar.memory_ms == pytest.approx(1e3 * roofline.SIZE * 16 / 819e9)
    assert roofline._least(row | {"bundles": 2 * row["cycles_of_memory"]}).ms == pytest.approx(2 * bar.ms)


def test_the_picture_can_be_drawn(tmp_path):
    path = roofline.draw(gpu.everywhere(), json.loads(compiled.FILE.read_text()), tmp_path / "roofline.png")
    assert path.stat().st_size > 10_000
