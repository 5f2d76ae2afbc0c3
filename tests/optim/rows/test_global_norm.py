"""Tests norms over dense and row gradients together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse

ROWS = fse.SparseRows.of_lookups(jnp.array([7, 7, 3, 20]), jnp.arange(8.0).reshape(4, 2), 10)
GRADS = {"embedding": ROWS, "kernel": jnp.array([2.0, -1.0])}
DENSE = {"embedding": ROWS.to_dense(), "kernel": GRADS["kernel"]}


def test_the_norm_equals_that_of_the_dense_gradients():
    np.testing.assert_allclose(fse.global_norm(GRADS), optax.tree.norm(DENSE), rtol=1e-6)
    np.testing.assert_allclose(fse.global_norm(DENSE), optax.tree.norm(DENSE), rtol=1e-6)


@pytest.mark.parametrize("tx", ["clip", "percentile"])
@pytest.mark.parametrize("max_norm", [1.0, 100.0])
@pytest.mark.one_in(2)
def test_clipping_equals_that_of_the_dense_gradients(tx, max_norm):
    make = {"clip": lambda: fse.clip_by_global_norm(max_norm), "percentile": lambda: fse.percentile_clipping(50)}[tx]
    rows_tx, dense_tx = make(), make()
    update = jax.jit(rows_tx.update)
    state, dense_state = rows_tx.init(DENSE), dense_tx.init(DENSE)
    for scale in (1.0, 3.0, 0.5):
        grads, dense = scaled(GRADS, scale), scaled(DENSE, scale)
        found, state = update(grads, state)
        want, dense_state = dense_tx.update(dense, dense_state)
        assert is_rows(found["embedding"]) and found["embedding"].indices.tolist() == ROWS.indices.tolist()
        np.testing.assert_allclose(found["embedding"].to_dense(), want["embedding"], rtol=1e-6)
        np.testing.assert_allclose(found["kernel"], want["kernel"], rtol=1e-6)


def scaled(tree, scale):
    return jax.tree.map(lambda x: x * scale, tree, is_leaf=is_rows)


def is_rows(x):
    return isinstance(x, fse.SparseRows)


def test_max_norm_must_be_a_number():
    with pytest.raises(TypeError, match="`max_norm` must be a number, got None"):
        fse.clip_by_global_norm(None)


def test_max_norm_can_be_scheduled():
    tx = optax.inject_hyperparams(fse.clip_by_global_norm)(optax.linear_schedule(1.0, 2.0, 1))
    updates, state = tx.update(GRADS, tx.init(DENSE))
    np.testing.assert_allclose(fse.global_norm(updates), 1.0, rtol=1e-6)
    updates, state = tx.update(GRADS, state)
    np.testing.assert_allclose(fse.global_norm(updates), 2.0, rtol=1e-6)
