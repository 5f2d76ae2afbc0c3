"""Tests that trainings with a change run with every storage, and that adapted moments are better than new ones."""

from statistics import mean

import pytest

from benchmarks.tried import changes


@pytest.mark.slow
def test_adapted_moments_train_like_float32_ones(monkeypatch):
    monkeypatch.setattr(changes, "SEEDS", (21,))
    measured = changes.measure(shorter=3)
    losses = {(row["stored"], row["change"]): mean(row["losses"]) for row in measured["rows"]}
    base = next(iter(changes.STORED))
    for (stored, change), loss in losses.items():
        if stored != changes.AGAIN:
            assert loss == pytest.approx(losses[base, change], rel=0.02), (stored, change)
    assert len(changes.markdown(measured).splitlines()) == 4 + len(changes.STORED)
