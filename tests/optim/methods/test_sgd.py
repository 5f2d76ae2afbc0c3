"""Tests SGD against steps by hand, and every option against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import ALL_FP32, SMALL, assert_nearly, assert_same_bits, gradients, jitted, parameters, run


def test_two_steps_by_hand():
    """A block of two elements: 1/4 of the largest is level 63.5 of 127 in the root domain, to even 64."""
    tx = fse.scale_by_sgd8bit(momentum=0.5, state_format=SMALL)
    updates, state = jax.jit(tx.update)(jnp.array([1.0, -0.25]), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(updates, [1.0, -0.25])
    np.testing.assert_array_equal(state.trace, np.array([127, -64], np.int8))
    updates, state = jax.jit(tx.update)(jnp.array([0.0, 1.0]), state)
    np.testing.assert_allclose(updates, [0.5, 1.0 - 0.5 * (64 / 127) ** 2], rtol=1e-6)


@pytest.mark.parametrize(
    "hyper", [{}, {"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.9, "nesterov": True}], ids=str
)
@pytest.mark.one_in(4)
def test_every_option_equals_optax_in_32_bits_and_nearly_in_8(hyper):
    ours, theirs = fse.sgd8bit(0.1, **hyper, rules=ALL_FP32), optax.sgd(0.1, **hyper)
    assert_same_bits(run(ours, parameters())[0], run(theirs, parameters())[0])
    params, grads = parameters(), gradients()
    in_8bit = fse.sgd8bit(0.1, **hyper, state_format=SMALL)
    new, state, updates = jitted(in_8bit)(grads, in_8bit.init(params), params)
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2])
    if "momentum" in hyper:
        assert state[0].trace["kernel"].dtype == jnp.int8
    else:
        assert state[0].trace is None
    assert_nearly(fse.fused_update(in_8bit, grads, in_8bit.init(params), params)[0], new)


def test_without_momentum_there_is_no_state_to_store():
    report = fse.describe(fse.sgd8bit(0.1), parameters())
    assert [(row.bits, row.reason, row.bytes) for row in report.rows] == [(32, "no moments", 0)] * 3
    params = {"kernel": jnp.ones((64, 64))}
    for state_format in (fse.StateFormat("dynamic", min_size=0), fse.StateFormat(block_size=48, min_size=0)):
        tx = fse.sgd8bit(0.1, rules=(("kernel", fse.Rule(8, state_format)),))
        assert tx.update(params, tx.init(params), params)[0] is not None


def test_a_dtype_for_the_accumulator_is_refused():
    with pytest.raises(TypeError, match="`accumulator_dtype` must be None"):
        fse.sgd8bit(0.1, 0.9, accumulator_dtype=jnp.bfloat16)
