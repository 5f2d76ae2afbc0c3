"""What the TPU compiler makes of a StableEmbed: a kernel and another for the gradient, that move what must be moved."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from benchmarks import compiled as counted
from benchmarks import lookups
from flax_stable_embed.ops.embedding.normalized_rows import lowering
from flax_stable_embed.ops.embedding.normalized_rows.capabilities import MOST_TOKENS_ON_TPU
from flax_stable_embed.ops.embedding.normalized_rows.reference import Options

SHAPE = lookups.Shape(2048, 8192, 8192)  # rows and outputs are larger than the scratch memory of a chip


@cache
def compiled(way, what, device):
    return lookups.compiled(SHAPE, way, what, device)


@pytest.mark.parametrize("chip", lookups.CHIPS)
@pytest.mark.parametrize("what", [lookups.FORWARD, lookups.BACKWARD])
def test_the_kernels_move_what_they_must_and_need_no_memory(topology, chip, what):
    program = compiled("kernels", what, topology(counted.TOPOLOGIES[chip])[0])
    text, both = program.as_text(), lookups.least_bytes(SHAPE, lookups.BOTH)
    forward = lookups.least_bytes(SHAPE, lookups.FORWARD)
    least = forward if what == lookups.FORWARD else both - forward
    assert counted.kernels(text) == 1
    assert lookups.moved_bytes(text, SHAPE) < 1.01 * least
    assert program.memory_analysis().temp_size_in_bytes < 1e6


@pytest.mark.parametrize(
    ("what", "share"), [(lookups.FORWARD, 0.5), (lookups.BACKWARD, 0.25)], ids=lambda x: str(x).replace(" ", "_")
)
def test_that_is_a_fraction_of_what_xla_moves(topology, what, share):
    ours, theirs = (compiled(way, what, topology("v5e:2x2")[0]) for way in ("kernels", "XLA"))
    moved, by_xla = (lookups.moved_bytes(program.as_text(), SHAPE) for program in (ours, theirs))
    assert moved < share * by_xla
    assert theirs.memory_analysis().temp_size_in_bytes > 0.99 * 4 * SHAPE.tokens * SHAPE.features


@pytest.mark.parametrize("chip", counted.TOPOLOGIES)
@pytest.mark.parametrize(
    "shape",
    [(1, 768, 1), (5, 8192, 3), (50257, 768, 333), (200, 1152, 4096), (2**20, 1024, MOST_TOKENS_ON_TPU)],
    ids=str,
)
@pytest.mark.one_in(5)
def test_every_shape_compiles(topology, chip, shape):
    shape, device = lookups.Shape(*shape), topology(counted.TOPOLOGIES[chip])[0]
    assert counted.kernels(lookups.compiled(shape, "kernels", lookups.BOTH, device, jnp.bfloat16).as_text()) == 2


def test_indices_are_32_bit_whatever_jax_has(topology):
    with jax.enable_x64(True):
        program = lookups.compiled(lookups.Shape(300, 768, 100), "kernels", lookups.BOTH, topology("v5e:2x2")[0])
    assert counted.kernels(program.as_text()) == 2


def test_more_tokens_than_fit_into_scalar_memory_have_xlas_gradient(topology):
    shape = lookups.Shape(1024, 768, MOST_TOKENS_ON_TPU + 1)
    program = lookups.compiled(shape, "kernels", lookups.FORWARD, topology("v5e:2x2")[0])
    assert counted.kernels(program.as_text()) == 1
    args = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((shape.tokens, 768), (1024, 768), (768,))]
    ids = jax.ShapeDtypeStruct((shape.tokens,), jnp.int32)
    options = Options(1e-5, None, False, np.dtype(np.float32))
    gradient = jax.jit(lambda *args: lowering.gradient.bind(*args, options=options))
    text = gradient.trace(*args, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text


def test_a_slice_has_no_kernel_whatever_compiles_for_it(topology, monkeypatch):
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
