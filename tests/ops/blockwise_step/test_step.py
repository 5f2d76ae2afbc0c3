"""Tests steps of parameters that are split into a bfloat16 and a remainder, by the reference, on CPU and in kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_stable_embed.ops.blockwise.blocks import Blocks, choose_blocks
from flax_stable_embed.ops.blockwise_step import cpu, pallas_gpu, pallas_tpu
from flax_stable_embed.ops.blockwise_step.api import step_blockwise
from flax_stable_embed.ops.blockwise_step.reference import plain
from flax_stable_embed.ops.counter_random import linear_index, weight_bits
from flax_stable_embed.ops.split_weights import (
    join_in_kernel,
    join_weight,
    split_in_kernel,
    split_weight,
)
from tests.ops.blockwise_step.test_cpu import a_step, operands_of
from tests.ops.test_split_weights import sampled

KEY = jnp.uint32(0xDEADBEEF)


def interpreted(kernel):
    return lambda step, operands: kernel.run(step, operands, interpret=True)


RUN = {"chunks": cpu.run, "TPU kernel": interpreted(pallas_tpu), "GPU kernel": interpreted(pallas_gpu)}
# Blocks across rows and along them, short last blocks, several axes, and a vector.
ARRAYS = {
    "rows": ((256, 256), None),
    "short blocks": ((200, 256), None),
    "columns": ((64, 512), Blocks(1, 128)),
    "three axes": ((3, 64, 128), None),
    "vector": ((512,), Blocks(0, 256)),
}


def split_operands(step, shape, dtype=jnp.float32):
    """Returns operands of a parameter that is not split, and the same of one that is."""
    whole = operands_of(step, shape)
    whole = whole._replace(g=whole.g.astype(dtype))
    p, remainder = split_weight(whole.p, step.split)
    whole = whole._replace(p=join_weight(p, remainder))
    return whole, whole._replace(p=p, remainder=remainder, weight_key=KEY if step.split == 24 else None)


def jitted(function, step):
    return jax.jit(lambda operands: function(step, operands))


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("rounding", ["nearest", "dither", "stochastic"])
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.one_in(7)
def test_the_step_is_that_of_a_float32_parameter_and_then_split(name, rounding, bits):
    shape, blocks = ARRAYS[name]
    step = a_step(shape, blocks=blocks, rounding=rounding, fused=True, split=bits)
    whole, operands = split_operands(step, shape)
    unsplit = a_step(shape, blocks=blocks, rounding=rounding, fused=True)
    want, *stored = jitted(plain, unsplit)(whole)
    noise = weight_bits(linear_index(shape), KEY) if bits == 24 else None
    (p, remainder), *found = jitted(plain, step)(operands)
    assert (p.dtype, remainder.dtype) == step.outputs
    for a, b in zip(
        jax.tree.leaves(((p, remainder), found)), jax.tree.leaves((split_weight(want, bits, noise), stored))
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rounding", ["nearest", "dither", "stochastic"])
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("implementation", RUN)
@pytest.mark.one_in(19)
def test_every_implementation_gives_what_the_reference_gives(implementation, name, rounding, dtype, bits, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(cpu, "CHUNK", 1 << 12)
    shape, blocks = ARRAYS[name]
    step = a_step(shape, blocks=blocks, rounding=rounding, fused=True, split=bits)
    _, operands = split_operands(step, shape, dtype)
    found, want = (jitted(run, step)(operands) for run in (RUN[implementation], plain))
    assert [x.dtype for x in found[0]] == list(step.outputs)
    found_p, want_p = (np.asarray(join_weight(*result[0])) for result in (found, want))
    ulp = 2.0**-15 if bits == 24 else 2.0**-22
    np.testing.assert_allclose(found_p, want_p, rtol=ulp, atol=1e-7)
    assert (found_p != want_p).mean() < (0.03 if bits == 24 else 0.6)  # a sum that is contracted, or not
    for a, b in zip(*map(jax.tree.leaves, (found[1:], want[1:]))):
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:  # a number that is within a few ulp of a boundary
            distance = np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32))
            assert distance.max() <= 1 and distance.mean() < 5e-3


@pytest.mark.parametrize("implementation", ["reference", *RUN])
def test_a_step_that_returns_updates_joins_the_parameter(implementation):
    shape = (256, 256)
    step = a_step(shape, split=24)
    whole, operands = split_operands(step, shape)
    run = plain if implementation == "reference" else RUN[implementation]
    found, want = jitted(run, step)(operands), jitted(run, a_step(shape))(whole)
    for a, b in zip(*map(jax.tree.leaves, (found, want))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("noise", [False, True])
def test_the_forms_for_kernels_have_the_same_bits(bits, noise):
    x = sampled()
    bits_of_noise = np.random.default_rng(0).integers(0, 2**32, x.shape, np.uint32) if noise and bits == 24 else None
    want = split_weight(x, bits, bits_of_noise)
    found = split_in_kernel(x, bits, bits_of_noise)
    for a, b in zip(found, want):
        np.testing.assert_array_equal(
            np.asarray(a).view(f"u{a.dtype.itemsize}"), np.asarray(b).view(f"u{b.dtype.itemsize}")
        )
    joined = (np.asarray(join(*want)).view(np.uint32) for join in (join_in_kernel, join_weight))
    np.testing.assert_array_equal(*joined)


@pytest.mark.parametrize("spec", [("data", "model"), ("data",), (None, "model")], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.one_in(3)
def test_bits_do_not_depend_on_the_mesh(spec, kind, bits):
    shape = (512, 1024)
    step = a_step(shape, blocks=choose_blocks(shape, shards=8), rounding="dither", fused=True, split=bits)
    _, operands = split_operands(step, shape)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec) if x.ndim == 2 else PartitionSpec()))

    want = jitted(step_blockwise, step)(operands)
    with jax.set_mesh(mesh):
        found = jitted(step_blockwise, step)(jax.tree.map(place, operands))
    for a, b in zip(*map(jax.tree.leaves, (found, want))):
        np.testing.assert_array_equal(a, b)
        if a.ndim == 2:
            assert a.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 2)
