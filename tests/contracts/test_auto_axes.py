"""Tests that a step runs the kernels on a mesh with Auto axes if the program or `init` shows how arrays are sharded.

How arrays are sharded decides how fast a step is. It never decides the result, on whatever devices the step then runs.
"""

import re
import warnings
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import assert_same_bits, build

SPECS = {"fsdp": P("a"), "tensor": P(None, "b"), "both": P("a", "b"), "swapped": P("b", "a"), "joint": P(("a", "b"))}
SHAPES = {"kernel": (1024, 1024), "other": (1024, 2048), "scale": (64,)}
COLLECTIVES = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute)\b[\w-]*\(")


def mesh_of(shape=(4, 2), devices=None):
    devices = jax.devices() if devices is None else devices
    n = int(np.prod(shape))
    return Mesh(np.array(devices[:n]).reshape(shape), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def numbers(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def place(tree, mesh, spec):
    return {name: jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else P())) for name, x in tree.items()}


def fused(tx):
    return lambda params, state, grads: fse.fused_update(tx, grads, state, params)


def updates(tx):
    def step(params, state, grads):
        u, state = tx.update(grads, state, params)
        return optax.apply_updates(params, u), state

    return step


STEPS = {"fused_update": fused, "update": updates, "in_place": lambda tx: updates(fse.in_place(tx))}


def kernels_for_tpu(step, *args):
    """Counts the kernels in a program for TPU."""
    return jax.jit(step).trace(*args).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")


def kernels_in_function(step, *args):
    """Counts the kernels of a step in a function of its own, which does not see the arguments of the program.

    Under the mesh of the parameters, which are the first argument.
    """
    with jax.set_mesh(args[0]["kernel"].sharding.mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="An optimizer step with 8-bit moments is lowered")
        return kernels_for_tpu(lambda *args: jax.jit(step)(*args), *args)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("how", STEPS)
@pytest.mark.one_in(2)
def test_a_program_for_tpu_has_a_kernel_for_every_array(spec, how):
    tx = fse.adamw8bit(1e-3)
    params = place(numbers(0), mesh_of(), spec)
    state = jax.eval_shape(tx.init, params)
    step = STEPS[how](tx)
    assert kernels_for_tpu(step, params, state, params) == 2  # the parameters are arguments of the program
    assert kernels_in_function(step, params, state, params) == 0  # and here they are not, nor did `init` see them
    assert kernels_in_function(step, params, tx.init(params), params) == 2


@pytest.mark.parametrize("how", ["shapes", "abstract_state", "nnx", "chain"])
def test_init_sees_shardings_of_every_kind(how):
    mesh = mesh_of()
    params = place(numbers(0), mesh, SPECS["both"])
    tx = fse.chain(optax.clip_by_global_norm(1.0), fse.adamw8bit(1e-3)) if how == "chain" else fse.adamw8bit(1e-3)
    if how == "shapes":
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        tx.init(shapes)
    elif how == "abstract_state":
        fse.abstract_state(tx, params)
    elif how == "nnx":
        tx.init(nnx.State({name: nnx.Param(x) for name, x in params.items()}))
    else:
        tx.init(params)
    assert kernels_in_function(fused(tx), params, jax.eval_shape(tx.init, params), params) == 2


def test_describe_reports_the_kernel_and_changes_nothing():
    mesh, tx = mesh_of(), fse.adamw8bit(1e-3)
    params = place(numbers(0), mesh, SPECS["both"])
    with jax.set_mesh(mesh):
        rows = {row.path: row.implementation for row in fse.describe(tx, params, platform="tpu").rows}
    assert rows["kernel"] == rows["other"] == "pallas_tpu"
    assert kernels_in_function(fused(tx), params, jax.eval_shape(tx.init, params), params) == 0


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.one_in(9)
def test_a_sharded_step_has_the_bits_of_one_device_and_moves_no_data(case, spec):
    tx = case.ours(**case.hyper)
    params, grads = numbers(0), numbers(1)
    want = jax.jit(fused(tx))(params, tx.init(params), grads)
    mesh = mesh_of()
    placed, sharded = place(params, mesh, spec), place(grads, mesh, spec)
    args = placed, tx.init(placed), sharded
    with jax.set_mesh(mesh):
        compiled = jax.jit(fused(tx)).lower(*args).compile()
        found = jax.device_get(compiled(*args))
    if case.sums:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[0], want[0])
    else:
        assert_same_bits(found, jax.device_get(want))
        assert not COLLECTIVES.findall(compiled.as_text())


