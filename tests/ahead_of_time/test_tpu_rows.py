"""Tests StableEmbed as the TPU compiler builds it: two kernels, forward and gradient, that move the least bytes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from benchmarks.counted import compiled as counted
from benchmarks.counted import lookups
from flax_stable_embed.ops.embedding.normalized_rows import lowering
from flax_stable_embed.ops.embedding.normalized_rows.capabilities import MOST_TOKENS_ON_TPU
from flax_stable_embed.ops.embedding.normalized_rows.reference import Options

SHAPE = lookups.Shape(2048, 8192, 8192)  # rows and outputs are larger than the scratch memory of a chip


@cache
def compiled(way, part, device):
    return lookups.compiled(SHAPE, way, part, device)


@pytest.mark.parametrize("chip", lookups.CHIPS)
@pytest.mark.parametrize("part", [lookups.FORWARD, lookups.BACKWARD])
def test_the_kernels_move_the_least_bytes_and_need_no_temporaries(topology, chip, part):
    program = compiled("kernels", part, topology(counted.TOPOLOGIES[chip])[0])
    text, both = program.as_text(), lookups.least_bytes(SHAPE, lookups.BOTH)
    forward = lookups.least_bytes(SHAPE, lookups.FORWARD)
    least = forward if part == lookups.FORWARD else both - forward
    assert counted.kernels(text) == 1
    assert lookups.moved_bytes(text, SHAPE) < 1.01 * least
    assert program.memory_analysis().temp_size_in_bytes < 1e6


@pytest.mark.parametrize(
    ("part", "share"), [(lookups.FORWARD, 0.5), (lookups.BACKWARD, 0.25)], ids=lambda x: str(x).replace(" ", "_")
)
def test_the_kernels_move_a_fraction_of_the_bytes_that_xla_moves(topology, part, share):
    ours, theirs = (compiled(way, part, topology("v5e:2x2")[0]) for way in ("kernels", "XLA"))
    moved, by_xla = (lookups.moved_bytes(program.as_text(), SHAPE) for program in (ours, theirs))
    assert moved < share * by_xla
    assert theirs.memory_analysis().temp_size_in_bytes > 0.99 * 4 * SHAPE.tokens * SHAPE.features


@pytest.mark.parametrize("chip", counted.TOPOLOGIES)
@pytest.mark.parametrize(
    "shape",
    [(1, 768, 1), (5, 8192, 3), (50257, 768, 333), (200, 1152, 4096), (2**20, 1024, MOST_TOKENS_ON_TPU)],
    ids=str,
)
@pytest.mark.one_in(8)
def test_the_kernels_compile_for_every_shape(topology, chip, shape):
    shape, device = lookups.Shape(*shape), topology(counted.TOPOLOGIES[chip])[0]
    assert counted.kernels(lookups.compiled(shape, "kernels", lookups.BOTH, device, jnp.bfloat16).as_text()) == 2


def test_indices_are_32_bit_under_x64_too(topology):
    with jax.enable_x64(True):
        program = lookups.compiled(lookups.Shape(300, 768, 100), "kernels", lookups.BOTH, topology("v5e:2x2")[0])
    assert counted.kernels(program.as_text()) == 2


def test_xla_computes_the_gradient_of_tokens_beyond_scalar_memory(topology):
    shape = lookups.Shape(1024, 768, MOST_TOKENS_ON_TPU + 1)
    program = lookups.compiled(shape, "kernels", lookups.FORWARD, topology("v5e:2x2")[0])
    assert counted.kernels(program.as_text()) == 1
    args = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((shape.tokens, 768), (1024, 768), (768,))]
    ids = jax.ShapeDtypeStruct((shape.tokens,), jnp.int32)
    options = Options(1e-5, None, False, np.dtype(np.float32))
    gradient = jax.jit(lambda *args: lowering.gradient.bind(*args, options=options))
    text = gradient.trace(*args, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text


def test_several_chips_have_no_kernel_even_if_one_chip_compiles(topology, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    embed, ids = fse.linen.StableEmbed(4096, 1024), jax.ShapeDtypeStruct((8192,), jnp.int32)
    args = jax.eval_shape(embed.init, jax.random.key(0), ids), ids
    mesh = Mesh(np.array(topology("v5e:2x2")), ("data",))

    def kernels(sharding):
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
        return counted.kernels(jax.jit(embed.apply).lower(*placed).compile().as_text())

    assert kernels(jax.sharding.SingleDeviceSharding(mesh.devices[0])) == 1
    assert kernels(NamedSharding(mesh, PartitionSpec())) == 0
