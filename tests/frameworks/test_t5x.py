"""Tests T5X's flow, which gets logical axes of a state from `fse.interop.t5x_partition_rules`.

The flow is that of https://github.com/google-research/t5x/blob/main/t5x/optimizers.py (OptaxStatePartitionRules,
OptaxWrapper.derive_logical_axes), written again here.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.frameworks.t5x import AXES, SHAPES, placed, state_and_shardings
from tests.frameworks.tools import (
    assert_codes_are_sharded_like_parameters,
    assert_same_numbers,
    batch_of,
    build,
    every_optimizer,
    loss_of,
    without_framework,
)


def flow(tx, steps=3):
    params_where = jax.tree.map(placed, AXES)
    where = params_where, state_and_shardings(tx)[1]

    def init():
        params = jax.tree.map(lambda x: jnp.ones(x.shape), SHAPES)
        return params, tx.init(params)

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(init, out_shardings=where)()
    step = jax.jit(step, in_shardings=(*where, None), out_shardings=where, donate_argnums=(0, 1))
    for i in range(steps):
        params, state = step(params, state, batch_of(SHAPES, i))
    assert step._cache_size() <= 1
    return params, state


@every_optimizer
@pytest.mark.one_in(5, start=2)
def test_codes_are_sharded_like_parameters(name):
    tx = build(name)
    params, state = flow(tx)
    assert_codes_are_sharded_like_parameters(state, params)
    assert_same_numbers((params, state), without_framework(tx, SHAPES))