def test_a_step_on_other_devices_than_init_saw_is_right():
    """The same transform goes on with fewer devices, with one, with others, and with other meshes of the same."""
    tx = fse.adamw8bit(1e-2)
    params, grads = numbers(0), numbers(1)
    want = jax.device_get(jax.jit(fused(fse.adamw8bit(1e-2)))(params, tx.init(params), grads))
    first = place(params, mesh_of(), SPECS["both"])
    state = jax.device_get(tx.init(first))
    step = jax.jit(fused(tx))
    all_devices = jax.devices()
    meshes = [
        mesh_of((2, 2), all_devices[:4]),
        mesh_of((2, 2), all_devices[4:]),
        mesh_of((1, 1), all_devices[:1]),
        mesh_of((4, 2), all_devices[::-1]),
        mesh_of((8, 1)),
        mesh_of((1, 8)),
    ]
    for mesh in meshes:
        everywhere = NamedSharding(mesh, P())
        args = place(params, mesh, P("b")), jax.device_put(state, everywhere), place(grads, mesh, P("b"))
        assert_same_bits(jax.device_get(step(*args)), want)
        with jax.set_mesh(mesh):
            assert_same_bits(jax.device_get(step(*args)), want)
    assert_same_bits(jax.device_get(step(params, tx.init(params), grads)), want)


@pytest.mark.parametrize("how", [*STEPS, "quantize_state"])
def test_parameters_of_one_shape_keep_their_own_shardings(how):
    """As `q_proj` and `o_proj` of a transformer, whose kernels are sharded over swapped axes. Nothing is known."""
    mesh, some = mesh_of(), numbers(0)["kernel"]
    shardings = {"q_proj": NamedSharding(mesh, P("a", "b")), "o_proj": NamedSharding(mesh, P("b", "a"))}
    params = jax.device_put({"q_proj": some, "o_proj": some}, shardings)
    tx = fse.adamw8bit(1e-3) if how != "quantize_state" else fse.quantize_state(optax.adamw(1e-3))
    step = updates(tx) if how == "quantize_state" else STEPS[how](tx)
    state = jax.jit(tx.init)(params)
    compiled = jax.jit(step).lower(params, state, params).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    moments = jax.tree.leaves(compiled.output_shardings[1], is_leaf=lambda x: isinstance(x, dict))
    assert [x for x in moments if isinstance(x, dict)][:2] == [
        shardings
    ] * 2  # codes of the first moment, and of the other
    if how != "update":  # the compiler chooses how `p + u` is sharded
        assert compiled.output_shardings[0] == shardings


def test_two_shardings_of_one_path_are_forgotten():
    tx, params = fse.adamw8bit(1e-3), numbers(0)
    first, second = (place(params, mesh_of(), SPECS[name]) for name in ("fsdp", "tensor"))
    tx.init(first)
    assert kernels_in_function(fused(tx), first, jax.eval_shape(tx.init, first), first) == 2
    tx.init(second)
    for placed in (first, second):
        assert kernels_in_function(fused(tx), placed, jax.eval_shape(tx.init, placed), placed) == 0
    tx.init(first)
    assert kernels_in_function(fused(tx), first, jax.eval_shape(tx.init, first), first) == 0


def test_the_sharded_state_of_replicated_parameters_is_not_gathered():
    """As in ZeRO-1: parameters are replicated, codes and scales are sharded."""
    tx, mesh, params = fse.adamw8bit(1e-2), mesh_of((8, 1)), {"kernel": numbers(0)["kernel"]}
    want = jax.device_get(jax.jit(fused(tx))(params, tx.init(params), params))
    placed = place(params, mesh, P())
    state = tx.init(placed)
    sharded = NamedSharding(mesh, P("a"))
    fields = {name: {"kernel": jax.device_put(getattr(state[0], name)["kernel"], sharded)} for name in ("mu", "nu")}
    fields |= {f"{name}_absmax": {"kernel": jax.device_put(getattr(state[0], f"{name}_absmax")["kernel"], sharded)}
               for name in ("mu", "nu")}  # fmt: skip
    state = (state[0]._replace(**fields), *state[1:])
    compiled = jax.jit(fused(tx)).lower(placed, state, placed).compile()
    gathered = [line for line in compiled.as_text().splitlines() if "all-gather(" in line]
    assert not [line for line in gathered if "s8[1024" in line or "u8[1024" in line]
    assert_same_bits(jax.device_get(compiled(placed, state, placed)), want)


