"""Tests how the moments of every optimizer are rounded, and what could go wrong with dither."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.ops.counter_random import rounding_key, uniform
from tests.cases import OPTIMIZERS
from tests.tools import SMALL, assert_same_bits, gradients, parameters

PARAMS = {"kernel": jnp.ones((64, 64))}


def rounding(tx, params=PARAMS):
    """Returns the rounding of each moment in the report, by name."""
    (row, *_) = [row for row in fse.describe(tx, params).rows if row.bits == 8]
    return dict(text.split() for text in row.rounding.split(", "))


# The rounding that the decay of each moment gives, with optax's default hyper-parameters.
BY_DEFAULT = {
    "adam8bit": {"mu": "nearest", "nu": "dither"},
    "adamw8bit": {"mu": "nearest", "nu": "dither"},
    "lamb8bit": {"mu": "nearest", "nu": "dither"},
    "sgd8bit": {"trace": "nearest"},
    "lars8bit": {"trace": "nearest"},
    "rmsprop8bit": {"nu": "nearest"},
    "adagrad8bit": {"sum_of_squares": "dither"},
    "lion8bit": {"mu": "nearest"},
    "ademamix8bit": {"m1": "nearest", "m2": "dither", "nu": "dither"},
}


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_slow_moments_are_dithered_by_default(name):
    options = {"momentum": 0.9} if name == "sgd8bit" else {}
    make = getattr(fse, name)
    assert rounding(make(1e-3, state_format=SMALL, **options)) == BY_DEFAULT[name]
    explicit = fse.StateFormat(rounding="nearest", min_size=0)
    assert set(rounding(make(1e-3, state_format=explicit, **options)).values()) == {"nearest"}


def test_every_optimizer_is_in_the_table():
    assert {case.name for case in OPTIMIZERS} == BY_DEFAULT.keys()


def test_the_decay_decides_also_that_of_a_rule():
    params = {"a": {"kernel": jnp.ones((64, 64))}, "b": {"kernel": jnp.ones((64, 64))}}
    tx = fse.adamw8bit(1e-3, state_format=SMALL, rules=(("^b", fse.Rule(b2=0.95)),))
    rows = {row.path: row.rounding for row in fse.describe(tx, params).rows}
    assert rows == {"a/kernel": "mu nearest, nu dither", "b/kernel": "mu nearest, nu nearest"}
    for decay, found in ((0.95, "nearest"), (0.989, "nearest"), (0.99, "dither"), (0.9999, "dither")):
        assert rounding(fse.adamw8bit(1e-3, b2=decay, state_format=SMALL))["nu"] == found
    for decay, found in ((0.99, "nearest"), (0.999, "dither")):
        assert rounding(fse.adamw8bit(1e-3, b1=decay, state_format=SMALL))["mu"] == found
    assert rounding(fse.ademamix8bit(1e-3, b3=lambda count: 0.9, state_format=SMALL))["m2"] == "dither"


@pytest.mark.parametrize("kind", ["dither", "stochastic"])
def test_a_named_rounding_applies_to_second_and_slow_moments(kind):
    named = fse.StateFormat(rounding=kind, min_size=0)
    assert rounding(fse.adamw8bit(1e-3, b2=0.95, state_format=named)) == {"mu": "nearest", "nu": kind}
    assert rounding(fse.ademamix8bit(1e-3, state_format=named)) == {"m1": "nearest", "m2": kind, "nu": kind}
    assert rounding(fse.quantize_state(optax.adamw(1e-3), state_format=named)) == {"mu": "nearest", "nu": kind}


def test_the_default_applies_inside_of_inject_hyperparams():
    tx = optax.inject_hyperparams(fse.adamw8bit, hyperparam_dtype=jnp.float32)(1e-3, b2=0.999, state_format=SMALL)
    assert rounding(tx)["nu"] == "dither"


def test_the_table_of_quantize_state_has_the_rounding_of_each_field():
    assert rounding(fse.quantize_state(optax.adamw(1e-3), state_format=SMALL)) == {"mu": "nearest", "nu": "dither"}
    slow = fse.quantize_state(optax.contrib.ademamix(1e-3), state_format=SMALL)
    assert rounding(slow) == {"m1": "nearest", "m2": "dither", "nu": "dither"}
    assert rounding(fse.quantize_state(optax.amsgrad(1e-3), state_format=SMALL))["nu_max"] == "nearest"
    own = fse.quantize_state(optax.adamw(1e-3), {"mu": "signed, dither", "nu": "unsigned, nearest"}, state_format=SMALL)
    assert rounding(own) == {"mu": "dither", "nu": "nearest"}
    # Without a count the number of the step is not known.
    assert rounding(fse.quantize_state(optax.adagrad(1e-3), state_format=SMALL)) == {"sum_of_squares": "nearest"}
    counted = fse.quantize_state(optax.adagrad(optax.constant_schedule(1e-3)), state_format=SMALL)
    assert rounding(counted) == {"sum_of_squares": "dither"}


def test_bitsandbytes_optimizers_round_to_nearest_as_there():
    assert set(rounding(fse.interop.bitsandbytes.adamw8bit(1e-3), {"kernel": jnp.ones((64, 512))}).values()) == {
        "nearest"
    }


# --- what could go wrong ---------------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_same_steps():
    tx, params = fse.adamw8bit(1e-2, state_format=SMALL), parameters()
    step = jax.jit(tx.update)
    state, kept = tx.init(params), None
    for i in range(6):
        _, state = step(gradients(i), state, params)
        kept = jax.tree.map(np.asarray, state) if i == 2 else kept
    for i in range(3, 6):
        _, kept = step(gradients(i), kept, params)
    assert_same_bits(kept, state)


def test_parameters_of_one_shape_are_rounded_in_different_ways():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    tx = fse.scale_by_adam8bit(state_format=SMALL)
    grads = {name: jnp.linspace(0.1, 1.0, 4096).reshape(64, 64) for name in params}
    _, state = tx.update(grads, tx.init(params), params)
    codes = [np.asarray(state.nu[name], int) for name in params]
    assert 0.1 < np.mean(codes[0] != codes[1]) < 0.9


def test_equal_numbers_in_a_block_are_right_on_average():
    tx = fse.scale_by_adam8bit(state_format=SMALL)
    grads = jnp.full((64, 64), 0.3).at[0].set(1.0)
    state = tx.init(PARAMS)
    for _ in range(20):
        _, state = jax.jit(tx.update)({"kernel": grads}, state, PARAMS)
    as_fp32 = fse.scale_by_adam8bit(rules=((".*", 32),))
    nu = np.asarray(fse.convert_state(tx, as_fp32, PARAMS, state).nu["kernel"])[1:]
    assert abs(nu.mean() / (0.09 * (1 - 0.999**20)) - 1) < 2e-3
    assert np.abs(nu.mean(axis=0) / nu.mean() - 1).max() < 0.02  # no column is rounded in one direction


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 13, 16, 64])
@pytest.mark.one_in(7)
def test_periodic_gradients_do_not_resonate_with_the_dither(period):
    """The error of second moments is at most twice that with constant sizes."""

    def error(period):
        ours, exact = (fse.scale_by_adam8bit(rules=rules, state_format=SMALL) for rules in ((), ((".*", 32),)))

        def step(states, i):
            size = jnp.where(i % period == 0, 4.0, 0.5) if period > 1 else 1.0
            g = {"kernel": size * jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (64, 64))}
            (u, mine), (want, theirs) = (tx.update(g, s, PARAMS) for tx, s in zip((ours, exact), states))
            return (mine, theirs), (jnp.sum((u["kernel"] - want["kernel"]) ** 2), jnp.sum(want["kernel"] ** 2))

        states = ours.init(PARAMS), exact.init(PARAMS)
        _, (errors, sizes) = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(400)))(states)
        return float(jnp.sqrt(errors[-100:].sum() / sizes[-100:].sum()))

    assert error(period) < 2 * error(1)


def test_the_dither_works_up_to_the_largest_count():
    index = jnp.arange(4096, dtype=jnp.uint32)
    for count in (0, 2**24, 2**31 - 2):
        numbers = [
            np.asarray(uniform("dither", index, rounding_key("dither", "a", jnp.int32(count - k)))) for k in (0, 1)
        ]
        for u in numbers:
            assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 1e-2
        assert np.abs(numbers[0] - numbers[1]).min() > 0.3  # the golden ratio is far from an integer


@pytest.mark.parametrize("name", ["ademamix8bit", "adagrad8bit"])
def test_optimizers_with_slow_sums_converge_as_fast_as_in_fp32(name):
    """On a quadratic after 600 steps. With rounding to nearest both end at a larger loss."""
    rng = np.random.default_rng(0)
    scales, target = (jnp.asarray(np.exp(rng.normal(size=(64, 64))), jnp.float32) for _ in range(2))
    options = {"ademamix8bit": {"learning_rate": 3e-3}, "adagrad8bit": {"learning_rate": 0.05}}[name]

    def loss(params):
        return jnp.sum(scales * (params["kernel"] - target) ** 2)

    def after(**storage):
        tx = getattr(fse, name)(**options, **storage)

        def step(carry, _):
            params, state = carry
            return fse.fused_update(tx, jax.grad(loss)(params), state, params), None

        params = {"kernel": jnp.zeros((64, 64))}
        (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 600))((params, tx.init(params)))
        return float(loss(params))

    exact = after(rules=((".*", 32),))
    found = after(state_format=SMALL)
    nearest = after(state_format=fse.StateFormat(rounding="nearest", min_size=0))
    assert abs(found - exact) < 0.5 * abs(nearest - exact)
