"""Tests the transforms around an engine: fused updates, chains, and updates without parameters."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import SMALL, assert_nearly, assert_same_bits, gradients, jitted, jitted_fused, parameters

PARAMS, GRADS = parameters(), gradients()


def adamw(**options):
    return fse.adamw8bit(1e-2, **{"state_format": SMALL} | options)


def test_an_optimizer_is_a_pair_as_in_optax():
    tx = adamw()
    init, update = tx
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert (tx.init, tx.update) == (init, update)


def test_an_optimizer_can_be_copied():
    tx = adamw()
    for other in (copy.copy(tx), copy.deepcopy(tx), copy.deepcopy({"tx": tx})["tx"]):
        assert other == tx
        assert jitted_fused(other)(GRADS, other.init(PARAMS), PARAMS) is not None


def test_fused_update_refuses_an_optimizer_that_lost_its_fused_path():
    """An optimizer is a named tuple, so JAX treats it as a pytree of two functions and can rebuild it."""
    tx = adamw()
    for other in (jax.tree.map(lambda f: f, tx), tx._replace(init=tx.init)):
        assert (other.init, other.update) == (tx.init, tx.update)
        with pytest.raises(TypeError, match="`tx` must be an 8-bit optimizer"):
            fse.fused_update(other, GRADS, tx.init(PARAMS), PARAMS)


def test_adam_needs_no_parameters():
    tx = fse.adam8bit(1e-2, state_format=SMALL)
    with_params = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert_same_bits(jax.jit(lambda g, s: tx.update(g, s))(GRADS, tx.init(PARAMS)), with_params)
    with pytest.raises(ValueError, match="needs `params`"):
        tx.fused_update(GRADS, tx.init(PARAMS), None)


def test_adamw_without_weight_decay_equals_adam():
    tx, adam = adamw(weight_decay=0.0), fse.adam8bit(1e-2, state_format=SMALL)
    updates, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    expected, expected_state = jax.jit(adam.update)(GRADS, adam.init(PARAMS), PARAMS)
    assert_same_bits((updates, state[0]), (expected, expected_state[0]))


def test_weight_decay_multiplies_the_parameters_by_the_learning_rate():
    tx = fse.adamw8bit(0.5, weight_decay=0.25, state_format=SMALL)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    new, _ = jitted_fused(tx)(zero, tx.init(PARAMS), PARAMS)
    assert_same_bits(new, jax.tree.map(lambda p: p * np.float32(0.875), PARAMS))


def test_a_chain_has_the_state_of_an_optax_chain():
    prefixes = optax.clip_by_global_norm(1.0), optax.scale_by_schedule(optax.constant_schedule(0.5))
    ours, theirs = fse.chain(*prefixes, adamw()), optax.chain(*prefixes, adamw())
    assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(theirs.init(PARAMS))
    new, state = jitted_fused(ours)(GRADS, ours.init(PARAMS), PARAMS)
    expected, expected_state, _ = jitted(theirs)(GRADS, theirs.init(PARAMS), PARAMS)
    assert_nearly((new, state), (expected, expected_state))
    assert int(state[1].count) == 1


def test_a_chain_of_one_optimizer_equals_that_optimizer():
    tx = fse.chain(adamw())
    new, (state,) = jitted_fused(tx)(GRADS, tx.init(PARAMS), PARAMS)
    assert_same_bits((new, state), jitted_fused(adamw())(GRADS, adamw().init(PARAMS), PARAMS))


def test_members_of_a_chain_get_the_extra_arguments():
    def by_value(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: g * value, updates), state

    scale = optax.GradientTransformationExtraArgs(optax.init_empty_state, by_value)
    tx = fse.chain(scale, optax.identity(), adamw(weight_decay=0.0))
    state = tx.init(PARAMS)
    still, _ = fse.fused_update(tx, GRADS, state, PARAMS, value=0.0)
    assert_same_bits(still, PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS, value=0.0)
    assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))


def test_a_chain_must_end_in_an_optimizer():
    for members in ((), (optax.clip(1.0),), (adamw(), optax.clip(1.0)), (fse.scale_by_adam8bit(),)):
        with pytest.raises(TypeError, match="last member of `chain` must be an 8-bit optimizer"):
            fse.chain(*members)


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32, optax.constant_schedule], ids=lambda k: k.__name__)
@pytest.mark.one_in(4)
def test_every_kind_of_learning_rate_works(kind):
    tx = fse.adam8bit(kind(0.5), eps=0.0, state_format=SMALL)
    updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS)):
        np.testing.assert_allclose(u, -0.5 * np.sign(g), rtol=1e-5)


def test_a_learning_rate_can_be_traced():
    @jax.jit
    def step(rate, grads, params):
        tx = fse.adamw8bit(rate, weight_decay=rate, b1=1 - rate, state_format=SMALL)
        return fse.fused_update(tx, grads, tx.init(params), params)

    first, _ = step(0.125, GRADS, PARAMS)
    step(0.25, GRADS, PARAMS)
    assert step._cache_size() <= 1
    tx = fse.adamw8bit(0.125, weight_decay=0.125, b1=0.875, state_format=SMALL)
    assert_nearly(first, jitted_fused(tx)(GRADS, tx.init(PARAMS), PARAMS)[0])


# Not Lion: XLA copies a moment in fp32 that both the direction and the next moment read.
@pytest.mark.parametrize("make", [fse.adamw8bit, fse.ademamix8bit, fse.adagrad8bit], ids=lambda make: make.__name__)
def test_a_donated_fused_step_has_only_temporaries_of_chunk_size(make):
    """Some parameters have fp32 moments, which have the shape and dtype of the parameters themselves."""
    shapes = {"embedding": (4096, 1024), "kernel": (2048, 2048), "norm": {"scale": (1024,)}}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    tx = make(1e-3)
    step = jax.jit(lambda params, state, grads: fse.fused_update(tx, grads, state, params), donate_argnums=(0, 1))
    memory = step.lower(params, jax.eval_shape(tx.init, params), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.6 * 4 * 2048 * 2048  # ten chunks of 1 MB, for three moments
