"""Tests StableEmbed as the TPU compiler builds it: two kernels, forward and gradient, that move the least bytes."""

import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from benchmarks.counted import compiled as counted
from benchmarks.counted import lookups
from flax_stable_embed.ops.embedding.normalized_rows.capabilities import MOST_TOKENS_ON_TPU

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


def test_tokens_beyond_scalar_memory_are_taken_in_parts(topology):
    shape = lookups.Shape(1024, 768, 2 * MOST_TOKENS_ON_TPU + 1)
    program = lookups.compiled(shape, "kernels", lookups.BOTH, topology("v5e:2x2")[0])
    assert counted.kernels(program.as_text()) == 1 + 3


def collectives(text):
    return Counter(
        re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("where", ["one chip", "4 chips, replicated table"])
def test_a_replicated_table_moves_no_more_bytes_than_flax(topology, where, dtype):
    """Also in bfloat16, where Flax sums gradients in bfloat16, and these are exact float32 sums."""
    devices = topology("v5e:2x2")
    modules = [kind(lookups.ROWS, lookups.FEATURES, dtype=dtype) for kind in lookups.MODULES["StableEmbed"]]
    ours, theirs = (lookups.on_mesh(module, where, devices).as_text() for module in modules)
    assert counted.kernels(ours) == 2
    assert counted.memory_bytes(ours) <= 1.002 * counted.memory_bytes(theirs)
    assert collectives(ours) == collectives(theirs)


def test_every_chip_has_the_kernels_if_tokens_are_sharded(topology):
    embed, ids = fse.linen.StableEmbed(4096, 1024), jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    args = jax.eval_shape(embed.init, jax.random.key(0), ids), ids
    mesh = Mesh(np.array(topology("v5e:2x2")), ("data",))

    def kernels(of_params, of_ids):
        shardings = jax.tree.map(lambda _: of_params, args[0]), of_ids
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args, shardings)
        return counted.kernels(jax.jit(embed.apply).lower(*placed).compile().as_text())

    one, everywhere = jax.sharding.SingleDeviceSharding(mesh.devices[0]), NamedSharding(mesh, PartitionSpec())
    assert kernels(one, one) == 1
    assert kernels(everywhere, NamedSharding(mesh, PartitionSpec("data"))) == 1
    assert kernels(everywhere, everywhere) == 0
