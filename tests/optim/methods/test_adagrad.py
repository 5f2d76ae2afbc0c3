"""Tests Adagrad against steps by hand and optax, and small sums in a block with a growing sum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import ALL_FP32, SMALL, assert_nearly, assert_same_bits, gradients, jitted, parameters, run


def test_two_steps_by_hand():
    """Sums 1 and 1/16: level 127.5 of 255 in the fourth-root domain, to even 128."""
    tx = fse.scale_by_adagrad8bit(0.0, eps=0.0, state_format=SMALL)
    updates, state = jax.jit(tx.update)(jnp.array([1.0, 0.25]), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [1.0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(state.sum_of_squares, np.array([255, 128], np.uint8))
    updates, _ = jax.jit(tx.update)(jnp.array([1.0, 1.0]), state)
    np.testing.assert_allclose(updates, [2**-0.5, ((128 / 255) ** 4 + 1) ** -0.5], rtol=1e-6)


@pytest.mark.parametrize("hyper", [{}, {"initial_accumulator_value": 0.0}, {"eps": 1e-3}], ids=str)
@pytest.mark.one_in(5)
def test_every_option_equals_optax_in_32_bits_and_nearly_in_8(hyper):
    ours, theirs = fse.adagrad8bit(1e-2, **hyper, rules=ALL_FP32), optax.adagrad(1e-2, **hyper)
    assert_same_bits(run(ours, parameters())[0], run(theirs, parameters())[0])
    params, grads = parameters(), gradients()
    in_8bit = fse.adagrad8bit(1e-2, **hyper, state_format=SMALL)
    _, state, updates = jitted(in_8bit)(grads, in_8bit.init(params), params)
    assert state[0].sum_of_squares["kernel"].dtype == jnp.uint8
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2])


def test_the_first_sum_is_stored_exactly():
    state = fse.scale_by_adagrad8bit(0.3, state_format=SMALL).init({"kernel": jnp.zeros((64, 64))})
    codes, absmax = state.sum_of_squares["kernel"], state.sum_of_squares_absmax["kernel"]
    value = fse.ops.dequantize(codes, absmax, signed=False, block_size=32)
    np.testing.assert_array_equal(value, np.full((64, 64), 0.3, np.float32))


@pytest.mark.parametrize(("rounding", "low", "high"), [("nearest", 1.5, 100.0), ("stochastic", 0.97, 1.03)])
def test_stochastic_rounding_keeps_the_mean_of_sums_that_nearest_inflates(rounding, low, high):
    """One sum of each block grows by 0.5% per step, too little to change the other codes by rounding to nearest."""
    state_format = fse.StateFormat(rounding=rounding, block_size=32, block_axis=-1, min_size=0)
    tx = fse.scale_by_adagrad8bit(1.0, state_format=state_format)
    params = {"kernel": jnp.zeros((256, 32))}
    state = tx.init(params)

    def body(state, step):
        grads = {"kernel": params["kernel"].at[:, 0].set(jnp.sqrt(0.005 * 1.005**step))}
        return tx.update(grads, state, params)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(body, state, jnp.arange(200.0)))(state)
    codes, absmax = state.sum_of_squares["kernel"], state.sum_of_squares_absmax["kernel"]
    value = fse.ops.dequantize(codes, absmax, signed=False, block_size=32)
    assert low < float(value[:, 1:].mean()) < high
    np.testing.assert_allclose(value[:, 0], 1.005**200, rtol=1e-4)


def test_the_dynamic_codec_stores_the_sum_with_signed_codes():
    for codec, top in (("dynamic", 128), ("root", 255), ("linear", 255)):
        tx = fse.adagrad8bit(1e-2, 0.1, state_format=fse.StateFormat(codec, min_size=0))
        state = tx.init({"kernel": jnp.zeros((64, 64))})[0]
        assert np.unique(state.sum_of_squares["kernel"]).tolist() == [top]
