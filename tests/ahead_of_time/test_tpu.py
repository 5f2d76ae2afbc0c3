"""Counts bytes, temporaries and collectives of a step that the TPU compiler has compiled. Nothing runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flax_stable_embed as fse

COLLECTIVE = re.compile(r"= .*?\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def compile_step(devices, shape, spec, kind=AxisType.Auto, codec="root"):
    """Compiles a fused AdamW step of one parameter on a mesh, with its state sharded like the parameter."""
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"), axis_types=(kind,) * 2)
    tx = fse.adamw8bit(1e-3, weight_decay=0.1, state_format=fse.StateFormat(codec=codec))
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)

    def place(x):
        partition = PartitionSpec(*spec) if x.ndim == len(shape) else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition))

    args = jax.tree.map(place, (params, state, params))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda g, s, p: fse.fused_update(tx, g, s, p), donate_argnums=(1, 2))
        return step.lower(*args).compile()


@pytest.mark.parametrize("spec", [("data", "model"), (None, ("data", "model")), (("data", "model"), None)], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.one_in(10)
def test_a_sharded_step_has_no_collective_on_a_slice(topology, spec, kind):
    compiled = compile_step(topology("v5e:2x2"), (1024, 2048), spec, kind)
    assert not COLLECTIVE.findall(compiled.as_text())


def test_the_state_is_updated_in_place_with_few_temporaries(topology):
    compiled = compile_step(topology("v5e:2x2"), (4096, 4096), ("data", "model"))
    memory, elements = compiled.memory_analysis(), 4096 * 4096 // 4
    assert memory.alias_size_in_bytes / elements == pytest.approx(6.03, abs=0.01)  # parameter, codes, scales
    assert memory.temp_size_in_bytes < 0.12 * elements  # rounded with dither, without a kernel


@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
@pytest.mark.one_in(5)
def test_no_codec_gathers_from_a_table(topology, codec):
    text = compile_step(topology("v5e:2x2"), (1024, 1024), ("data", "model"), codec=codec).as_text()
    assert not re.findall(r"= \S+ (gather|sort|while)\(", text)


def stable_embed_step(devices, num_embeddings, tokens, features, **options):
    """Compiles output and gradients of a StableEmbed on one chip."""
    embed = fse.linen.StableEmbed(num_embeddings, features, **options)
    place = jax.sharding.SingleDeviceSharding(devices[0])

    def shape(*extents, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(extents, dtype, sharding=place)

    def step(params, ids, cotangent):
        y, pullback = jax.vjp(lambda params: embed.apply({"params": params}, ids), params)
        return y, pullback(cotangent)[0]

    norm = {"scale": shape(features), "bias": shape(features)}
    params = {"embedding": shape(num_embeddings, features), "norm": norm}
    return jax.jit(step).lower(params, shape(tokens, dtype=jnp.int32), shape(tokens, features)).compile()


def test_stable_embed_stores_only_rows_output_and_row_gradient(topology):
    """Only three arrays of shape (tokens, features) are in memory. Mean, variance and all else are sums over rows."""
    text = stable_embed_step(topology("v5e:2x2"), 50304, 4096, 512).as_text()
    entry = text[text.index("ENTRY") :]
    fusions = [line.partition(" fusion(")[0] for line in entry.splitlines() if " fusion(" in line]
    assert sum(len(re.findall(r"f32\[4096,512\]", line)) for line in fusions) == 3


def test_stable_embed_reads_rows_once_for_mean_and_variance(topology):
    """The forward pass reads looked-up rows twice: once for mean and variance together, once for the output."""
    embed, place = fse.linen.StableEmbed(50304, 512), jax.sharding.SingleDeviceSharding(topology("v5e:2x2")[0])
    ids = jax.ShapeDtypeStruct((4096,), jnp.int32)
    args = jax.eval_shape(embed.init, jax.random.key(0), ids), ids
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    text = jax.jit(embed.apply).lower(*args).compile().as_text()
    lines = text[text.index("ENTRY") :].splitlines()
    (rows,) = re.findall(r"(%gather_fusion\S*) = f32\[4096,512\]", "\n".join(lines))
    assert sum(f"{rows}," in line or f"{rows})" in line for line in lines) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("num_embeddings", "sorts"), [(2**15, False), (50304, True), (2**18, True)])
def test_sorting_ids_saves_bytes_in_the_gradient_of_a_large_table(topology, num_embeddings, sorts, monkeypatch):
    def bytes_accessed():
        compiled = stable_embed_step(topology("v5e:2x2"), num_embeddings, 8192, 1024)
        return compiled.cost_analysis()["bytes accessed"]

    as_xla_does = bytes_accessed()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert (bytes_accessed() < 0.95 * as_xla_does) is sorts


def test_a_row_sparse_step_has_no_temporary_as_large_as_the_table(topology):
    embed, tx = fse.linen.Embed(2**18, 1024, sparse=True), fse.row_sparse(fse.adam8bit(1e-3))
    place = jax.sharding.SingleDeviceSharding(topology("v5e:2x2")[0])
    params = {"embedding": jax.ShapeDtypeStruct((2**18, 1024), jnp.float32)}
    args = (params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((4096,), jnp.int32))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)

    def step(params, state, ids):
        def loss(params):
            return jnp.sum(jnp.tanh(embed.apply({"params": params}, ids)) ** 2)

        value, grads = fse.row_value_and_grad(loss)(params)
        return *fse.fused_update(tx, grads, state, params), value

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4096 * 1024 * 4 + 1e6
    assert memory.alias_size_in_bytes > 0.99 * 3 * 4 * 2**18 * 1024
