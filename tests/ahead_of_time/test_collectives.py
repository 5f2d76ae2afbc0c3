"""Counts the bytes that a training step moves between chips: as many as with `optax.adamw` if no block is split."""

import json
from math import prod

import jax
import pytest

from benchmarks.counted import collectives as counted
from benchmarks.harness.transformer import Transformer
from tests.tools import assert_an_embedding_adds_nothing

SMALL = Transformer(layers=1, vocabulary=1024)
NARROW = SMALL._replace(width=256)  # sharded over 16 chips, shards have 16 elements, fewer than any block


def case(step, mesh=(4, 4), axes="Auto"):
    return counted.Case("v5e:4x4", mesh, axes, step)


def test_a_training_step_moves_as_many_bytes_as_with_optax(topology):
    del topology  # skips without a compiler
    ours, theirs = (counted.measured(case(step), SMALL) for step in (counted.FUSED, counted.BASELINE))
    assert ours["straddling"] == 0 and ours["optimizer"] == {"arrays": {}, "bytes": 0}
    assert theirs["all"]["arrays"].keys() >= {"all-gather", "all-reduce"}
    assert ours["all"] == theirs["all"]


@pytest.mark.slow
def test_kernels_move_as_many_bytes_as_optax_with_row_sharded_gradients(topology):
    """With this vocabulary, the compiler shards the gradient of the output matrix along its other axis."""
    del topology
    model = SMALL._replace(vocabulary=32_000)
    steps = (counted.FUSED, counted.BY_ROWS, counted.BASELINE)
    ours, by_rows, plain = (counted.measured(case(step), model) for step in steps)
    assert ours["optimizer"] == {"arrays": {}, "bytes": 0}
    assert ours["all"] == by_rows["all"]
    assert 0 < by_rows["all"]["bytes"] / plain["all"]["bytes"] - 1 < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_blocks_on_several_chips_exchange_only_scales(topology, axes):
    """No codes, parameters or gradients move. There is one scale for 32 elements, and it moves a few times."""
    del topology
    row = counted.measured(case(counted.FUSED, (16, 1), axes), NARROW)
    assert row["straddling"] > 0 and row["optimizer"]["bytes"] > 0
    assert row["optimizer"]["arrays"].keys() <= {"all-gather", "all-reduce"}
    assert max(row["optimizer"]["arrays"].values()) <= 4 * row["straddling"]
    parameters = sum(4 * prod(x.shape) for x in jax.tree.leaves(NARROW.shapes()))
    assert row["optimizer"]["bytes"] < 0.25 * parameters


@pytest.mark.slow
@pytest.mark.parametrize("one", [c for c in counted.CASES if c.slice != "v5e:4x4"], ids=lambda c: "-".join(map(str, c)))
def test_the_committed_table_of_larger_slices_is_up_to_date(topology, one):
    del topology
    here = one._asdict() | {"mesh": list(one.mesh)}
    (written,) = [row for row in json.loads(counted.FILE.read_text())["rows"] if row.items() >= here.items()]
    assert counted.measured(one) | {"mesh": list(one.mesh)} == written


@pytest.mark.slow
def test_a_stable_embedding_moves_no_more_bytes_than_an_embedding(topology):
    del topology
    assert_an_embedding_adds_nothing(counted.measured_embeddings())
