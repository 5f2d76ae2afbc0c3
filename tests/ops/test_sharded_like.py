"""Tests of results that are sharded like an argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_stable_embed.ops.sharded_like import sharded_like

X = jnp.arange(8.0).reshape(4, 2)


def on_a_mesh(x):
    mesh = Mesh(np.array(jax.devices()[:4]), ("a",), axis_types=(AxisType.Auto,))
    return jax.device_put(x, NamedSharding(mesh, P("a")))


def test_a_new_array_is_sharded_like_the_other():
    other = on_a_mesh(X)

    def ones(other):
        return sharded_like(jnp.ones(other.shape), other)

    assert jax.jit(ones)(other).sharding.is_equivalent_to(other.sharding, 2)


def test_one_function_always_makes_the_same_program():
    def both(x):
        return sharded_like(x + 1, x), sharded_like(x + 2, x)

    first, second = (jax.jit(lambda x: both(x)).lower(on_a_mesh(X)).as_text() for _ in range(2))
    assert first == second and first.count("sharding_group") == 4
    assert "group_id=1" in first and "group_id=2" not in first


def test_a_program_for_one_device_has_no_groups():
    assert "sharding_group" not in jax.jit(lambda x: sharded_like(x + 1, x)).lower(X).as_text()


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, None), (None, 1)])
def test_vmap_keeps_the_value(axes):
    args = [X[0] if axis is None else jnp.moveaxis(X, 0, axis) for axis in axes]
    expected = X if axes[0] is not None else jnp.broadcast_to(X[0], (4, 2))
    np.testing.assert_array_equal(jax.vmap(sharded_like, axes)(*args), expected)


@pytest.mark.parametrize("compile", [jax.jit, lambda f: f])
def test_the_derivative_is_that_of_the_first_argument(compile):
    def loss(x, other):
        return jnp.sum(sharded_like(x**2, other**2))

    for k, expected in enumerate((2 * X, jnp.zeros_like(X))):
        np.testing.assert_array_equal(compile(jax.grad(loss, k))(X, X), expected)
