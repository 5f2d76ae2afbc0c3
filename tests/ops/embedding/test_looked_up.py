"""Tests the table that takes the place of a parameter in a loss, and the record of lookups.

The gradients are tested in tests/optim/rows/test_row_value_and_grad.py.
"""

import jax
import jax.numpy as jnp
import pytest

from flax_stable_embed.ops.embedding.looked_up import LookedUpTable, record, recording
from flax_stable_embed.ops.embedding.rows import distinct


def test_a_looked_up_table_has_the_shape_and_dtype_of_its_parameter():
    table = LookedUpTable.at(jnp.ones((9, 3), jnp.bfloat16), distinct(jnp.array([1, 2]), 9))
    assert (table.shape, table.dtype, table.tap.shape, table.tap.dtype) == ((9, 3), jnp.bfloat16, (2, 3), jnp.float32)
    assert jax.tree.leaves(table)[0].shape == (9, 3)


def test_lookups_are_recorded_while_a_recording_is_open_unless_their_ids_are_traced():
    record(jnp.ones((9, 3)), jnp.array([1]))
    with recording() as lookups:
        record(jnp.ones((9, 3)), jnp.array([1]))
        with pytest.raises(ValueError, match="keeps its ids to itself"):
            jax.jit(lambda ids: record(jnp.ones((9, 3)), ids))(jnp.array([2]))
    assert [x.row_numbers.tolist() for x in lookups] == [[1]]
