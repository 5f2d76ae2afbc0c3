"""Tests LAMB and LARS against optax, and their trust ratio and the clipping of bitsandbytes by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import ALL_FP32, SMALL, assert_nearly, gradients, jitted, jitted_fused, parameters, run


def norm(x):
    return float(jnp.linalg.norm(x.astype(jnp.float32)))


@pytest.mark.parametrize("hyper", [{}, {"b1": 0.5, "eps": 1e-3}, {"weight_decay": 0.5}, {"eps_root": 1e-6}], ids=str)
@pytest.mark.one_in(7)
def test_lamb_equals_optax_in_32_bits_and_nearly_in_8(hyper):
    check(fse.lamb8bit, optax.lamb, hyper)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"weight_decay": 0.1, "trust_coefficient": 0.1, "nesterov": True},
        {"eps": 0.1, "momentum": 0.5},
        {"trust_ratio_mask": {"kernel": True, "norm": False, "wte": True}, "weight_decay": 0.1},
        {"weight_decay_mask": {"kernel": False, "norm": True, "wte": False}, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.one_in(10)
def test_lars_equals_optax_in_32_bits_and_nearly_in_8(hyper):
    check(fse.lars8bit, optax.lars, hyper)


def check(ours, theirs, hyper):
    in_32, theirs = ours(1e-2, **hyper, rules=ALL_FP32), theirs(1e-2, **hyper)
    assert_nearly(run(in_32, parameters())[0], run(theirs, parameters())[0])
    params, grads = parameters(), gradients()
    in_8bit = ours(1e-2, **hyper, state_format=SMALL)
    _, state, updates = jitted(in_8bit)(grads, in_8bit.init(params), params)
    assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(state))
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2], rtol=1e-5)
    fused, _ = jitted_fused(in_8bit)(grads, in_8bit.init(params), params)
    assert_nearly(fused, optax.apply_updates(params, updates))


@pytest.mark.parametrize("rules", [(), ALL_FP32], ids=["8bit", "fp32"])
def test_the_trust_ratio_gives_a_step_the_length_of_its_parameter(rules):
    params, grads = parameters(), gradients()
    tx = fse.lamb8bit(0.25, state_format=SMALL, rules=rules)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        np.testing.assert_allclose(norm(u), 0.25 * norm(p), rtol=1e-5)
    tx = fse.lars8bit(0.5, trust_coefficient=0.5, state_format=SMALL, rules=rules)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        np.testing.assert_allclose(norm(u), 0.25 * norm(p), rtol=1e-5)


@pytest.mark.parametrize("rules", [(), ALL_FP32], ids=["8bit", "fp32"])
def test_clipping_only_shortens_steps(rules):
    """Of two parameters with the same gradient, only the step of the short one is clipped, to its length."""
    params = {"long": jnp.full((64, 64), 10.0), "short": jnp.full((64, 64), 1e-2), "zero": jnp.zeros((64, 64))}
    grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
    tx = fse.lamb8bit(1.0, max_unorm=0.5, state_format=SMALL, rules=rules)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    plain = fse.adam8bit(1.0, eps=1e-6, state_format=SMALL, rules=rules)
    expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    assert_nearly(updates["long"], expected["long"])
    np.testing.assert_allclose(norm(updates["short"]), 0.5 * norm(params["short"]), rtol=1e-5)
    assert_nearly(updates["zero"], expected["zero"])  # otherwise it would never move
    tx = fse.lars8bit(1.0, max_unorm=0.5, state_format=SMALL, rules=rules)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_nearly(updates["long"], jax.tree.map(lambda g: -g, grads)["long"])
    np.testing.assert_allclose(norm(updates["short"]), 0.5 * norm(params["short"]), rtol=1e-5)


def test_norms_skip_elements_that_are_not_finite():
    params, grads = parameters(), gradients()
    tx = fse.lamb8bit(1e-2, state_format=SMALL)
    bad = grads | {"kernel": grads["kernel"].at[0, 0].set(jnp.nan)}
    new, _, _ = jitted(tx)(bad, tx.init(params), params)
    assert np.isnan(new["kernel"]).sum() == 1
