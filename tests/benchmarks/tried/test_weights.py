"""Tests that the table of small updates shows how much of them each way to store weights keeps."""

import pytest

from benchmarks.tried import weights


@pytest.fixture(scope="module")
def measured():
    return weights.measure(shorter=10)


def test_split_weights_keep_small_updates_and_bfloat16_does_not(measured):
    rows = {(row["way"], row["start"], row["rate"]): row for row in measured["rows"]}
    exact, split, nearest, half = (
        rows[way, "N(0, 0.02)", 1e-6]
        for way in ("float32", "`split_weights`, 24 bits", "24 bits, rounded to nearest", "bfloat16")
    )
    for start in weights.STARTS:
        for rate in weights.RATES:
            assert rows["`split_weights`, 32 bits", start, rate] | {"way": ""} == rows["float32", start, rate] | {
                "way": ""
            }
    assert exact["error"] < split["error"] < 0.15 and split["kept"] == pytest.approx(1, abs=0.01)
    assert nearest["kept"] < 0.95 and half["kept"] < 0.02
    assert len(weights.markdown(measured).splitlines()) == 4 + len(weights.WAYS)


def test_the_error_does_not_depend_on_the_size_of_gradients(measured):
    errors = [row["error"] for row in measured["small"]]
    assert 0.002 < min(errors) and max(errors) < 1.02 * min(errors) < 0.05


def test_the_table_of_bytes_has_seven_bytes_for_split_weights():
    lines = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in weights.markdown_of_bytes().splitlines()
    }
    assert lines["float32, `optax.adamw`"] == "16.00"
    assert lines["bfloat16, `split_weights(adamw8bit)`"] == "7.03"
    assert lines["bfloat16, `split_weights(adamw8bit, 32)`"] == "8.03"
