"""Tests that TrainState and nnx.Optimizer write parameters in place on TPU, with one kernel per array."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from benchmarks.counted import compiled as counted
from tests.ahead_of_time.test_tpu import COLLECTIVE

SHAPE = (4096, 4096)
PARAMETERS = 4096 * 4096


class Model(nnx.Module):
    def __init__(self, dtype):
        self.up = nnx.Linear(*SHAPE, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))


def train_state(tx, dtype):
    """The step of a TrainState, and the shapes of its arguments."""
    params = {"up": jax.ShapeDtypeStruct(SHAPE, dtype)}
    state = jax.eval_shape(lambda params: TrainState.create(apply_fn=None, params=params, tx=tx), params)
    return lambda state, grads: state.apply_gradients(grads=grads), state, params


def nnx_optimizer(tx, dtype):
    """The step of an nnx.Optimizer, and the shapes of its arguments."""
    both = nnx.eval_shape(lambda: (model := Model(dtype), nnx.Optimizer(model, tx, wrt=nnx.Param)))
    graphdef, state = nnx.split(both)

    def step(state, grads):
        model, optimizer = nnx.merge(graphdef, state)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    return step, state, nnx.state(both[0], nnx.Param)


@pytest.mark.parametrize("make", [train_state, nnx_optimizer], ids=["TrainState", "nnx.Optimizer"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.one_in(5)
def test_a_step_moves_the_least_bytes_and_needs_no_temporaries(topology, chip, dtype, make):
    device = topology(counted.TOPOLOGIES[chip])[0]
    place = jax.sharding.SingleDeviceSharding(device)
    step, *args = make(fse.in_place(fse.adamw8bit(1e-3)), dtype)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    memory, wide = compiled.memory_analysis(), jnp.dtype(dtype).itemsize
    assert counted.kernels(compiled.as_text()) == 1
    assert counted.memory_bytes(compiled.as_text()) / PARAMETERS <= 3 * wide + 4 + 0.1
    assert memory.temp_size_in_bytes == 0
    assert memory.alias_size_in_bytes / PARAMETERS >= wide + 2


def apply_updates(tx, dtype):
    """The step of T5X, EasyDeL and kauldron: `tx.update` and `optax.apply_updates`."""
    params = {"up": jax.ShapeDtypeStruct(SHAPE, dtype)}

    def step(both, grads):
        params, state = both
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, jax.eval_shape(tx.init, params)), params


DOORS = {"TrainState": train_state, "nnx.Optimizer": nnx_optimizer, "apply_updates": apply_updates}
SPECS = {"FSDP": P("data"), "tensor": P(None, "model"), "both": P("data", "model"), "ZeRO-1": P(("data", "model"))}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.one_in(4)
def test_a_step_on_a_mesh_moves_the_least_bytes_of_each_chip(topology, door, spec):
    """All frameworks' steps are one of these three, with in_shardings and out_shardings on Auto axes."""
    mesh = Mesh(np.reshape(topology("v5e:2x2"), (2, 2)), ("data", "model"))
    step, *args = DOORS[door](fse.in_place(fse.adamw8bit(1e-3)), jnp.float32)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, SPECS[spec] if x.ndim == 2 else P()))

    args = jax.tree.map(place, args)
    where = jax.tree.map(lambda x: x.sharding, args[0])
    compiled = jax.jit(step, donate_argnums=0, out_shardings=where).lower(*args).compile()
    elements = math.prod(jax.tree.leaves(args[1])[0].sharding.shard_shape(SHAPE))
    text = compiled.as_text()
    assert counted.kernels(text) == 1 and not COLLECTIVE.search(text)
    assert counted.memory_bytes(text) / elements <= 16.1
    assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("clip", [optax.clip_by_global_norm, fse.clip_by_global_norm], ids=["optax", "fse"])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.one_in(3)
def test_clipping_before_it_only_reads_the_gradients_once_more(topology, chip, clip):
    device = topology(counted.TOPOLOGIES[chip])[0]
    place = jax.sharding.SingleDeviceSharding(device)
    step, *args = train_state(fse.in_place(fse.chain(clip(1.0), fse.adamw8bit(1e-3))), jnp.float32)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    assert counted.kernels(compiled.as_text()) == 1
    assert counted.memory_bytes(compiled.as_text()) / PARAMETERS <= 20.1
    assert compiled.memory_analysis().temp_size_in_bytes / PARAMETERS < 0.05


@pytest.mark.parametrize("how", ["flattened", "through_jit"])
def test_an_update_that_was_flattened_compiles_to_the_same_program(topology, how):
    place = jax.sharding.SingleDeviceSharding(topology("v5e:2x2")[0])
    tx = fse.in_place(fse.adamw8bit(1e-3))
    params = {"kernel": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, jax.eval_shape(tx.init, params), params),
    )

    def step(params, state, grads):
        update = jax.jit(tx.update) if how == "through_jit" else tx.update
        updates, state = update(grads, state, params)
        updates = jax.tree.map(lambda x: x, updates)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    assert counted.kernels(compiled.as_text()) == 1
    assert counted.memory_bytes(compiled.as_text()) / PARAMETERS <= 16.1
    assert compiled.memory_analysis().temp_size_in_bytes == 0
