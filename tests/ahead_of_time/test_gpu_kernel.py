"""Tests the kernel as the CUDA compiler builds it: one per array, which reads and writes every array once, in place."""

from contextlib import nullcontext
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from benchmarks.counted import compiled as counted
from benchmarks.counted import instructions
from tests import cases

# From JAX 0.11 on. Mosaic GPU, which is to replace it, has another interface.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
SMALL = fse.StateFormat(min_size=0)


@pytest.fixture(scope="module")
def gpus():
    """Descriptions of eight GPUs. No GPU needs to be installed."""
    if (devices := counted.devices_of(counted.GPU, count=8)) is None:
        pytest.skip("the CUDA plugin is not installed. Use `make test EXTRAS=cuda` in its own environment")
    return devices


def compiled_on(devices, tx, params, place):
    args = jax.tree.map(place, (params, jax.eval_shape(tx.init, params), params))
    return jax.jit(lambda p, s, g: fse.fused_update(tx, g, s, p), donate_argnums=(0, 1)).lower(*args).compile()


@pytest.mark.parametrize("name", [k for k, c in counted.CASES.items() if c.codec and not c.implementation])
def test_a_step_moves_the_least_bytes_and_needs_no_temporaries(gpus, name):
    case = counted.CASES[name]
    compiled = counted.compiled_step(case, gpus[0])
    n = prod(case.shape)
    assert counted.kernels(compiled.as_text()) == 1
    assert counted.memory_bytes(compiled.as_text()) / n <= case.least_bytes + 0.6
    assert compiled.memory_analysis().temp_size_in_bytes / n < case.updates_bytes + 0.001


MOST = {"nearest": 50, "dither": 80, "stochastic": 80, "bfloat16": 55, "`update`": 50, "`linear`": 50, "`dynamic`": 145}
MOST |= {"24 bits": 75, "24 bits, dither": 90}  # memory needs 94 cycles


@pytest.mark.parametrize("name", MOST)
def test_a_kernel_has_few_instructions(gpus, name):
    if why := instructions.missing():
        pytest.skip(why)
    row = instructions.counted(instructions.CASES[name], gpus[0])
    assert row["instructions"] <= MOST[name] and row["spills"] == 0
    assert row["warps"] >= (12 if name == "`update`" else 16)  # it needs addresses for one more array


@pytest.mark.parametrize("name", instructions.MODELS)
def test_several_programs_share_a_processor_for_the_arrays_of_real_models(gpus, name):
    if why := instructions.missing():
        pytest.skip(why)
    row = instructions.counted(instructions.MODELS[name], gpus[0])
    assert row["instructions"] <= 80 and row["spills"] == 0 and row["warps"] >= 16


@pytest.mark.parametrize("case", cases.OPTIMIZERS, ids=lambda case: case.name)
def test_every_optimizer_is_one_kernel_per_array(gpus, case):
    params = {f"kernel_{k}": jax.ShapeDtypeStruct((300, 200 * (k + 1)), jnp.float32) for k in range(2)}
    tx = case.ours(**case.hyper, state_format=SMALL, implementation="pallas_gpu")
    here = jax.sharding.SingleDeviceSharding(gpus[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    with counted.compiling_for(gpus[0]):
        assert counted.kernels(compiled_on(gpus, tx, params, place).as_text()) == 2


def test_stable_embed_writes_no_looked_up_rows_to_memory(gpus):
    embed = fse.linen.StableEmbed(4096, 512)
    ids = jax.ShapeDtypeStruct((8192,), jnp.int32)
    args = jax.eval_shape(embed.init, jax.random.key(0), ids), ids
    here = jax.sharding.SingleDeviceSharding(gpus[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
    with counted.compiling_for(gpus[0]):
        compiled = jax.jit(embed.apply).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * 4 * 8192 * 512


def test_on_one_gpu_a_stable_embedding_is_one_kernel_and_its_gradient_another(gpus):
    rows, features, tokens = 4096, 1024, 8192
    embed, here = fse.linen.StableEmbed(rows, features), jax.sharding.SingleDeviceSharding(gpus[0])
    ids, dy = jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((tokens, features), jnp.float32)
    args = jax.eval_shape(embed.init, jax.random.key(0), ids), ids, dy
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)

    def step(params, ids, dy):
        y, pullback = jax.vjp(lambda params: embed.apply(params, ids), params)
        return y, pullback(dy)[0]

    with counted.compiling_for(gpus[0]):
        compiled = jax.jit(step).lower(*args).compile()
    assert counted.kernels(compiled.as_text()) == 2
    # Temporaries are the sorted ids, and each program's share of the gradients of scale and bias.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (2 * features * tokens / 32 + 8 * tokens)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_every_gpu_of_a_mesh_runs_the_kernel_on_its_shard(gpus, kind):
    mesh = Mesh(np.array(gpus).reshape(4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def place(x):
        spec = PartitionSpec("data", "model") if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = {"kernel": jax.ShapeDtypeStruct((1024, 2048), jnp.float32)}
    with jax.set_mesh(mesh) if kind is AxisType.Explicit else nullcontext():
        compiled = compiled_on(gpus, fse.adamw8bit(1e-3), params, place)
    text = compiled.as_text()
    assert counted.kernels(text) == 1
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "permute") if f" {word}" in text]
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * 4 * 1024 * 2048 / 8
