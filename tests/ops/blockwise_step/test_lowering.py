"""Compares the kernels for TPU and GPU, interpreted on CPU, with the reference.

Their arithmetic does not equal the reference bit for bit. A code can differ by one if a number is within a few ulp of
the boundary between two codes. The tests count such codes.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.blocks import Blocks
from flax_stable_embed.ops.blockwise.codecs import TINY
from flax_stable_embed.ops.blockwise_step import lowering as kernels
from flax_stable_embed.ops.blockwise_step import pallas_gpu, pallas_tpu
from flax_stable_embed.ops.blockwise_step.capabilities import PLATFORMS, refusal
from flax_stable_embed.ops.blockwise_step.reference import plain
from flax_stable_embed.ops.blockwise_step.step import Moment, Operands, Step
from flax_stable_embed.ops.lowering import kernel_or_reference, rule
from flax_stable_embed.optim.methods.adam import adam
from tests import cases

quantize = importlib.import_module("flax_stable_embed.ops.blockwise.quantize")

KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
CODES_APART = 1e-4  # of all codes may differ, by one
# Full tiles, odd ones that extend beyond the array, and short last blocks, for blocks along every axis. The length of a
# name is the seed of its numbers.
ARRAYS = {
    "a vector": ((2048,), Blocks(0, 256)),
    "rows, odd tiles": ((576, 640), Blocks(0, 64)),
    "rows, narrow": ((1024, 48), Blocks(0, 128)),
    "rows, a short block": ((200, 130), Blocks(0, 96)),
    "rows of an axis of three": ((256, 16, 70), Blocks(0, 64)),
    "rows of an axis before the last, odd": ((2, 3, 256, 130), Blocks(2, 32)),
    "rows before three axes": ((64, 3, 8, 128), Blocks(0, 32)),
    "along rows": ((70, 512), Blocks(1, 128)),
    "along rows, a short block": ((100, 300), Blocks(1, 256)),
    "along rows of one block": ((5, 7, 100), Blocks(2, 100)),
}


def step_and_operands(array, codec="root", rounding="nearest", dtype=jnp.float32, fused=True, skip=False):
    """Returns a step of AdamW on numbers of many sizes, with a block of zeros and columns whose moments are zero."""
    shape, blocks = ARRAYS[array]
    rng = np.random.default_rng(len(array))
    moments = Moment(True, codec), Moment(False, codec, rounding)
    static = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0, "nesterov": False}
    step = Step(adam, tuple(static.items()), moments, blocks, fused, skip, np.dtype(dtype))
    numbers = rng.standard_normal((3, *shape)) * np.exp(rng.standard_normal((3, *shape)))
    numbers = np.moveaxis(numbers, 1 + blocks.axis, 1)
    numbers[:2, : blocks.size] = 0.0
    g, m, p = (jnp.asarray(np.moveaxis(x, 0, blocks.axis), jnp.float32) for x in numbers)
    stored = [
        quantize.quantize(x, signed=k.signed, codec=codec, block_size=blocks.size, axis=blocks.axis)
        for x, k in zip((m, m * m), moments)
    ]
    hyper = {"c1": 0.3, "c2": 0.01, "c1_next": 0.4, "step_size": -1e-2, "weight_decay": 0.1}
    hyper = {name: jnp.float32(value) for name, value in hyper.items()}
    codes, absmax = zip(*stored)
    key = None if step.rounding == "nearest" else jnp.uint32(12345)
    return step, Operands(g.astype(dtype), p.astype(dtype), codes, absmax, hyper, key)


def both(name, step, operands):
    """Returns the results of the kernel and of the reference."""
    kernel = jax.jit(lambda operands: KERNELS[name].run(step, operands, interpret=True))(operands)
    return kernel, jax.jit(lambda operands: plain(step, operands))(operands)


def assert_same_step(kernel, reference, p, ulps=6):
    """Checks that outputs and scales differ by a few ulp at most, and codes by one and seldom."""
    (out, codes, absmax), (want, want_codes, want_absmax) = kernel, reference
    assert out.dtype == want.dtype
    size = np.maximum(np.abs(np.asarray(p, np.float32)), np.abs(np.asarray(want, np.float32)))
    spacing = float(jnp.finfo(out.dtype).eps) * np.maximum(size, 1e-6)
    apart = np.abs(np.asarray(out, np.float32) - np.asarray(want, np.float32))
    np.testing.assert_array_less(apart, ulps * spacing + 5e-9)  # the step of 0.01 where a moment has cancelled out
    for found, expected in zip(absmax, want_absmax):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for found, expected in zip(codes, want_codes):
        assert found.dtype == expected.dtype
        apart = np.abs(np.asarray(found, np.int32) - np.asarray(expected, np.int32))
        assert apart.max(initial=0) <= 1
        assert (apart > 0).sum() <= 2 + CODES_APART * apart.size
        zero = np.asarray(expected) == np.asarray(expected).flat[0]  # the first block is of zeros
        np.testing.assert_array_equal(np.asarray(found)[zero], np.asarray(expected)[zero])


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.one_in(13)
def test_kernels_equal_the_reference_for_blocks_along_every_axis(name, array):
    step, operands = step_and_operands(array)
    assert refusal(name, step.blocks, operands.g.shape) is None
    assert_same_step(*both(name, step, operands), operands.p)


@pytest.mark.parametrize("array", ["rows, odd tiles", "along rows", "rows of an axis before the last, odd"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "dither", "stochastic"])
@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.one_in(97)
def test_kernels_equal_the_reference_for_every_codec_rounding_and_dtype(name, array, dtype, fused, rounding, codec):
    step, operands = step_and_operands(array, codec, rounding, dtype, fused)
    assert_same_step(*both(name, step, operands), operands.p)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("array", ["rows, odd tiles", "along rows, a short block"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.one_in(7)
def test_non_finite_numbers_do_not_affect_other_elements_in_kernels(name, array, skip):
    step, operands = step_and_operands(array, skip=skip)
    rows = np.asarray(operands.g).copy()
    rows[..., 3, 1], rows[..., 40, 2], rows[..., 50, 3], rows[..., 60, 4] = np.nan, np.inf, 1e30, -3e38
    operands = operands._replace(g=jnp.asarray(rows))
    kernel, reference = both(name, step, operands)
    np.testing.assert_array_equal(np.isfinite(kernel[0]), np.isfinite(reference[0]))
    finite = np.isfinite(reference[0])
    kept = tuple(jnp.where(finite, x[0], 0) for x in (kernel, reference))
    assert_same_step((kept[0], *kernel[1:]), (kept[1], *reference[1:]), operands.p)


def test_tiles_hold_full_blocks_and_cover_the_array():
    for shape, blocks in ARRAYS.values():
        if len(shape) == 1:
            continue
        plan = pallas_tpu.tiling(shape, *blocks)
        assert np.prod(plan.view) == np.prod(shape)
        assert [k for group in plan.groups for k in group] == list(range(len(shape)))
        assert plan.tile[plan.blocked] in (plan.count * blocks.size, shape[-1])


# --- through the optimizers ------------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    """Lets programs for CPU use the kernels as those for TPU and GPU do, interpreted."""
    reference, may_run, run = kernels._reference, kernels._may_run, kernels._run
    rules = {
        name: rule(kernel_or_reference(reference, run(name), may_run), platform) for platform, name in PLATFORMS.items()
    }
    for module in KERNELS.values():
        monkeypatch.setattr(module, "run", partial(module.run, interpret=True))
    on_cpu = rule(kernel_or_reference(reference, run("cpu"), may_run), "cpu")

    def as_elsewhere(context, *flat, local):
        as_named = rules[local.kernels[0]] if local.required else on_cpu
        return as_named(context, *flat, local=local)

    mlir.register_lowering(kernels._local_step, as_elsewhere, platform="cpu")
    yield
    mlir.register_lowering(kernels._local_step, on_cpu, platform="cpu")


def trained(tx, params, steps=3):
    """Returns parameters and state after some steps with gradients of many sizes."""
    state, step = tx.init(params), jax.jit(lambda g, s, p: fse.fused_update(tx, g, s, p))
    rng = np.random.default_rng(3)

    def gradient(x):
        return jax.device_put(rng.standard_normal(x.shape).astype(np.float32), x.sharding)

    for _ in range(steps):
        params, state = step(jax.tree.map(gradient, params), state, params)
    return params, state


def assert_trained_alike(found, want):
    """Checks that parameters are nearly equal, and that codes seldom differ."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        if a.dtype in (jnp.int8, jnp.uint8) and a.ndim > 1:
            apart = np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32))
            assert (apart > 0).mean() < 1e-3
        else:
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            apart = np.abs(a - b)
            differ = apart > 1e-5 * (1 + np.abs(b))  # if a code differs, so does the next step
            assert differ.sum() <= 2 + 1e-3 * differ.size
            assert apart.max() < 2e-3 * (1 + np.abs(b).max())


