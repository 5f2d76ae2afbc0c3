"""Tests that rounding changes updates as the table says, and that a quick run writes no file."""

import pytest

from benchmarks.tried import rounding


@pytest.fixture(scope="module")
def measured():
    return rounding.measure(shorter=30)


@pytest.mark.slow
def test_rounding_changes_updates_and_the_table_shows_by_how_much(measured):
    exact, *stored = measured["rows"]
    assert (exact["size"], exact["error"], exact["second_moment_after"]) == (1, 0, 1)
    assert [(row["codec"], row["rounding"]) for row in stored] == rounding.STORAGES
    for row in stored:
        assert 0 < row["error"] < 0.3 and 0.5 < row["size"] < 2
    by_rounding = {name: [row for row in stored if row["rounding"] == name] for name in rounding.ROUNDINGS}
    for nearest, *unbiased in zip(*by_rounding.values(), strict=True):
        for row in unbiased:
            assert abs(row["second_moment_after"] - 1) < abs(nearest["second_moment_after"] - 1)
    assert len(measured["by_decay"]) == len(rounding.DECAYS) * len(rounding.GRADIENTS)
    assert all(0 < row[name] < 1 for row in measured["by_decay"] for name in rounding.ROUNDINGS)
    assert len(rounding.markdown(measured).splitlines()) == 4 + len(stored) + 5 + len(measured["by_decay"])


def test_a_quick_run_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(rounding, "DECAYS", (0.95,))
    measured = rounding.measure(shorter=60)
    monkeypatch.setattr(rounding, "measure", lambda shorter: measured)
    saved = []
    rounding.main(["--quick"], save=lambda *given: saved.append(given))
    assert "| root, nearest |" in capsys.readouterr().out and not saved
    rounding.main([], save=lambda *given: saved.append(given))
    assert [path.name for _, path in saved] == ["rounding.json"]
