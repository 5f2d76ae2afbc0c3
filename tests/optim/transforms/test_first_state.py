"""Tests which arrays of a first state are constants, and that they are made like those of `init` itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from flax_stable_embed.optim.transforms.first_state import FirstState
from tests.tools import assert_same_bits

PARAMS = {"kernel": jnp.arange(64.0 * 128).reshape(64, 128), "bias": jnp.ones(128, jnp.bfloat16)}
INITS = {
    "adam": optax.adam(1e-3).init,
    "adagrad": optax.adagrad(1e-3).init,
    "yogi": optax.yogi(1e-3).init,
    "adan": optax.adan(1e-3).init,
    "schedule_free": optax.contrib.schedule_free_adamw(1e-3).init,
    "injected": optax.inject_hyperparams(optax.adam)(1e-3).init,
    "jitted": jax.jit(optax.adam(1e-3).init),
    "noise": optax.add_noise(0.1, 0.5, 0).init,
    "multi_steps": optax.MultiSteps(optax.adam(1e-3), 2).init,
    "looks at values": lambda params: {"trace": params} if params["bias"][0] > 0 else params,
    "a list": lambda params: [jnp.full((3, 2), 0.5), params, None, jnp.zeros(())],
}


def without_keys(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_the_arrays_are_those_of_init(name, jitted):
    if jitted and name == "looks at values":
        pytest.skip("it cannot be traced")

    def made(params):
        first = FirstState(INITS[name], params)
        leaves, tree = jax.tree.flatten(first.shapes)
        return tree.unflatten(first.arrays(leaves))

    found = jax.jit(made)(PARAMS) if jitted else made(PARAMS)
    want = INITS[name](PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert_same_bits(without_keys(found), without_keys(want))


@pytest.mark.parametrize("name", ["adam", "jitted", "multi_steps"])
def test_moments_that_begin_with_zeros_are_known(name):
    first = FirstState(INITS[name], PARAMS)
    moments = [x for x in jax.tree.leaves(first.shapes) if x.shape == (64, 128)]
    assert len(moments) >= 2 and all(first.constant(x) == 0 for x in moments)


def test_what_depends_on_parameters_is_not_a_constant():
    first = FirstState(INITS["schedule_free"], PARAMS)
    assert first.constant(first.shapes.z["kernel"]) is None
    first = FirstState(INITS["adagrad"], PARAMS)
    np.testing.assert_allclose(first.constant(first.shapes[0].sum_of_squares["kernel"]), 0.1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_state_is_sharded_as_init_makes_it(kind):
    sharded = NamedSharding(jax.make_mesh((8,), ("x",), (kind,)), PartitionSpec("x"))
    params = jax.device_put(PARAMS, {"kernel": sharded, "bias": sharded})
    tx = fse.quantize_state(optax.adam(1e-3), rules=(("kernel", 32), ("bias", 32)))
    found, want = tx.init(params).inner[0].mu, optax.adam(1e-3).init(params)[0].mu
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, want)
    codes = fse.quantize_state(optax.adam(1e-3)).init(params).inner[0].mu["kernel"]
    assert codes.sharding == sharded and codes.dtype == jnp.int8


def test_variables_keep_their_metadata():
    params = nnx.State({"kernel": nnx.Param(PARAMS["kernel"], note="mine")})
    state = fse.quantize_state(optax.adam(1e-3)).init(params)
    mu = state.inner[0].mu["kernel"]
    assert mu.get_metadata()["note"] == "mine" and mu.get_value().dtype == jnp.int8


def test_init_under_jit_encodes_nothing():
    params = {"kernel": jax.ShapeDtypeStruct((2048, 2048), jnp.float32)}
    text = jax.jit(fse.quantize_state(optax.adamw(1e-3)).init).lower(params).as_text()
    assert "reduce" not in text and "sqrt" not in text
