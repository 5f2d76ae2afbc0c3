"""Tests that the report of the grid of trainings finds unstable runs by their loss curves."""

import pytest

from benchmarks.tried import quality_report


@pytest.mark.parametrize(
    ("losses", "validation", "expected"),
    [
        ([8.0, 6.0, 5.0], [8.0, 6.0, 5.0], ""),
        ([8.0, 8.1, 8.0], [8.0, 8.0, 7.99], ""),  # learns nothing, but is not unstable
        ([8.0, 11.9, 5.0], [8.0, 5.0], ""),  # a spike below 1.5 times the first loss
        ([8.0, 12.1, 5.0], [8.0, 5.0], "exploded"),
        ([8.0, 6.0, 5.5], [8.0, 5.0, 5.59], ""),  # gained 3, lost 0.59 < 20%
        ([8.0, 6.0, 5.7], [8.0, 5.0, 5.61], "fell back"),
        ([8.0, 8.0, 8.0], [8.0, 8.0, 8.01], "fell back"),  # ends above its first loss
        ([2.3, 0.1, 0.03], [2.3, 0.04, 0.06], ""),  # overfits, but loses little of what it gained
        ([8.0, None, None], [8.0, 7.0, None], "not finite"),
        ([8.0, 7.0, 6.0], [8.0, None], "not finite"),
        ([8.0, float("nan"), 6.0], [8.0, 6.0], "not finite"),
    ],
)
def test_unstable_runs_are_recognized_by_their_curves(losses, validation, expected):
    assert quality_report.unstable(losses, list(enumerate(validation))) == expected


def results_of(losses):
    """Results by hand: {cell: {rate: [(last validation loss, unstable) per seed]}}. The first loss is always 8."""
    runs = [
        {"cell": cell, "task": "language", "rate": rate, "seed": seed, "validation": [[0, 8.0], [9, loss]]}
        | {"unstable": unstable, "device": "a device"}
        for cell, rates in losses.items()
        for rate, seeds in rates.items()
        for seed, (loss, unstable) in enumerate(seeds)
    ]
    sizes = {"rates": [1e-3, 1e-1], "steps": 9, "width": 1, "layers": 1, "vocab": 1}
    return {
        "environment": {"versions": {"jax": "1"}, "device": "a device", "command": "a command", "date": "today"},
        "planned": len(runs),
        "tasks": {"language": sizes, "digits": sizes},
        "questions": {"Codecs": [["fp32", "language-fp32"], ["root", "language-root"]]},
        "runs": runs,
    }


def test_the_table_equals_one_computed_by_hand():
    results = results_of(
        {
            "language-fp32": {
                1e-3: [(4.0, ""), (5.0, ""), (6.0, "")],
                1e-1: [(5.0, ""), (7.0, "fell back"), (5.0, "")],
            },
            "language-root": {1e-3: [(4.04, ""), (4.95, ""), (6.0, "")], 1e-1: [(None, "not finite")] * 3},
        }
    )
    *_, fp32, root = quality_report.markdown(results).splitlines()
    assert fp32 == "| fp32 | 5.0000 | 5.0000 (1/3) | 17% |  |  |"
    # +1%, -1% and 0%: mean 0, standard deviation 1%, standard error 1% / sqrt(3)
    assert root == "| root | 4.9500 | not finite (3/3) | 50% | +0.00% ± 0.58% | +0.00% ± 0.58% |"
    assert quality_report.differences(results, "language-root", "language-fp32", 1e-1) == []


def test_runs_that_exploded_can_be_plotted(tmp_path):
    gone = {1e-3: [(5e4, "exploded")] * 2, 1e-1: [(None, "not finite"), (6.0, "")]}
    results = results_of({"language-fp32": {1e-3: [(4.0, ""), (4.1, "")]}, "language-root": gone})
    quality_report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
