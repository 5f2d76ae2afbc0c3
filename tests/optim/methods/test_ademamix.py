"""Tests AdEMAMix against steps by hand, and every option against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import ALL_FP32, SMALL, assert_nearly, assert_same_bits, gradients, jitted, parameters, run


def test_two_steps_by_hand():
    """Moments relative to the block's largest: 1/4 is level 63.5 of 127, to even 64; 1/16 is 127.5 of 255, to 128."""
    tx = fse.scale_by_ademamix8bit(b3=0.5, alpha=2.0, eps=0.0, state_format=SMALL)
    updates, state = jax.jit(tx.update)(jnp.array([1.0, 0.25]), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [1 + 2 * 0.5, 1 + 2 * 0.5], rtol=5e-5)
    for codes in (state.m1, state.m2):
        np.testing.assert_array_equal(codes, np.array([127, 64], np.int8))
    np.testing.assert_array_equal(state.nu, np.array([255, 128], np.uint8))
    updates, _ = jax.jit(tx.update)(jnp.array([1.0, 0.0]), state)
    quarter = (64 / 127) ** 2
    m1 = np.array([0.9 * 0.1 + 0.1, 0.9 * 0.1 * quarter]) / (1 - 0.9**2)
    m2 = np.array([0.5 * 0.5 + 0.5, 0.5 * 0.5 * quarter])
    v = np.array([0.999 * 0.001 + 0.001, 0.999 * 0.001 * (128 / 255) ** 4]) / (1 - 0.999**2)
    np.testing.assert_allclose(updates, (m1 + 2 * m2) / np.sqrt(v), rtol=5e-5)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"b1": 0.5, "b2": 0.9, "b3": 0.99, "alpha": 3.0, "eps": 1e-3},
        {"eps_root": 1e-6, "weight_decay": 0.5},
        {"alpha": optax.linear_schedule(0.0, 5.0, 4), "b3": optax.linear_schedule(0.9, 0.9999, 4)},
    ],
    ids=["defaults", "numbers", "decay", "schedules"],
)
@pytest.mark.one_in(4)
def test_every_option_equals_optax_in_32_bits_and_nearly_in_8(hyper):
    ours, theirs = fse.ademamix8bit(1e-2, **hyper, rules=ALL_FP32), optax.contrib.ademamix(1e-2, **hyper)
    (new, state), (expected, expected_state) = run(ours, parameters()), run(theirs, parameters())
    assert_same_bits(new, expected)
    assert int(state[0].count_m2) == int(expected_state[0].count_m2) == 3
    params, grads = parameters(), gradients()
    in_8bit = fse.ademamix8bit(1e-2, **hyper, state_format=SMALL)
    _, state, updates = jitted(in_8bit)(grads, in_8bit.init(params), params)
    assert state[0].m1["kernel"].dtype == state[0].m2["kernel"].dtype == jnp.int8
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2])


def test_stochastic_rounding_moves_the_slow_mean_where_rounding_to_nearest_stalls():
    """Gradients are 1, then as often -0.5. Another element of each block keeps the scale large."""
    errors = {}
    for rounding in ("nearest", "stochastic"):
        tx = fse.scale_by_ademamix8bit(b3=0.999, state_format=fse.StateFormat(rounding=rounding, min_size=0))
        is_large = jnp.arange(4096) % 256 == 0
        state, expected = tx.init({"kernel": jnp.ones(4096)}), 0.0
        step = jax.jit(lambda g, state, tx=tx: tx.update({"kernel": g}, state)[1])
        for i in range(600):
            g = 1.0 if i < 300 else -0.5
            state, expected = step(jnp.where(is_large, 20.0, g), state), 0.999 * expected + 0.001 * g
        m2 = fse.ops.dequantize(
            state.m2["kernel"], state.m2_absmax["kernel"], signed=True, codec="root", block_size=256
        )
        errors[rounding] = abs(float(m2.reshape(-1, 256)[:, 1:].mean()) / expected - 1)
    assert errors["stochastic"] < 0.05 < 0.5 < errors["nearest"]
