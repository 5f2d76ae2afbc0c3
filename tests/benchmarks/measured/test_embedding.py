"""Tests that the benchmark of embeddings runs at a tiny size without other libraries and prints its results."""

import json

import pytest

from benchmarks.harness.modules import Shape
from benchmarks.measured import embedding
from benchmarks.measured.embedding import DENSE, FUSED, IDS, ROWS

TINY = Shape(40, 8, 6), Shape(400, 8, 6)


def turns(step):
    step()
    return [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_every_contender_has_its_row_and_quick_results_are_not_kept(monkeypatch, capsys):
    monkeypatch.setattr(embedding, "QUICK", TINY)
    monkeypatch.setattr(embedding, "QUICK_FORWARD_BACKWARD", (Shape(40, 8, 16),))
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    monkeypatch.setattr(embedding, "alternate", lambda steps, *_: {key: turns(step) for key, step in steps.items()})
    measured = embedding.measure(quick=True)
    assert [list(entry["rows"]) for entry in measured["steps"]] == [[DENSE, ROWS, FUSED, IDS]] * 2
    assert list(measured["modules"][0]["rows"]) == ["stable", "stable, rows", "flax", "flax exact"]
    for entry in measured["steps"]:
        for row in entry["rows"].values():
            assert row["ms"] == [1500, 2000, 2500] and row["times_faster_than_dense"] == [1, 1, 1]
        assert entry["rows"][ROWS]["temp_bytes"] <= entry["allowed_temporaries"]
    assert measured["growth"][ROWS] == [1, 1, 1]

    table = embedding.markdown(measured)
    for name in (embedding.STEPS[ROWS], embedding.MODULES["stable"]):
        assert f"| {name} |" in table
    assert "From 40 to 400 rows the step takes 1.00 times as long (in place: 1.00)." in table

    monkeypatch.setattr(embedding, "measure", lambda quick: measured)
    saved = []
    embedding.main(["--quick"], save=lambda *given: saved.append(given))
    assert "| step of a table |" in capsys.readouterr().out and not saved
    embedding.main([], save=lambda *given: saved.append(given))
    assert [path.name for _, path in saved] == ["embedding.json"] and json.dumps(saved[0][0])
