"""Tests of docs/scaling.md: its code runs from top to bottom, and the results support its text."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.counted import chips, collectives
from tests.tools import assert_an_embedding_adds_nothing

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.recent_compiler
def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "scaling"})
    printed = capsys.readouterr().out
    assert "['down']" in printed
    assert "straddles devices: down: axis 1 of 4096 is sharded over 256 devices, 16 on each" in printed


def test_every_link_of_the_page_works():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


def rows():
    return json.loads(collectives.FILE.read_text())["rows"]


def test_the_optimizer_moves_nothing_if_no_block_straddles_chips():
    ours = [row for row in rows() if row["step"] not in (collectives.BASELINE, collectives.BY_ROWS)]
    assert {row["slice"] for row in ours} == {case.slice for case in collectives.CASES}
    for row in ours:
        if row["straddling"] == 0:
            (beside,) = where(row, collectives.BY_ROWS if row["mesh"][1] > 1 else collectives.BASELINE)
            assert row["optimizer"] == {"arrays": {}, "bytes": 0}, row
            assert row["all"] == beside["all"], row


def where(row, step):
    """Returns the rows of another step on the same mesh."""
    return [r for r in rows() if r["step"] == step and all(r[key] == row[key] for key in ("slice", "mesh", "axes"))]


def test_if_blocks_straddle_only_scales_are_combined_and_other_blocks_avoid_it():
    straddling = [row for row in rows() if row["straddling"]]
    assert straddling and all(row["mesh"][0] == 256 for row in straddling)
    for row in straddling:
        assert row["optimizer"]["arrays"].keys() <= {"all-gather", "all-reduce"}
        assert max(row["optimizer"]["arrays"].values()) <= 4 * row["straddling"], row  # two moments, before and after
        assert 0 < collectives.beyond(row, rows()) < 0.05
        (free,) = where(row, collectives.FREE)
        assert free["straddling"] == 0


def test_an_embedding_adds_no_communication():
    assert_an_embedding_adds_nothing(json.loads(collectives.FILE.read_text())["embeddings"])


def of_chips():
    return json.loads(chips.FILE.read_text())["rows"]


def test_no_block_of_the_large_models_straddles_chips():
    assert len(of_chips()) == len(chips.optimizers(1)) * len(chips.SLICES)
    assert not any(row["straddling"] for row in of_chips())


def test_bytes_of_a_large_model_on_the_page_equal_the_results():
    rows = [row for row in of_chips() if (row["model"], row["slice"], row["mesh"]) == ("7B", "v5e:4x4", [16, 1])]
    ours, optax = (
        f"{row['state'] / 1e9:.3f} GB"
        for name in ("`adamw8bit`", "`optax.adamw`")
        for row in rows
        if row["optimizer"] == name
    )
    page = " ".join(PAGE.read_text().split())
    assert f"takes {ours} per chip, where `optax.adamw` takes {optax}" in page
    both = {row["optimizer"]: f"{(2 * row['parameters'] + row['state']) / 1e9:.3f} GB" for row in rows}
    split, exact = both["`split_weights(adamw8bit)`, bfloat16"], both["`optax.adamw`"]
    assert f"together take {split} per chip, and {exact} with float32 `optax.adamw`" in page


@pytest.mark.slow
def test_bytes_of_the_large_models_equal_those_of_the_code():
    for one in chips.SLICES:
        here = one._asdict() | {"mesh": list(one.mesh)}
        written = [row for row in of_chips() if row.items() >= here.items()]
        assert [row | {"mesh": list(row["mesh"])} for row in chips.measured(one)] == written
