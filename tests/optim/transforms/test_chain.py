"""Tests that clipping before an optimizer gives it a factor, and does not rewrite the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import (
    SMALL,
    assert_nearly,
    assert_same_bits,
    build,
    every_kind_of_optimizer,
    gradients,
    jitted,
    jitted_fused,
    parameters,
)

BEFORE = {
    "optax.clip_by_global_norm": lambda: (optax.clip_by_global_norm(0.5),),
    "fse.clip_by_global_norm": lambda: (fse.clip_by_global_norm(0.5),),
    "optax.scale": lambda: (optax.scale(0.25),),
    "percentile_clipping": lambda: (fse.percentile_clipping(50),),
    "scale, clip": lambda: (optax.scale(0.25), optax.clip_by_global_norm(0.5)),
    "scale, percentile_clipping, clip": lambda: (
        optax.scale(4.0),
        fse.percentile_clipping(50),
        fse.clip_by_global_norm(0.5),
    ),
    "clip by value, clip": lambda: (optax.clip(0.01), optax.clip_by_global_norm(0.5)),
    "clip, clip by value": lambda: (optax.clip_by_global_norm(0.5), optax.clip(0.01)),
}
FP32 = {"rules": ((".*", 32),)}


def trained(tx, step, steps=3):
    params, state = parameters(), tx.init(parameters())
    for k in range(steps):
        params, state = step(gradients(k), state, params)[:2]
    return params, state


def with_updates(tx):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


@pytest.mark.parametrize("before", BEFORE)
@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_parameters_are_nearly_those_of_optax_chain(case, before):
    ours, theirs = (
        fse.chain(*BEFORE[before](), build(case, **FP32)),
        optax.chain(*BEFORE[before](), build(case, **FP32)),
    )
    want, want_state = trained(theirs, with_updates(theirs))
    for step in (with_updates(ours), jitted_fused(ours)):
        found, state = trained(ours, step)
        assert_nearly(found, want, rtol=2e-5)
        assert jax.tree.structure(state) == jax.tree.structure(want_state)


@pytest.mark.parametrize("before", BEFORE)
@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_the_state_has_the_same_bits_with_update_and_in_place(case, before):
    tx = fse.chain(*BEFORE[before](), build(case))
    params, grads, state = parameters(), gradients(), tx.init(parameters())
    check = assert_nearly if case.sums else assert_same_bits  # XLA adds the squares of a norm in its own order
    check(jitted(tx)(grads, state, params)[1], jitted_fused(tx)(grads, state, params)[1])


@every_kind_of_optimizer
def test_gradients_within_the_norm_give_the_bits_of_no_clipping(case):
    tx, alone = fse.chain(optax.clip_by_global_norm(1e6), build(case)), build(case)
    params, grads = parameters(), gradients()
    found, want = (jitted_fused(x)(grads, x.init(params), params) for x in (tx, alone))
    check = assert_nearly if case.sums else assert_same_bits
    check((found[0], found[1][1]), want)


@pytest.mark.parametrize("clip", [optax.clip_by_global_norm, fse.clip_by_global_norm])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_16_bit_gradients_are_not_rounded_again(clip, dtype):
    tx = fse.chain(clip(1e-3), fse.sgd8bit(1.0, momentum=0.9, state_format=SMALL))
    params, grads = {"kernel": jnp.zeros((64, 64))}, {"kernel": gradients()["kernel"].astype(dtype)}
    new, _ = jitted_fused(tx)(grads, tx.init(params), params)
    wide = grads["kernel"].astype(jnp.float32)
    np.testing.assert_allclose(new["kernel"], -wide * (1e-3 / jnp.linalg.norm(wide)), rtol=1e-5)


@pytest.mark.parametrize("wrap", [fse.stochastic_round_updates, fse.in_place], ids=lambda wrap: wrap.__name__)
def test_wrappers_pass_the_factor_on(wrap):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters())
    clip = optax.clip_by_global_norm(0.5)
    alone, grads = wrap(build(OPTIMIZERS[1])), gradients()
    ours = wrap(fse.chain(clip, build(OPTIMIZERS[1]))) if wrap is fse.in_place else fse.chain(clip, alone)
    clipped, _ = clip.update(grads, clip.init(params))
    found, _ = with_updates(ours)(grads, ours.init(params), params)
    want, _ = with_updates(alone)(clipped, alone.init(params), params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert (np.asarray(a, np.float32) != np.asarray(b, np.float32)).mean() < 0.01  # an ulp of the gradient apart


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_does_as_optax(bad):
    params, grads = parameters(), gradients()
    grads["kernel"] = grads["kernel"].at[0, 0].set(bad)
    for skip in (False, True):
        inner = fse.adamw8bit(1e-2, skip_nonfinite=skip)
        txs = [make(optax.clip_by_global_norm(0.5), inner) for make in (fse.chain, optax.chain)]
        ours, theirs = (jitted(tx)(grads, tx.init(params), params)[0] for tx in txs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(a, b, rtol=2e-6)


def test_no_gradient_is_written_to_memory():
    """Of the compiled step, temporaries are smaller than one gradient, also if a schedule sets the norm."""
    params = {f"kernel_{k}": jnp.ones((512, 512)) for k in range(4)}

    def temporaries(tx):
        def step(params, state, grads):
            return fse.fused_update(tx, grads, state, params)

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    alone = temporaries(fse.adamw8bit(1e-3))
    for before in (optax.clip_by_global_norm(1.0), fse.clip_by_global_norm(1.0), fse.percentile_clipping(5)):
        assert temporaries(fse.chain(before, fse.adamw8bit(1e-3))) - alone < 4 * 512 * 512


def test_a_traced_norm_of_inject_hyperparams_is_used():
    @optax.inject_hyperparams
    def make(max_norm):
        return fse.chain(optax.clip_by_global_norm(max_norm), fse.sgd8bit(1.0, **FP32))

    tx, params, grads = make(max_norm=lambda count: 0.5 / (1 + count)), parameters(), gradients()
    state = tx.init(params)
    for k in range(2):
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(optax.tree.norm(updates), 0.5 / (1 + k), rtol=1e-5)


def test_a_loss_scale_may_change_from_step_to_step_and_rewrites_no_gradient():
    """The optimizer is made in the step, from an array. The updates are those of the gradients without the scale."""

    def make(loss_scale):
        return fse.chain(optax.scale(1 / loss_scale), optax.clip_by_global_norm(0.5), fse.adamw8bit(1e-2))

    @jax.jit
    def step(params, state, grads, loss_scale):
        scaled = jax.tree.map(lambda g: (g * loss_scale).astype(jnp.float16), grads)
        return fse.fused_update(make(loss_scale), scaled, state, params)

    params, tiny = parameters(), jax.tree.map(lambda g: g * 1e-9, gradients())  # zero in float16
    plain = fse.chain(optax.clip_by_global_norm(0.5), fse.adamw8bit(1e-2))
    found, state = params, make(1.0).init(params)
    want, own = params, plain.init(params)
    for scale in (2.0**30, 2.0**31, 2.0**32):
        found, state = step(found, state, tiny, jnp.float32(scale))
        want, own = jitted(plain)(tiny, own, want)[:2]
        for a, b, p in zip(*map(jax.tree.leaves, (found, want, params))):
            assert (np.asarray(a) != np.asarray(p)).mean() > 0.9
            np.testing.assert_allclose(a - p, b - p, atol=2e-3)
    assert step._cache_size() <= 1


def test_a_scale_for_each_element_is_left_to_optax():
    tx = fse.chain(optax.scale(jnp.arange(64.0)[None]), fse.sgd8bit(1.0, **FP32))
    params = {"kernel": jnp.zeros((4, 64))}
    updates, _ = tx.update({"kernel": jnp.ones((4, 64))}, tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], -jnp.broadcast_to(jnp.arange(64.0), (4, 64)))
