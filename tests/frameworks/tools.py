"""Helpers for the flows of frameworks: optimizers, batches that equal their gradients, and checks of states."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.tools import SMALL, is_codes, jitted

OPTIMIZERS = {
    "adamw8bit": functools.partial(fse.adamw8bit, 0.01, weight_decay=0.1),
    "in_place": lambda **options: fse.in_place(fse.adamw8bit(0.01, weight_decay=0.1, **options)),
    "lion8bit": functools.partial(fse.lion8bit, 0.01, weight_decay=0.1),
    "quantize_state": functools.partial(fse.quantize_state, optax.adamw(0.01, weight_decay=0.1)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# bitsandbytes' blocks. 768 columns give three blocks, a number that mesh axes of two or four do not divide.
OF_256 = fse.StateFormat(block_size=256, block_axis=-1, min_size=0)
every_format = pytest.mark.parametrize("state_format", [SMALL, OF_256], ids=["default blocks", "blocks of 256"])


@functools.cache
def build(name, state_format=SMALL):
    return OPTIMIZERS[name](state_format=state_format)


def batch_of(params, step=0):
    """Arrays with the shapes of the parameters, new ones for every step. Their magnitudes span four decades."""
    rng = np.random.default_rng(100 + step)

    def one(p):
        return (rng.normal(size=p.shape) * 10 ** rng.uniform(-4, 0, p.shape)).astype(np.float32)

    return jax.tree.map(one, params)


def loss_of(params, batch):
    """A loss that is linear in the parameters. Its gradient is the batch itself, bit for bit, on every mesh."""
    return sum(jnp.sum(p * b) for p, b in zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True))


def without_framework(tx, shapes, steps=3):
    """Parameters and state after some steps on one device, starting from parameters of ones."""
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    state = jax.jit(tx.init)(params)
    for i in range(steps):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), batch_of(shapes, i), params)
        params, state, _ = jitted(tx)(grads, state, params)
    return params, state


def by_path(tree):
    """Arrays by path, without the "/value" that NNX variables append."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): x for path, x in pairs}


def assert_8bit(state, params):
    """Checks that moments of kernels are in 8 bits and nothing else is. Returns pairs (codes, their parameter)."""
    pairs, parameters = [], by_path(params)
    for path, x in by_path(state).items():
        if "absmax" not in path and re.search("(?<!norm/)kernel", path):
            assert is_codes(x), path
            (of,) = [p for name, p in parameters.items() if path.endswith(f"/{name}")]
            pairs.append((x, of))
        else:
            assert not is_codes(x) or path.endswith("format"), path
    assert pairs
    return pairs


def assert_codes_are_sharded_like_parameters(state, params):
    """Checks that codes are sharded like their parameters, in any kind of memory, and that some are sharded at all."""
    pairs = assert_8bit(state, params)
    for codes, p in pairs:
        sharding = codes.sharding.with_memory_kind(p.sharding.memory_kind)
        assert codes.shape == p.shape and sharding.is_equivalent_to(p.sharding, p.ndim)
    assert any(not p.sharding.is_fully_replicated for _, p in pairs)


def assert_same_numbers(a, b):
    """Checks that two trees have the same codes, and floats within two roundings, under the same paths.

    Two roundings, because XLA may contract a product with the framework's `p + u` on one mesh and not on another.
    """
    a, b = by_path(a), by_path(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert x.dtype == b[path].dtype, path
        rtol = 3e-7 if jnp.issubdtype(x.dtype, jnp.floating) else 0
        np.testing.assert_allclose(np.asarray(x), np.asarray(b[path]), rtol=rtol, err_msg=path)
