"""Tests the initial tables of modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.embedding.initializers import pretrained, xavier_uniform


def test_the_initial_table_is_xavier_uniform():
    table = xavier_uniform(jax.random.key(0), (500, 100))
    bound = np.sqrt(6 / 600)
    assert bound * 0.999 < np.abs(table).max() <= bound
    np.testing.assert_allclose(np.std(table), bound / np.sqrt(3), rtol=0.01)


def test_pretrained_gives_a_copy_in_the_dtype_asked_for():
    init = pretrained(np.array([[1.5, 2.0]]))
    assert init(jax.random.key(0), (1, 2), jnp.bfloat16).dtype == jnp.bfloat16
    table = jnp.ones((2, 2))
    copy = pretrained(table)(jax.random.key(0), (2, 2), jnp.float32)
    copy.delete()
    assert not table.is_deleted()


def test_pretrained_tables_of_the_wrong_shape_raise():
    with pytest.raises(ValueError, match=r"`table` must have shape \(num_embeddings, features\), got \(3,\)"):
        pretrained(np.ones(3))
    with pytest.raises(ValueError, match=r"`table` has shape \(3, 2\), but the module needs \(2, 3\)"):
        pretrained(np.ones((3, 2)))(jax.random.key(0), (2, 3), jnp.float32)
