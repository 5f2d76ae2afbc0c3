"""Tests norms over dense and row gradients together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import flax_stable_embed as fse
from tests.tools import types

ROWS = fse.SparseRows.of_lookups(jnp.array([7, 7, 3, 20]), jnp.arange(8.0).reshape(4, 2), 10)
GRADS = {"embedding": ROWS, "kernel": jnp.array([2.0, -1.0])}
DENSE = {"embedding": ROWS.to_dense(), "kernel": GRADS["kernel"]}


def test_the_norm_equals_that_of_the_dense_gradients():
    np.testing.assert_allclose(fse.global_norm(GRADS), optax.tree.norm(DENSE), rtol=1e-6)
    np.testing.assert_allclose(fse.global_norm(DENSE), optax.tree.norm(DENSE), rtol=1e-6)


@pytest.mark.parametrize("tx", ["clip", "percentile"])
@pytest.mark.parametrize("max_norm", [1.0, 100.0])
@pytest.mark.one_in(4)
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


LARGE = {"float16": (300.0, jnp.float16), "bfloat16": (1e30, jnp.bfloat16), "float32": (1e20, jnp.float32)}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("sparse", [True, False], ids=["rows", "dense"])
def test_numbers_whose_squares_overflow_have_a_finite_norm_and_are_clipped(name, sparse):
    value, dtype = LARGE[name]
    values = jnp.full((64, 64), value, dtype)
    grads = {"a": fse.SparseRows.of_lookups(jnp.arange(64), values, 100) if sparse else values, "b": jnp.ones(3, dtype)}
    stored = float(values[0, 0])
    np.testing.assert_allclose(fse.global_norm(grads), 64 * stored, rtol=1e-5)
    tx = fse.clip_by_global_norm(1.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(fse.global_norm(updates), 1.0, rtol=4e-3)
    assert updates["a"].dtype == dtype


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_norm_of_nonfinite_gradients_is_not_finite(bad):
    assert not np.isfinite(fse.global_norm({"a": jnp.array([1.0, bad])}))


def test_float64_has_a_norm_in_float64_and_no_gradient_one_of_zero():
    with jax.enable_x64(True):
        norm = fse.global_norm({"a": jnp.array([3e200]), "b": jnp.array([4e200], jnp.float64), "c": jnp.ones(2)})
        assert norm.dtype == jnp.float64
        np.testing.assert_allclose(norm, 5e200, rtol=1e-14)
    assert fse.global_norm({}) == 0.0


CLIPS = {
    "clip_by_global_norm": lambda: fse.clip_by_global_norm(1.0),
    "percentile_clipping": lambda: fse.percentile_clipping(5),
    "per_parameter": lambda: fse.percentile_clipping(5, per_parameter=True),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.one_in(5)
def test_clipping_runs_under_strict_promotion_and_the_checks_of_jax(name, dtype):
    grads = {"a": jnp.asarray([3.0, 4.0], dtype), "b": jnp.zeros(3, dtype), "c": jnp.ones(2, jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"), jax.debug_infs(True), jax.debug_nans(True):
        tx = CLIPS[name]()
        state = tx.init(grads)
        for scale in (0.0, 1.0, 8.0):
            now = scaled(grads, scale)
            eager, _ = tx.update(now, state)
            checked = jax.jit(checkify.checkify(tx.update, errors=checkify.float_checks))
            error, (updates, state) = checked(now, state)
            error.throw()
            jax.tree.map(np.testing.assert_array_equal, eager, updates)
            assert types(updates) == types(grads)


@pytest.mark.parametrize("size", [1.0, 1e15, 1e20])
def test_the_derivative_of_the_norm_is_the_direction(size):
    grads = {"a": jnp.array([3.0, -4.0]) * size, "b": jnp.array([0.0, 12.0]) * size}
    found = jax.grad(fse.global_norm)(grads)
    jax.tree.map(lambda d, g: np.testing.assert_allclose(d, g / (13.0 * size), rtol=1e-5), found, grads)


def norm_of_optax(name, grads):
    if name == "global_norm":
        return optax.global_norm(grads)
    tx = getattr(optax, name)(1.0)
    return tx.update(grads, tx.init(DENSE), DENSE)[0]


@pytest.mark.filterwarnings("ignore:.*global_norm:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["global_norm", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip", "clip"]
)
def test_norms_of_optax_refuse_row_gradients_and_name_ours(name):
    with pytest.raises(TypeError, match=r"fse\.global_norm and fse\.clip_by_global_norm"):
        jax.jit(norm_of_optax, static_argnums=0)(name, GRADS)
    with pytest.raises((TypeError, NotImplementedError)):  # JAX's own text: "Cannot call abstract method real"
        norm_of_optax(name, GRADS)
