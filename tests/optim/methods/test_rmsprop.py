"""Tests RMSprop against steps by hand, and every option against optax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import (
    ALL_FP32,
    SMALL,
    assert_nearly,
    assert_same_bits,
    gradients,
    jitted,
    jitted_fused,
    parameters,
    run,
)


def test_two_steps_by_hand():
    """Squares 0.1 and 0.1/16: level 127.5 of 255 in the fourth-root domain, to even 128."""
    tx = fse.scale_by_rmsprop8bit(decay=0.9, eps=0.0, state_format=SMALL)
    updates, state = jax.jit(tx.update)(jnp.array([1.0, 0.25]), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [0.1**-0.5] * 2, rtol=1e-6)
    np.testing.assert_array_equal(state.nu, np.array([255, 128], np.uint8))
    updates, _ = jax.jit(tx.update)(jnp.array([1.0, 1.0]), state)
    v = np.array([0.9 * 0.1 + 0.1, 0.9 * 0.1 * (128 / 255) ** 4 + 0.1])
    np.testing.assert_allclose(updates, v**-0.5, rtol=1e-6)


OPTIONS = [
    {"centered": centered, "momentum": momentum, "bias_correction": bias}
    for centered, momentum, bias in itertools.product((False, True), (None, 0.9), (False, True))
] + [
    {"eps_in_sqrt": False, "eps": 1e-3},
    {"initial_scale": 0.5, "centered": True},
    {"momentum": 0.9, "nesterov": True, "decay": 0.99},
]


@pytest.mark.parametrize("hyper", OPTIONS, ids=str)
@pytest.mark.one_in(7)
def test_every_option_equals_optax_in_32_bits_and_nearly_in_8(hyper):
    # A first step that is centered and corrected divides by eps and the rounding of v - m^2 = 0.
    hyper = {"eps": 1.0 if hyper.get("centered") and hyper.get("bias_correction") else 1e-6} | hyper
    ours, theirs = fse.rmsprop8bit(1e-2, **hyper, rules=ALL_FP32), optax.rmsprop(1e-2, **hyper)
    # XLA's root on CPU: its last bit depends on the loop that it is compiled into.
    assert_nearly(run(ours, parameters())[0], run(theirs, parameters())[0], rtol=5e-7)
    params, grads = parameters(), gradients()
    in_8bit = fse.rmsprop8bit(1e-2, **hyper, state_format=SMALL)
    _, state, updates = jitted(in_8bit)(grads, in_8bit.init(params), params)
    stored = [getattr(state[0], name) for name in ("nu", "mu", "trace")]
    assert [x is not None for x in stored] == [True, hyper.get("centered", False), hyper.get("momentum") is not None]
    assert {x["kernel"].dtype.itemsize for x in stored if x is not None} == {1}
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2], rtol=1e-5)
    fused, fused_state = jitted_fused(in_8bit)(grads, in_8bit.init(params), params)
    assert_same_bits(fused_state, state)
    assert_nearly(fused, optax.apply_updates(params, updates))


def test_a_centered_variance_is_never_negative_on_8bit_leaves():
    """The gradient has no noise, so v = m^2, but the codes of m and v are rounded separately."""
    tx = fse.rmsprop8bit(1e-3, centered=True, state_format=SMALL)
    theirs = optax.rmsprop(1e-3, centered=True)
    rng = np.random.default_rng(0)
    grads = {"kernel": jnp.asarray(10 ** rng.uniform(-3, 0, (64, 64)), jnp.float32)}
    params = {"kernel": jnp.zeros((64, 64))}
    (new, state), (_, _) = run_constant(tx, grads, params), run_constant(theirs, grads, params)
    assert state[0].nu["kernel"].dtype == jnp.uint8
    assert np.isfinite(new["kernel"]).all()


def run_constant(tx, grads, params, steps=20):
    state = tx.init(params)
    for _ in range(steps):
        params, state, _ = jitted(tx)(grads, state, params)
    return params, state


def test_the_dynamic_codec_stores_the_second_moment_with_signed_codes():
    tx = fse.rmsprop8bit(1e-3, initial_scale=1.0, state_format=fse.StateFormat("dynamic", min_size=0))
    state = tx.init({"kernel": jnp.zeros((64, 64))})[0]
    assert np.unique(state.nu["kernel"]).tolist() == [128]


def test_a_centered_variance_cannot_be_one_per_row():
    with pytest.raises(ValueError, match="with centered=True rmsprop needs the variance of every element"):
        fse.rmsprop8bit(1e-2, centered=True, rules=((".*", "rowwise"),))


@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
@pytest.mark.parametrize("target", ["optax", "fp32"])
@pytest.mark.parametrize("storage", [8, "bf16"])
def test_a_centered_variance_is_not_negative_after_a_conversion(codec, target, storage):
    """With nearly constant gradients the variance is small, and rounding may make the second moment too small."""
    params = {"kernel": jnp.ones((64, 96))}
    before = fse.rmsprop8bit(
        1e-3, centered=True, rules=((".*", storage),), state_format=fse.StateFormat(codec) if storage == 8 else SMALL
    )
    after = optax.rmsprop(1e-3, centered=True)
    if target == "fp32":
        after = fse.rmsprop8bit(1e-3, centered=True, rules=((".*", 32),))
    mean = jax.random.normal(jax.random.key(0), (64, 96))
    state = before.init(params)
    for i in range(10):
        grads = {"kernel": mean * (1 + 1e-3 * jax.random.normal(jax.random.key(i), (64, 96)))}
        _, state = before.update(grads, state, params)
    converted = fse.convert_state(before, after, params, state)
    updates, _ = after.update({"kernel": mean}, converted, params)
    assert jnp.isfinite(updates["kernel"]).all()
