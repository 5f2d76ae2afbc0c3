"""Tests that the pictures on the first screen of README agree with the results."""

import json

from benchmarks.counted import state
from benchmarks.published import pictures


def test_the_two_loss_curves_coincide():
    curves = pictures.loss_curves()
    (steps, fp32), (same_steps, in_8_bits) = curves["adamw"], curves["adamw8bit"]
    assert steps == same_steps and len(steps) >= 30 and steps == sorted(steps)
    assert fp32[0] > 1.4 * fp32[-1]
    assert max(abs(a / b - 1) for a, b in zip(fp32, in_8_bits, strict=True)) < 0.01


def test_bars_show_the_counted_bytes():
    left, _ = pictures.draw_first_screen().axes
    texts = [text.get_text() for text in left.texts]
    model = json.loads(state.FILE.read_text())["models"][pictures.MODEL]
    for name in (state.ADAMW, state.ADAMW8BIT):
        total = model["state"][name]["total"]
        assert {name, state.gigabytes(total), f"{total / model['parameters']:.2f}"} <= {*texts}


def test_a_curve_is_a_mean_over_the_runs_that_have_one(tmp_path, monkeypatch):
    runs = [{"optimizer": "adamw", "curve": {"steps": [10, 20], "loss": loss}} for loss in ([4.0, 2.0], [2.0, 1.0])]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": [*runs, {"optimizer": "adamw"}]}))
    monkeypatch.setattr(pictures, "TRAINED", file)
    assert pictures.loss_curves() == {"adamw": ([10, 20], [3.0, 1.5])}
