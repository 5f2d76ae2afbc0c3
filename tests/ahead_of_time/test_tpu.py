"""What the TPU compiler makes of a step: bytes, temporaries and collectives, exact, though nothing runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flax_stable_embed as fse

COLLECTIVE = re.compile(r"= .*?\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def compile_step(devices, shape, spec, kind=AxisType.Auto, codec="root"):
    """One fused AdamW step of one kernel on a mesh of these devices, its state sharded like the parameter."""
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"), axis_types=(kind,) * 2)
    tx = fse.adamw8bit(1e-3, weight_decay=0.1, state_format=fse.StateFormat(codec=codec))
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)

    def place(x):
        cut = PartitionSpec(*spec) if x.ndim == len(shape) else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, cut))

    args = jax.tree.map(place, (params, state, params))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda g, s, p: fse.fused_update(tx, g, s, p), donate_argnums=(1, 2))
        return step.lower(*args).compile()


@pytest.mark.parametrize("spec", [("data", "model"), (None, ("data", "model")), (("data", "model"), None)], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.one_in(2)
def test_a_sharded_step_has_no_collective_on_a_slice(topology, spec, kind):
    compiled = compile_step(topology("v5e:2x2"), (1024, 2048), spec, kind)
    assert not COLLECTIVE.findall(compiled.as_text())


def test_the_state_is_updated_in_place_with_small_temporaries(topology):
    compiled = compile_step(topology("v5e:2x2"), (4096, 4096), ("data", "model"))
    memory, elements = compiled.memory_analysis(), 4096 * 4096 // 4
    assert memory.alias_size_in_bytes / elements == pytest.approx(6.03, abs=0.01)  # parameter, codes, scales
    assert memory.temp_size_in_bytes / elements < 0.05


@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
def test_no_codec_gathers_from_a_table(topology, codec):
    text = compile_step(topology("v5e:2x2"), (1024, 1024), ("data", "model"), codec=codec).as_text()
    assert not re.findall(r"= \S+ (gather|sort|while)\(", text)
