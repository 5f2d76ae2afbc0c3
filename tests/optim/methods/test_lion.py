"""Tests Lion against steps by hand, and every option against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import ALL_FP32, SMALL, assert_nearly, assert_same_bits, gradients, jitted, parameters, run


def test_two_steps_by_hand():
    """Checks the rounding and the sign of two moments, 0.01 and 0.0025.

    1/4 of the largest is level 63.5 of 127, which rounds to even, 64. Then the moment decides the sign, because
    0.9 * 0.01 * (64 / 127)^2 = 0.00229 is more than 0.1 * 0.02.
    """
    tx = fse.scale_by_lion8bit(state_format=SMALL)
    updates, state = jax.jit(tx.update)(jnp.array([1.0, 0.25]), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(updates, [1.0, 1.0])
    np.testing.assert_array_equal(state.mu, np.array([127, 64], np.int8))
    updates, _ = jax.jit(tx.update)(jnp.array([-0.02, -0.02]), state)
    np.testing.assert_array_equal(updates, [1.0, 1.0])
    updates, _ = jax.jit(tx.update)(jnp.array([-0.1, -0.02]), state)
    np.testing.assert_array_equal(updates, [-1.0, 1.0])


@pytest.mark.parametrize("hyper", [{}, {"b1": 0.5, "b2": 0.9}, {"weight_decay": 0.0}, {"weight_decay": 0.5}], ids=str)
@pytest.mark.one_in(4)
def test_every_option_equals_optax_in_32_bits_and_nearly_in_8(hyper):
    ours, theirs = fse.lion8bit(1e-2, **hyper, rules=ALL_FP32), optax.lion(1e-2, **hyper)
    assert_same_bits(run(ours, parameters())[0], run(theirs, parameters())[0])
    params, grads = parameters(), gradients()
    in_8bit = fse.lion8bit(1e-2, **hyper, state_format=SMALL)
    _, state, updates = jitted(in_8bit)(grads, in_8bit.init(params), params)
    assert state[0].mu["kernel"].dtype == jnp.int8
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2])