def some_params():
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.standard_normal((256, 192)), jnp.float32)}


@pytest.mark.parametrize("case", cases.OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.one_in(8, start=1)
def test_every_optimizer_trains_alike_with_a_kernel_and_with_xla(name, case, interpreted):
    options = {"state_format": fse.StateFormat(min_size=0)}
    kernel = trained(case.ours(**case.hyper, **options, implementation=name), some_params())
    assert_trained_alike(kernel, trained(case.ours(**case.hyper, **options, implementation="xla"), some_params()))


@pytest.mark.parametrize("spec", [("x", "y"), (None, ("x", "y")), (("x", "y"), None)], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.one_in(8)
def test_every_device_runs_the_kernel_on_its_shard(name, spec, kind, interpreted):
    """With stochastic rounding too, whose bits depend on the index in the global array."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), (kind, kind))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    options = {"state_format": fse.StateFormat(min_size=0, rounding="stochastic")}
    if kind is AxisType.Auto:
        options["partition_specs"] = {"kernel": sharding.spec}
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((512, 512)), jnp.float32)}
    want = trained(fse.adamw8bit(0.01, **options | {"partition_specs": None}, implementation="xla"), params)
    with jax.set_mesh(mesh):
        tx = fse.adamw8bit(0.01, **options, implementation=name)
        found = trained(tx, jax.device_put(params, sharding))
    assert found[0]["kernel"].sharding.is_equivalent_to(sharding, 2)
    assert found[1][0].mu["kernel"].sharding.is_equivalent_to(sharding, 2)
    assert_trained_alike(found, want)


def test_vmap_uses_the_reference(interpreted):
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), some_params())
    tx = fse.adamw8bit(0.01, state_format=fse.StateFormat(min_size=0), implementation="pallas_tpu")
    state = jax.vmap(tx.init)(params)
    found = jax.vmap(lambda g, s, p: fse.fused_update(tx, g, s, p))(params, state, params)
    one = jax.tree.map(lambda x: x[1], (params, state))
    want = jax.jit(lambda p, s: fse.fused_update(tx, p, s, p))(*one)
    assert_trained_alike(jax.tree.map(lambda x: x[1], found), want)


# --- where it cannot run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "on"), [("pallas_tpu", "TPU"), ("pallas_gpu", "GPUs with CUDA")])
def test_a_named_kernel_raises_on_another_platform(name, on):
    params = {"kernel": jnp.ones((256, 96))}
    tx = fse.adamw8bit(0.01, state_format=fse.StateFormat(min_size=0), implementation=name)
    with pytest.raises(NotImplementedError, match=rf"runs on {on}, not on cpu\. Use None"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("shape", [(3, 64), (100,), (3, 5, 96)], ids=str)
def test_a_named_kernel_raises_for_an_array_it_cannot_take_and_none_takes_xla(shape):
    params = {"block": {"kernel": jnp.ones(shape)}}
    options = {"state_format": fse.StateFormat(min_size=0), "rules": ((".*", 8),)}
    with pytest.raises(ValueError, match=r"Parameter 'block/kernel': .*cannot take an array of shape .*: .*Use None"):
        fse.adamw8bit(0.01, **options, implementation="pallas_tpu").init(params)
    tx = fse.adamw8bit(0.01, **options)
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.isfinite(optax.tree.norm(updates))


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({"kernel": "x"}, TypeError, "must be a pytree of PartitionSpec .* got 'x' at 'kernel'"),
        ({"other": PartitionSpec("x")}, ValueError, r"has no entry for parameter 'kernel'\. It has other"),
    ],
)
def test_partition_specs_that_fit_no_parameter_raise(specs, error, message):
    params = some_params()
    with pytest.raises(error, match=message):
        tx = fse.adamw8bit(0.01, partition_specs=specs)
        tx.update(params, tx.init(params), params)


def test_describe_tells_which_implementation_runs(monkeypatch):
    params = some_params() | {"odd": jnp.ones((3, 3, 64, 512))}
    assert {row.implementation for row in fse.describe(fse.adamw8bit(0.01), params).rows} == {"xla"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    rows = {row.path: row.implementation for row in fse.describe(fse.adamw8bit(0.01), params).rows}
    assert rows["kernel"] == "pallas_tpu"
    assert rows["odd"].startswith("xla: its blocks of 64 along the last axis do not fill 128 lanes")
    shapes = jax.eval_shape(lambda: params)  # which may be anywhere on the eight devices of this process
    rows = {row.path: row.implementation for row in fse.describe(fse.adamw8bit(0.01), shapes).rows}
    assert rows["kernel"] == "xla: describe does not know its sharding"


# --- cases that must work with implementation=None -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-18, 1e-15, 3e18])
@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
@pytest.mark.one_in(13)
def test_moments_of_every_size_keep_their_digits(size, codec):
    step, operands = step_and_operands("rows, narrow", codec)
    numbers = np.random.default_rng(0).standard_normal((2, *operands.g.shape)) * size
    g, v = jnp.asarray(numbers[0], jnp.float32), jnp.asarray(numbers[1] ** 2, jnp.float32)
    stored = [
        quantize.quantize(x, signed=k.signed, codec=codec, block_size=step.blocks.size, axis=0)
        for x, k in zip((g, v), step.moments)
    ]
    codes, absmax = zip(*stored)
    for name in KERNELS:
        (_, codes_k, absmax_k), (_, codes_r, absmax_r) = both(
            name, step, operands._replace(g=g, codes=codes, absmax=absmax)
        )
        for a, b in zip(absmax_k, absmax_r):
            # (1 - b2) g^2 of g = 1e-18 is subnormal. Compilers that do not contract the sum round it first.
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=TINY)
        for a, b in zip(codes_k, codes_r):
            apart = np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32))
            allowed = 1e-3 if size == 1e-18 else CODES_APART
            assert apart.max() <= 1 and (apart > 0).sum() <= 2 + allowed * apart.size


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compute_in_32_bits_when_jax_has_64_bits_enabled(name, interpreted):
    with jax.enable_x64(True):
        params = some_params()
        options = {"state_format": fse.StateFormat(min_size=0), "implementation": name}
        found = trained(fse.adamw8bit(0.01, **options), params, steps=1)
        wide = {"kernel": params["kernel"].astype(jnp.float64)}
        with pytest.raises(ValueError, match="it has the dtype float64, and the kernel takes bfloat16"):
            fse.adamw8bit(0.01, **options).init(wide)
    assert_trained_alike(found, trained(fse.adamw8bit(0.01, state_format=fse.StateFormat(min_size=0)), params, steps=1))


def test_a_program_for_several_platforms_has_the_kernel_for_one_of_them():
    params = some_params()
    tx = fse.adamw8bit(0.01, state_format=fse.StateFormat(min_size=0))
    exported = jax.export.export(jax.jit(tx.update), platforms=["cpu", "tpu"])(params, tx.init(params), params)
    assert exported.mlir_module().count("tpu_custom_call") >= 1
    assert_trained_alike(
        exported.call(params, tx.init(params), params), jax.jit(tx.update)(params, tx.init(params), params)
    )


def test_devices_can_have_different_gradients_inside_of_shard_map():
    mesh, params = jax.make_mesh((4,), ("x",), (AxisType.Auto,)), some_params()
    tx = fse.adamw8bit(0.01, state_format=fse.StateFormat(min_size=0))
    state, grads = tx.init(params), {"kernel": jnp.stack([k * params["kernel"] for k in range(1, 5)])}

    def one(grads, state, params):
        updates, _ = tx.update({"kernel": grads["kernel"][0]}, state, params)
        return updates["kernel"][None]

    specs = {"in_specs": (PartitionSpec("x"), PartitionSpec(), PartitionSpec()), "out_specs": PartitionSpec("x")}
    found = jax.jit(jax.shard_map(one, mesh=mesh, **specs))(grads, state, params)
    for k in range(4):
        want = jax.jit(tx.update)({"kernel": grads["kernel"][k]}, state, params)[0]["kernel"]
        np.testing.assert_allclose(found[k], want, rtol=1e-6)


@pytest.mark.parametrize("spec", [PartitionSpec(PartitionSpec.UNCONSTRAINED, "x"), None], ids=str)
def test_partition_specs_that_do_not_say_a_sharding_leave_the_choice_to_the_compiler(spec):
    params = some_params()
    tx = fse.adamw8bit(0.01, state_format=fse.StateFormat(min_size=0), partition_specs={"kernel": spec})
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert np.isfinite(optax.tree.norm(updates))


def test_partition_specs_with_axes_that_the_mesh_does_not_have_raise():
    params = some_params()
    tx = fse.adamw8bit(0.01, partition_specs={"kernel": PartitionSpec("z")})
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)):
        with pytest.raises(ValueError, match="the mesh has the axes x, y and no 'z'"):
            jax.jit(tx.update)(params, tx.init(params), params)


def test_partition_specs_are_ignored_inside_of_shard_map():
    mesh, params = jax.make_mesh((4,), ("x",), (AxisType.Auto,)), some_params()
    specs = {"kernel": NamedSharding(mesh, PartitionSpec("x"))}
    tx = fse.adamw8bit(0.01, state_format=fse.StateFormat(min_size=0), partition_specs=specs)
    everywhere = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
    step = jax.shard_map(lambda g, s, p: tx.update(g, s, p)[0], mesh=mesh, **everywhere)
    want = jax.jit(tx.update)(params, tx.init(params), params)[0]["kernel"]
    np.testing.assert_allclose(jax.jit(step)(params, tx.init(params), params)["kernel"], want, rtol=1e-6)