def test_blocks_that_straddle_devices_are_left_to_the_compiler():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(96, 304)), jnp.float32)}
    tx = fse.adamw8bit(1e-2)
    want = jax.device_get(jax.jit(fused(tx))(params, tx.init(params), params))
    placed = place(params, mesh_of((2, 4)), P(None, "b"))
    with jax.set_mesh(placed["kernel"].sharding.mesh):
        assert_same_bits(jax.device_get(jax.jit(fused(tx))(placed, tx.init(placed), placed)), want)


def test_a_seen_step_works_in_scan_vmap_and_shard_map():
    tx = fse.adamw8bit(1e-2)
    mesh, params = mesh_of(), numbers(0)
    placed = place(params, mesh, SPECS["fsdp"])
    state = tx.init(placed)

    def two(params, state):
        def step(carry, _):
            return fse.fused_update(tx, carry[0], carry[1], carry[0]), None

        return jax.lax.scan(step, (params, state), None, length=2)[0]

    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(two)(placed, state))
    alone = fse.adamw8bit(1e-2)
    want = params, alone.init(params)
    for _ in range(2):
        want = jax.jit(fused(alone))(want[0], want[1], want[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found[0], want[0])

    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    both, _ = jax.jit(jax.vmap(fused(tx)))(stacked, jax.vmap(alone.init)(stacked), stacked)
    one, _ = jax.jit(fused(alone))(params, alone.init(params), params)
    np.testing.assert_allclose(both["kernel"][1], one["kernel"], rtol=1e-5, atol=1e-5)


def test_a_named_kernel_runs_where_init_saw_the_sharding():
    tx = build(OPTIMIZERS[0], implementation="pallas_tpu", state_format=fse.StateFormat())
    params = place(numbers(0), mesh_of(), SPECS["both"])
    state = tx.init(params)
    assert kernels_in_function(fused(tx), params, state, params) == 2


# --- every way to make sharded parameters ----------------------------------------------------------------------------


class Tower(linen.Module):
    """Two dense layers, whose kernels have logical axes."""

    @linen.compact
    def __call__(self, x):
        for name, axes in (("up", ("embed", "mlp")), ("down", ("mlp", "embed"))):
            init = linen.with_logical_partitioning(linen.initializers.lecun_normal(), axes)
            x = linen.Dense(1024, use_bias=False, kernel_init=init, name=name)(x)
        return x


class Layers(nnx.Module):
    def __init__(self, rngs):
        for name, axes in (("up", ("a", "b")), ("down", ("b", "a"))):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
            setattr(self, name, nnx.Linear(1024, 1024, use_bias=False, kernel_init=init, rngs=rngs))

    def __call__(self, x):
        return self.down(self.up(x))


LOGICAL = (("embed", "a"), ("mlp", "b"))


def concrete_arrays(tx, mesh, tmp_path):
    del tmp_path
    params = place(numbers(0), mesh, SPECS["both"])
    return params, tx.init(params)


def jit_with_out_shardings(tx, mesh, tmp_path):
    """Parameters and state in one `jit`: `init` sees no array."""
    del tmp_path

    def make():
        params = numbers(0)
        return params, tx.init(params)

    shapes = jax.eval_shape(make)
    like = jax.tree.map(lambda x: NamedSharding(mesh, SPECS["both"] if min(x.shape, default=0) > 64 else P()), shapes)
    return jax.jit(make, out_shardings=like)()


def linen_boxes(tx, mesh, tmp_path):
    del tmp_path
    model = Tower()

    def make(key):
        params = model.init(key, jnp.ones((2, 1024)))["params"]
        return params, tx.init(params)

    with linen.logical_axis_rules(LOGICAL):
        specs = linen.logical_to_mesh(linen.get_partition_spec(jax.eval_shape(make, jax.random.key(0))))
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
        return jax.jit(make, out_shardings=shardings)(jax.random.key(0))


def nnx_variables(tx, mesh, tmp_path):
    del tmp_path

    @nnx.jit
    def make():
        params = nnx.state(Layers(nnx.Rngs(0)), nnx.Param)
        return params, tx.init(params)

    with jax.set_mesh(mesh):
        return make()


def restored(tx, mesh, tmp_path):
    """From a checkpoint, into a transform whose `init` never ran on arrays."""
    saved = concrete_arrays(fse.adamw8bit(1e-3), mesh_of((8, 1)), tmp_path)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, fitting(x.shape))), saved
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(tmp_path / "saved", like)


