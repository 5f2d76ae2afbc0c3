"""Tests that zeros mean zero moments and no rows, in every optimizer and codec, because users write zeros by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from flax_stable_embed.ops.blockwise.codecs import CODECS
from tests.cases import OPTIMIZERS
from tests.contracts.test_every_bitsandbytes_optimizer import OPTIMIZERS as THEIRS
from tests.tools import build, gradients, is_codes, parameters

ROWS = slice(8, 24)
RESETS = {
    "at[rows].set(0)": lambda x: x.at[ROWS].set(0),
    "where(mask, 0, x)": lambda x: jnp.where((jnp.arange(64)[:, None] >= 8) & (jnp.arange(64)[:, None] < 24), 0, x),
}


def transforms():
    """Yields a transform for every optimizer and codec."""
    for codec in CODECS:
        storage = {"rules": ((".*", 8),), "state_format": fse.StateFormat(codec, min_size=0)}
        for case in OPTIMIZERS:
            yield f"{case.name}-{codec}", lambda case=case, storage=storage: build(case, **storage)
        for name, make in (("adam", optax.adam), ("ademamix", optax.contrib.ademamix), ("yogi", optax.yogi)):
            yield (
                f"quantize_state-{name}-{codec}",
                lambda make=make, storage=storage: fse.quantize_state(make(1e-2), **storage),
            )
    for name, hyper in THEIRS.items():
        small = fse.StateFormat("dynamic", block_size=256, block_axis=-1, min_size=0)
        yield (
            f"bitsandbytes-{name}",
            lambda name=name, hyper=hyper, small=small: getattr(bitsandbytes, name)(**hyper, state_format=small),
        )


TRANSFORMS = dict(transforms())


def reset(state, how):
    """Returns the state with the codes of some rows of `kernel` set to zero."""

    def zeroed(path, x):
        is_kernel = "kernel" in jax.tree_util.keystr(path) and x.shape == (64, 64)
        return RESETS[how](x).astype(x.dtype) if is_kernel and is_codes(x) else x

    return jax.tree_util.tree_map_with_path(zeroed, state)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("how", RESETS)
@pytest.mark.one_in(35)
def test_rows_whose_moments_were_reset_stay_without_a_gradient(name, how):
    tx, params = TRANSFORMS[name](), jax.tree.map(jnp.zeros_like, parameters())  # zeros do not decay
    update, state = jax.jit(tx.update), tx.init(params)
    for i in range(3):
        _, state = update(gradients(i), state, params)
    changed = reset(state, how)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(changed), jax.tree.leaves(state)))
    updates, _ = update(jax.tree.map(jnp.zeros_like, params), changed, params)
    assert not np.any(updates["kernel"][ROWS])
    assert np.any(updates["kernel"]) or "adagrad" in name or "rmsprop" in name, "the other rows still move"


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(11, start=1)
def test_a_state_of_zeros_is_a_fresh_state(name):
    tx, params = TRANSFORMS[name](), parameters()
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, state)
    ours, theirs = (jax.jit(tx.update)(gradients(), s, params)[0] for s in (state, zeros))
    if "adagrad" not in name and "yogi" not in name:  # their sums begin with a number
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("signed", [True, False])
def test_byte_0_is_zero(codec, signed):
    absmax = jnp.full((1,), 3e38)
    codes = jnp.zeros((8,), CODECS[codec](signed).dtype)
    assert not np.any(fse.ops.dequantize(codes, absmax, signed=signed, codec=codec))
    assert not np.any(fse.ops.quantize(jnp.zeros(8), signed=signed, codec=codec)[0])


def zero_rows(grads, state, tx, params):
    return tx.update(jax.tree.map(jnp.zeros_like, grads), state, params)


def skipped_by_where(grads, state, tx, params):
    ok = jnp.isfinite(fse.global_norm(grads))
    return tx.update(jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), grads), state, params)


def skipped_by_cond(grads, state, tx, params):
    ok = jnp.isfinite(fse.global_norm(grads))
    kept = jax.lax.cond(ok, lambda g: g, lambda g: jax.tree.map(jnp.zeros_like, g), grads)
    return tx.update(kept, state, params)


def skipped_by_optax(grads, state, tx, params):
    finite = optax.apply_if_finite(optax.identity(), 3)
    return tx.update(finite.update(grads, finite.init(params), params)[0], state, params)


SKIPS = [zero_rows, skipped_by_where, skipped_by_cond, skipped_by_optax]
BY_ROWS = [case for case in OPTIMIZERS if not case.sums]


@pytest.mark.parametrize("case", BY_ROWS, ids=lambda case: case.name)
@pytest.mark.parametrize("skip", SKIPS, ids=lambda skip: skip.__name__)
@pytest.mark.one_in(14)
def test_a_skipped_step_moves_no_row_of_a_table(case, skip):
    """A table without decay: no row may move if the gradient was zeroed."""
    table = {"embedding": jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)}
    tx = fse.row_sparse(build(case))
    first = {"embedding": fse.SparseRows.of_lookups(jnp.arange(5), jnp.ones((5, 8)), 64)}
    _, state = tx.update(first, tx.init(table), table)
    bad = {"embedding": fse.SparseRows.of_lookups(jnp.arange(7, 12), jnp.full((5, 8), jnp.nan), 64)}
    updates, _ = jax.jit(lambda g, s: skip(g, s, tx, table))(bad, state)
    np.testing.assert_array_equal(optax.apply_updates(table, updates)["embedding"], table["embedding"])
