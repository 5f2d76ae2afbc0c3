"""The picture of performance shows the results."""

import json

from benchmarks.counted import compiled
from benchmarks.measured import gpu
from benchmarks.published import roofline


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
