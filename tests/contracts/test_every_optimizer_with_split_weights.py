"""Tests every optimizer inside `split_weights`: the bits of float32 training, equal paths, meshes, checkpoints."""

import functools

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.contracts.test_every_optimizer_on_meshes import mesh_of, place
from tests.tools import assert_nearly, assert_same_bits, build, every_optimizer, gradients, parameters

STEPS = 3


@functools.cache
def split(case, bits):
    return fse.split_weights(build(case), bits)


@functools.cache
def fused(tx):
    return jax.jit(lambda params, state, grads: fse.fused_update(tx, grads, state, params))


@functools.cache
def updated(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(step, both, first=0):
    for i in range(first, first + STEPS):
        both = step(*both, gradients(i))
    return both


@every_optimizer
def test_32_bits_train_like_float32_parameters_bit_for_bit(case):
    params, state = run(fused(split(case, 32)), fse.from_master_weights(split(case, 32), parameters()))
    want, own = run(fused(build(case)), (parameters(), build(case).init(parameters())))
    assert_same_bits(fse.master_weights(split(case, 32), params, state), want)
    assert_same_bits(state.inner_state, own)


@every_optimizer
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.one_in(3)
def test_update_and_in_place_have_the_bits_of_fused_update(case, bits):
    tx = split(case, bits)
    first = fse.from_master_weights(tx, parameters())
    want = run(fused(tx), first)
    assert_same_bits(run(updated(tx), first), want)
    assert_same_bits(run(updated(fse.in_place(tx)), first), want)


@every_optimizer
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.one_in(5)
def test_bits_do_not_depend_on_the_mesh(case, kind, bits):
    tx, mesh = split(case, bits), mesh_of(kind)
    weights = parameters() | {"kernel": jnp.linspace(-0.1, 0.1, 256 * 32).reshape(256, 32)}
    first = fse.from_master_weights(tx, weights)
    grads = gradients(0) | {"kernel": jnp.sin(jnp.arange(256.0 * 32)).reshape(256, 32)}
    want = fused(tx)(*first, grads)
    with jax.set_mesh(mesh):
        params = place(first[0], mesh, P("b", "a"))
        where = jax.tree.map(lambda x: x.sharding, fse.abstract_state(tx, params))
        found = fused(tx)(params, jax.device_put(first[1], where), place(grads, mesh, P("b", "a")))
    if not case.sums:
        assert_same_bits(found, want)
    assert_nearly(fse.master_weights(tx, *found), fse.master_weights(tx, *want), rtol=2.0**-14)
    remainder = found[1].remainder["kernel"]
    assert remainder.sharding.is_equivalent_to(NamedSharding(mesh, P("b", "a")), 2)


@every_optimizer
@pytest.mark.one_in(7)
def test_a_checkpoint_continues(case, tmp_path):
    tx = split(case, 24)
    both = run(fused(tx), fse.from_master_weights(tx, parameters()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at", both)
        checkpointer.wait_until_finished()
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), both[0])
        restored = checkpointer.restore(tmp_path / "at", (params, jax.eval_shape(tx.init, params)))
    assert_same_bits(restored, both)
    assert_same_bits(run(fused(tx), restored, STEPS), run(fused(tx), both, STEPS))


@every_optimizer
@pytest.mark.one_in(7)
def test_a_state_of_other_bits_is_refused_by_the_step_and_by_the_shapes_of_a_restore(case):
    tx, other = split(case, 24), split(case, 32)
    params, state = fse.from_master_weights(tx, parameters())
    assert state.format.shape != jax.eval_shape(other.init, params).format.shape  # orbax compares shapes, not dtypes
    with pytest.raises(ValueError, match="bits that made it"):
        fused(other)(params, state, gradients(0))
