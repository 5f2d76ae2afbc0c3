"""Tests that the errors of a round trip rank the codecs as their levels do."""

import pytest

from benchmarks.tried import errors


def test_error_table_has_a_line_for_each_row():
    row = {"data": "normal", "signed": False, "codec": "root", "errors": {"32": [0.01, 0.002], "64": [0.0123456, 1.0]}}
    assert errors.markdown([row]).splitlines()[-1] == "| normal, squared | unsigned | `root` | 1 / 0.2 | 1.23 / 100 |"


@pytest.mark.slow
def test_round_trip_errors_rank_the_codecs_as_their_levels_do():
    """For heavy tails, `root` is far better than `linear` on small elements, which `linear` rounds to zero."""
    median = {(row["data"], row["signed"], row["codec"]): row["errors"]["256"][1] for row in errors.measure()}
    assert len(median) == 3 * 2 * 3
    for data in errors.DATA:
        for signed in (True, False):
            root, linear = median[data, signed, "root"], median[data, signed, "linear"]
            assert root < 0.06 and (root < linear or data == "normal")
    assert median["lognormal, sigma 2", False, "linear"] == 1.0  # more than half of the elements become 0
