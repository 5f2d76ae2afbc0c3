"""Tests that a fine-tuning runs with every way to store weights, and that the table shows all of them."""

from statistics import mean

import pytest

from benchmarks.tried import finetuning


@pytest.mark.slow
def test_split_weights_learn_like_float32_and_bfloat16_does_not(monkeypatch):
    monkeypatch.setattr(finetuning, "SEEDS", (11,))
    monkeypatch.setattr(finetuning, "RATES", (3e-5,))
    measured = finetuning.measure(shorter=5)
    losses = {row["way"]: mean(row["losses"]) for row in measured["rows"]}
    learned = {way: measured["before"]["float32"] - loss for way, loss in losses.items()}
    exact, half = learned["float32"], learned["bfloat16, `optax.adamw` with fp32 moments"]
    assert exact > 0.01 and half < 0.6 * exact
    for way, by in learned.items():
        if "split_weights" in way:
            assert by == pytest.approx(exact, rel=0.1)
    assert len(finetuning.markdown(measured).splitlines()) == 4 + len(finetuning.WAYS)
