"""Tests that `abstract_state` returns the shardings that real states get, for every transform and wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.tools import assert_same_bits, may_straddle

SMALL = fse.StateFormat(min_size=0)
SHAPES = {"kernel": (256, 32), "wte": {"embedding": (64, 32)}, "bias": (32,)}
SPECS = {"kernel": P("a", "b"), "wte": {"embedding": P("b")}, "bias": P()}
IN_HOST = (("kernel", fse.Rule(memory_kind="pinned_host")),)


def mesh_of(kind=AxisType.Auto, shape=(2, 4)):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("a", "b"), axis_types=(kind,) * 2, devices=devices)


def shapes():
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def placed(mesh):
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return jax.device_put(jax.tree.map(lambda x: jnp.ones(x.shape), shapes()), named)


def only_matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def adamw(**options):
    return fse.adamw8bit(1e-3, **{"state_format": SMALL} | options)


TRANSFORMS = {
    "adamw8bit": adamw,
    "pinned_host": lambda: adamw(rules=IN_HOST),
    "rowwise": lambda: adamw(rules=(("wte", "rowwise"), ("kernel", "bf16"))),
    "blocks that straddle": lambda: adamw(state_format=fse.StateFormat(block_size=256, min_size=0)),
    "MultiSteps": lambda: optax.MultiSteps(optax.chain(optax.clip(1.0), adamw()), 2),
    "masked": lambda: optax.masked(adamw(), only_matrices),
    "inject": lambda: optax.inject_hyperparams(fse.lion8bit)(1e-3, state_format=SMALL),
    "quantize_state": lambda: fse.quantize_state(optax.adamw(1e-3), state_format=SMALL),
    "quantize_state, straddling": lambda: fse.quantize_state(
        optax.adamw(1e-3), state_format=fse.StateFormat(block_size=256, min_size=0)
    ),
    "row_sparse": lambda: fse.row_sparse(adamw()),
    "clipped": lambda: optax.chain(fse.percentile_clipping(), adamw()),
    "stochastic": lambda: fse.stochastic_round_updates(adamw()),
    "optax.adamw": lambda: optax.adamw(1e-3),
}


def assert_sharded_like(like, state):
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype)
        if isinstance(x.sharding, NamedSharding):
            assert shape.sharding.is_equivalent_to(x.sharding, x.ndim)
            assert (shape.sharding.memory_kind == "pinned_host") == (x.sharding.memory_kind == "pinned_host")
        else:
            assert shape.sharding.is_fully_replicated


def marked(name):
    marks = [pytest.mark.recent_compiler] if name == "pinned_host" else []  # not on CPU before JAX 0.10
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in TRANSFORMS])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@may_straddle
def test_shardings_equal_those_of_the_real_state(name, kind):
    tx, mesh = TRANSFORMS[name](), mesh_of(kind)
    params = placed(mesh)
    state, like = tx.init(params), fse.abstract_state(tx, params)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(like))
    assert_sharded_like(like, state)
    with jax.set_mesh(mesh):
        assert fse.abstract_state(tx, shapes(), shardings=SPECS) == like
    out = jax.tree.map(lambda x: x.sharding, like)
    assert_same_bits(jax.jit(tx.init, out_shardings=out)(params), state)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sums_over_an_axis_are_sharded_along_the_others(kind):
    """Optax itself would replicate them."""
    tx, mesh = optax.adafactor(1e-3, min_dim_size_to_factor=16), mesh_of(kind)
    with jax.set_mesh(mesh):
        params = placed(mesh)
        like = fse.abstract_state(tx, params)
        assert_same_bits(
            jax.jit(tx.init, out_shardings=jax.tree.map(lambda x: x.sharding, like))(params), tx.init(params)
        )
    assert {((256,), P("a")), ((32,), P("b"))} <= {(x.shape, x.sharding.spec) for x in jax.tree.leaves(like[0])}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_learning_rate_can_be_an_array_on_the_mesh(kind):
    """A restored learning rate is one. Types of another mesh cannot be mixed with it."""
    mesh = mesh_of(kind)
    rate = jax.device_put(jnp.float32(1e-3), NamedSharding(mesh, P()))
    tx, params = optax.inject_hyperparams(fse.adamw8bit)(rate, state_format=SMALL), placed(mesh)
    assert_sharded_like(fse.abstract_state(tx, params), tx.init(params))


def test_shardings_are_found_by_path_if_they_do_not_propagate_through_init():
    def init(params):
        sums = jnp.concatenate([p.ravel() for p in jax.tree.leaves(params)])
        return {"mu": jax.tree.map(jnp.zeros_like, params), "sums": sums}

    tx, params = optax.GradientTransformation(init, lambda g, s, p=None: (g, s)), placed(mesh_of())
    like = fse.abstract_state(optax.chain(tx, adamw()), params)
    assert like[0]["mu"]["kernel"].sharding.spec == P("a", "b") and like[0]["sums"].sharding.is_fully_replicated
    assert_sharded_like(like[1], adamw().init(params))
    flat = fse.abstract_state(optax.flatten(optax.adam(1e-3)), params)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(flat))


def test_an_error_in_init_is_raised():
    def init(params):
        raise RuntimeError("own error")

    with pytest.raises(RuntimeError, match="own error"):
        fse.abstract_state(optax.GradientTransformation(init, lambda g, s, p=None: (g, s)), placed(mesh_of()))


def test_parameters_that_are_not_arrays_need_no_sharding():
    sharding = NamedSharding(mesh_of(), P("a"))
    params = {"kernel": jax.ShapeDtypeStruct((256, 32), jnp.float32), "number": 2.0, "none": None}
    like = fse.abstract_state(
        optax.adamw(1e-3), params, shardings={"kernel": sharding, "number": sharding, "none": None}
    )
    assert like[0].mu["kernel"].sharding.spec == P("a", None) and like[0].mu["none"] is None


def test_a_state_in_host_memory_has_its_memory_kind():
    like = fse.abstract_state(adamw(rules=IN_HOST), placed(mesh_of()))
    kinds = {
        jax.tree_util.keystr(path): x.sharding.memory_kind for path, x in jax.tree_util.tree_leaves_with_path(like)
    }
    assert {path for path, kind in kinds.items() if kind == "pinned_host"} == {
        f"[0].{field}['kernel']" for field in ("mu", "nu", "mu_absmax", "nu_absmax")
    }


@may_straddle
def test_an_abstract_mesh_needs_no_devices():
    """Blocks straddle devices here, so codes are sharded and scales are not."""
    pod = AbstractMesh((256,), ("fsdp",))
    tx, sharding = adamw(), NamedSharding(pod, P("fsdp"))
    like = fse.abstract_state(tx, {"kernel": jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16, sharding=sharding)})
    assert like[0].mu["kernel"].sharding.spec == P("fsdp", None)
    assert like[0].mu_absmax["kernel"].sharding.spec == P(None, None)
    assert like[0].count.sharding == NamedSharding(pod, P())


def test_a_sharding_of_none_means_replicated():
    like = fse.abstract_state(
        adamw(),
        shapes(),
        shardings={"kernel": NamedSharding(mesh_of(), P("a")), "wte": {"embedding": None}, "bias": None},
    )
    assert like[0].mu["kernel"].sharding.spec == P("a", None)
    assert like[0].mu["wte"]["embedding"].sharding.is_fully_replicated


def test_without_known_shardings_the_result_equals_eval_shape():
    tx = adamw()
    assert fse.abstract_state(tx, shapes()) == jax.eval_shape(tx.init, shapes())
    assert fse.abstract_state(tx, {}) == jax.eval_shape(tx.init, {})


def test_a_single_device_sharding_is_accepted():
    device = SingleDeviceSharding(jax.devices()[3])
    like = fse.abstract_state(adamw(rules=IN_HOST), shapes(), shardings=jax.tree.map(lambda _: device, shapes()))
    assert {x.sharding.device_set == device.device_set for x in jax.tree.leaves(like)} == {True}
    assert like[0].mu["kernel"].sharding.memory_kind == "pinned_host"
    assert like[0].mu["bias"].sharding == device


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nnx_variables_get_the_shardings_of_the_real_state(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.ones, ("a", "b"))
        model = nnx.Linear(256, 32, kernel_init=init, use_bias=False, rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        params = jax.device_put(params, nnx.get_named_sharding(params, mesh))
        tx = adamw()
        state, like = tx.init(params), fse.abstract_state(tx, params)
        assert_sharded_like(like, state)
        assert like[0].mu["kernel"].get_value().sharding.is_equivalent_to(NamedSharding(mesh, P("a", "b")), 2)
        restored = jax.device_put(state, jax.tree.map(lambda x: x.sharding, like))
        assert_same_bits(restored, state)


def test_linen_boxes_get_the_shardings_of_the_real_state():
    mesh = mesh_of()
    box = nn.Partitioned(jnp.ones((256, 32)), names=("a", "b"))
    params = {"kernel": box.replace(value=jax.device_put(box.value, NamedSharding(mesh, P("a", "b"))))}
    tx = adamw()
    like = fse.abstract_state(tx, params)
    assert_sharded_like(like, tx.init(params))
    assert like[0].mu["kernel"].value.sharding.is_equivalent_to(NamedSharding(mesh, P("a", "b")), 2)


def test_orbax_restores_into_an_abstract_state_on_another_mesh(tmp_path):
    tx, params = adamw(rules=IN_HOST), placed(mesh_of())
    state = tx.init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        other = jax.tree.map(lambda spec: NamedSharding(mesh_of(shape=(4, 1)), spec), SPECS)
        like = fse.abstract_state(tx, shapes(), shardings=other)
        restored = checkpointer.restore(tmp_path / "state", like)
    assert_same_bits(restored, state)
    assert_sharded_like(like, restored)


BAD = {
    "not shardings": ({"kernel": "a"}, TypeError, "must be a pytree of PartitionSpec or NamedSharding"),
    "no mesh": ({"kernel": P("a")}, ValueError, r"jax.set_mesh\(mesh\)"),
    "another tree": ({}, ValueError, "must be a pytree like the parameters"),
    "unequal shards": ({"kernel": NamedSharding(AbstractMesh((3,), ("a",)), P("a"))}, ValueError, "cannot be sharded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_an_error_with_the_way_out(name):
    given, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fse.abstract_state(adamw(), {"kernel": jax.ShapeDtypeStruct((256, 32), jnp.float32)}, shardings=given)


def test_parameters_on_several_meshes_are_refused():
    two = {"a": NamedSharding(mesh_of(), P("a")), "b": NamedSharding(mesh_of(shape=(4, 2)), P("a"))}
    params = {name: jax.ShapeDtypeStruct((256, 32), jnp.float32, sharding=where) for name, where in two.items()}
    with pytest.raises(ValueError, match="must all be on one mesh"):
        fse.abstract_state(adamw(), params)
    with pytest.raises(ValueError, match="must all be on one mesh"):
        fse.abstract_state(adamw(), params, shardings=two | {"b": SingleDeviceSharding(jax.devices()[0])})