def fitting(shape):
    return SPECS["both"] if len(shape) == 2 and min(shape) >= 4 else P()


WAYS = [concrete_arrays, jit_with_out_shardings, linen_boxes, nnx_variables, restored]


@pytest.mark.parametrize("make", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", STEPS)
@pytest.mark.one_in(2)
def test_a_step_has_kernels_and_no_collectives_however_its_parameters_were_made(make, how, tmp_path):
    tx = fse.adamw8bit(1e-2)
    params, state = make(tx, mesh_of(), tmp_path)
    step = STEPS[how](tx)
    assert kernels_for_tpu(step, params, state, params) == 2
    compiled = jax.jit(step).lower(params, state, params).compile()
    found = jax.device_get(compiled(params, state, params))
    assert not COLLECTIVES.findall(compiled.as_text())
    alone, one_state, grads = jax.device_put(jax.device_get((params, state, params)), jax.devices()[0])
    assert_same_bits(found, jax.device_get(jax.jit(STEPS[how](fse.adamw8bit(1e-2)))(alone, one_state, grads)))


# --- warnings ---------------------------------------------------------------------------------------------------------

UNKNOWN = "An optimizer step with 8-bit moments is lowered for several devices, and nothing says"


def test_a_step_whose_sharding_is_not_known_warns_and_says_what_helps():
    params = place(numbers(0), mesh_of(), SPECS["both"])
    for specs in (None, jax.tree.map(lambda x: x.sharding, params)):
        tx = fse.adamw8bit(1e-3, partition_specs=specs)
        args = params, jax.eval_shape(tx.init, params), params
        with pytest.warns(UserWarning, match=UNKNOWN) if specs is None else nullcontext():
            kernels = kernels_for_tpu(lambda *args, tx=tx: jax.jit(fused(tx))(*args), *args)
        assert kernels == (0 if specs is None else 2)
        jax.jit(lambda *args, tx=tx: jax.jit(fused(tx))(*args)).lower(*args)  # no kernel for CPU, so nothing is lost


def test_partition_specs_that_are_wrong_warn_and_move_no_data():
    mesh = mesh_of()
    params = place(numbers(0), mesh, SPECS["both"])
    wrong = {name: NamedSharding(mesh, SPECS["swapped"] if x.ndim == 2 else P()) for name, x in params.items()}
    tx = fse.adamw8bit(1e-3, partition_specs=wrong)
    args = params, tx.init(params), params
    with pytest.warns(
        UserWarning, match=r"has P\w*\('b', 'a'\) for a parameter of shape .* sharded as P\w*\('a', 'b'\)"
    ):
        compiled = jax.jit(fused(tx)).lower(*args).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    assert_same_bits(jax.device_get(compiled(*args)), jax.device_get(jax.jit(fused(fse.adamw8bit(1e-3)))(*args)))


def test_an_eager_step_runs_as_its_arrays_are_sharded():
    tx, params = fse.adamw8bit(1e-2), place(numbers(0), mesh_of(), SPECS["both"])
    want = jax.jit(fused(fse.adamw8bit(1e-2)))(params, tx.init(params), params)
    found = fused(tx)(params, tx.init(params), params)
    assert_same_bits(jax.device_get(found[0]["kernel"]), jax.device_get(want[0]["kernel"]))
    assert found[0]["kernel"].sharding == params["kernel"].sharding
    assert found[1][0].nu["kernel"].sharding == params["kernel"].sharding


@pytest.mark.parametrize("name", ["lamb8bit", "adam8bit"])
def test_a_step_that_does_not_read_the_parameter_sees_its_sharding(name):
    """The state is on one device, as `jit` of `init` makes it for any optimizer of optax."""
    tx = getattr(fse, name)(1e-3)
    params = place(numbers(0), mesh_of(), SPECS["both"])
    state = jax.jit(tx.init)(params)
    for step in STEPS.values():
        assert kernels_for_tpu(step(tx), params, state, params) == 2
