"""Tests the kernel as the TPU compiler builds it: one per array, which reads and writes every array once, in place."""

import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from benchmarks.counted import compiled as counted
from tests import cases

SMALL = fse.StateFormat(min_size=0)


def kernels(compiled) -> int:
    return counted.kernels(compiled.as_text())


@pytest.mark.parametrize("chip", counted.TOPOLOGIES)
@pytest.mark.parametrize("name", [name for name in counted.CASES if "optax" not in name and "xla" not in name])
@pytest.mark.one_in(7)
def test_a_step_moves_the_least_bytes_and_needs_no_temporaries(topology, chip, name):
    case = counted.CASES[name]
    compiled = counted.compiled_step(case, topology(counted.TOPOLOGIES[chip])[0])
    n, wide = prod(case.shape), jnp.dtype(case.dtype).itemsize
    assert kernels(compiled) == 1
    assert counted.memory_bytes(compiled.as_text()) / n <= case.least_bytes + 0.6
    if not (chip == "v5p" and case.along_rows):  # on v5p the compiler copies scales with short rows
        assert compiled.memory_analysis().temp_size_in_bytes / n < case.updates_bytes + 0.01 * wide
    assert compiled.memory_analysis().alias_size_in_bytes / n > wide + 2


def test_the_kernel_issues_instructions_for_about_as_long_as_memory_moves_bytes(topology):
    """This counts one kernel on v5e. `python -m benchmarks compiled` counts all of them."""
    del topology  # skips without a compiler
    command = [sys.executable, "-m", "benchmarks", "compiled", "--quick"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    issued, by_memory = out.splitlines()[-1].split("|")[-2].replace("(", "").replace(")", "").split()
    assert 10 < float(issued) <= 31 and 30 < float(by_memory) < 31


def on_one_chip(device, tx, params):
    """Compiles a fused step of `tx`."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = params, jax.eval_shape(tx.init, params), params
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(lambda g, s, p: fse.fused_update(tx, g, s, p), donate_argnums=(1, 2)).lower(*args).compile()


@pytest.mark.parametrize("case", cases.OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.one_in(5)
def test_every_optimizer_is_one_kernel_per_array(topology, case):
    params = {f"kernel_{k}": jax.ShapeDtypeStruct((512, 256 * (k + 1)), jnp.float32) for k in range(2)}
    tx = case.ours(**case.hyper, state_format=SMALL, implementation="pallas_tpu")
    assert kernels(on_one_chip(topology("v5e:2x2")[0], tx, params)) == 2


@pytest.mark.parametrize(
    "shape",
    [(4096,), (512, 640), (1024, 48), (2, 3, 256, 130), (4096, 8, 128), (1024, 40, 200), (100, 300), (4096, 2, 8, 128)],
    ids=str,
)
@pytest.mark.one_in(5)
def test_the_kernel_compiles_for_blocks_along_every_axis(topology, shape):
    tx = fse.adamw8bit(1e-3, rules=((".*", 8),), state_format=SMALL, implementation="pallas_tpu")
    compiled = on_one_chip(topology("v5e:2x2")[0], tx, {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)})
    assert kernels(compiled) == 1
    if len(shape) < 3 or shape[-2] % 32 == 0 or shape[-2] <= 8:  # otherwise the compiler copies the codes
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.01 * 4 * prod(shape)


@pytest.mark.parametrize("known", ["types", "arguments", "specs", "nothing"])
def test_every_chip_runs_the_kernel_if_shardings_are_known(topology, known):
    kind = AxisType.Explicit if known == "types" else AxisType.Auto
    mesh = Mesh(np.array(topology("v5e:2x2")).reshape(2, 2), ("data", "model"), axis_types=(kind,) * 2)
    specs = {"kernel": PartitionSpec("data", "model")}
    tx = fse.adamw8bit(1e-3, partition_specs=specs if known == "specs" else None)
    params = {"kernel": jax.ShapeDtypeStruct((1024, 2048), jnp.float32)}

    def place(x):
        spec = specs["kernel"] if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    args = jax.tree.map(place, (params, jax.eval_shape(tx.init, params), params))
    step = partial(fse.fused_update, tx)
    inner = jax.jit(step) if known in ("specs", "nothing") else step  # in a function of its own it sees no argument
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="is lowered") if known == "nothing" else nullcontext():
        compiled = jax.jit(lambda *args: inner(*args), donate_argnums=(1, 2)).lower(*args).compile()
    assert kernels(compiled) == (0 if known == "nothing" else 1)
    assert not [
        word for word in ("all-gather", "all-reduce", "all-to-all", "permute") if f" {word}" in compiled.as_text()
    ]


def test_a_named_kernel_raises_if_shardings_are_unknown(topology):
    mesh = Mesh(np.array(topology("v5e:2x2")), ("data",), axis_types=(AxisType.Auto,))
    tx = fse.adamw8bit(1e-3, implementation="pallas_tpu")
    params = {"kernel": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}
    args = params, jax.eval_shape(tx.init, params), params
    everywhere = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), args)
    step = jax.jit(partial(fse.fused_update, tx))
    with pytest.raises(NotImplementedError, match=r"needs to know how parameters are sharded\. .*`partition_specs`"):
        jax.jit(lambda *args: step(*args)).lower(*args)
