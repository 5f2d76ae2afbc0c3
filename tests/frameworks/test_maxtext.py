"""Tests MaxText's flows in Linen and NNX, also with ZeRO-1 and with the optimizer state in host memory.

The flows are those of https://github.com/AI-Hypercomputer/maxtext in `src/maxtext/utils/maxtext_utils.py`
(get_abstract_state, setup_initial_state; the Linen path as of 2025), `utils/sharding.py` (add_data_to_sharding,
maybe_update_params_sharding_with_opt) and `trainers/pre_train/train.py` (train_step), written again here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.frameworks.tools import (
    assert_8bit,
    assert_codes_are_sharded_like_parameters,
    assert_same_numbers,
    batch_of,
    build,
    by_path,
    every_format,
    every_optimizer,
    loss_of,
    without_framework,
)

RULES = (("vocab", "tensor"), ("embed", "fsdp"), ("mlp", "tensor"), ("layers", None))
IDS = jnp.zeros((2, 8), jnp.int32)


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def over_data(mesh, x, sharding):
    """ZeRO-1: adds "data" to the first axis that it divides and that is not sharded over "tensor"."""
    shape, spec = sharding.shard_shape(x.shape), sharding.spec  # raises where the sharding itself does not divide
    for i, (n, names) in enumerate(zip(shape, spec)):
        names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        if n % mesh.shape["data"] == 0 and "tensor" not in names:
            return NamedSharding(mesh, P(*spec[:i], ("data", *names), *spec[i + 1 :]))
    return sharding


def on_host(sharding):
    return sharding.with_memory_kind("pinned_host")


def on_device(sharding):
    return sharding.with_memory_kind("device")


# --- Linen ------------------------------------------------------------------------------------------------------------


def logical(init, *names):
    return nn.with_logical_partitioning(init, names)


class Layer(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, _):
        init = nn.initializers.ones
        x = nn.RMSNorm(scale_init=logical(init, "embed"), param_dtype=self.dtype)(x)
        kernel_init = logical(init, "embed", "mlp")
        up = nn.Dense(768, use_bias=False, kernel_init=kernel_init, param_dtype=self.dtype)(x)
        return x + jnp.mean(up), None


class Decoder(nn.Module):
    """An embedding and layers that a scan stacks along axis 1, as in MaxText. `dtype` is its `weight_dtype`."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids):
        table = logical(nn.initializers.ones, "vocab", "embed")
        tokens = fse.linen.Embed(128, 64, embedding_init=table, param_dtype=self.dtype, name="token_embedder")
        layers = nn.scan(
            Layer,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(dtype=self.dtype, name="layers")(tokens(ids), None)
        return tokens.attend(x)


def linen_flow(tx, *, zero1=False, offload=False, steps=3, dtype=jnp.float32):
    """Runs MaxText's Linen flow: abstract TrainState with boxes, its specs, jitted init, donated steps."""
    mesh, model = mesh_of((2, 2, 2)), Decoder(dtype)

    def init(key):
        return TrainState.create(apply_fn=model.apply, params=model.init(key, IDS), tx=tx)

    def step(state, batch):
        if offload:
            state = state.replace(opt_state=jax.device_put(state.opt_state, jax.tree.map(on_device, where.opt_state)))
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        abstract = jax.eval_shape(init, jax.random.key(0))
        where = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
        shapes = unboxed(abstract)
        if zero1:
            opt_state = jax.tree.map(lambda x, s: over_data(mesh, x, s), shapes.opt_state, where.opt_state)
            where = where.replace(opt_state=opt_state, params=mu_of(opt_state))
        if offload:
            where = where.replace(opt_state=jax.tree.map(on_host, where.opt_state))
        state = jax.jit(init, out_shardings=where)(jax.random.key(0))
        state = unboxed(state)
        step = jax.jit(step, in_shardings=(where, None), out_shardings=(where, None), donate_argnums=0)
        for i in range(steps):
            state, _ = step(state, batch_of(shapes.params, i))
    assert step._cache_size() <= 1
    return state


def unboxed(tree):
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def mu_of(opt_state):
    """The tree from which MaxText takes the parameters' new shardings under ZeRO-1."""
    is_adam = lambda x: hasattr(x, "_fields") and "mu" in x._fields  # noqa: E731
    (found,) = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    return found.mu


@every_optimizer
@every_format
@pytest.mark.one_in(7)
def test_codes_are_sharded_like_parameters_in_the_linen_flow(name, state_format):
    tx = build(name, state_format)
    state = linen_flow(tx)
    assert_codes_are_sharded_like_parameters(state.opt_state, state.params)
    assert_same_numbers((state.params, state.opt_state), without_framework(tx, state.params))


@every_optimizer
@every_format
@pytest.mark.one_in(7, start=1)
def test_the_linen_flow_with_zero1_shards_the_state_over_data(name, state_format):
    tx = build(name, state_format)
    state = linen_flow(tx, zero1=True)
    assert_codes_are_sharded_like_parameters(state.opt_state, state.params)
    assert all("data" in str(codes.sharding.spec) for codes, _ in assert_8bit(state.opt_state, state.params))
    assert_same_numbers((state.params, state.opt_state), without_framework(tx, state.params))


@every_optimizer
@pytest.mark.one_in(5)
@pytest.mark.recent_compiler
def test_the_linen_flow_keeps_the_state_in_host_memory(name):
    tx = build(name)
    state = linen_flow(tx, offload=True)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state)} == {"pinned_host"}
    assert_codes_are_sharded_like_parameters(state.opt_state, state.params)
    assert_same_numbers((state.params, state.opt_state), without_framework(tx, state.params))


# --- NNX --------------------------------------------------------------------------------------------------------------


class Stack(nnx.Module):
    """The same parameters in NNX: a table and two layers stacked along axis 1."""

    def __init__(self, rngs, dtype):
        metadata = {"out_sharding": ("vocab", "embed")}
        init = nnx.initializers.ones
        options = {"embedding_init": init, "embedding_metadata": metadata, "param_dtype": dtype}
        self.token_embedder = fse.nnx.Embed(128, 64, **options, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: 1}), transform_metadata={nnx.PARTITION_NAME: "layers"})
        def layers(rngs):
            metadata = {"out_sharding": ("embed", "mlp")}
            options = {"kernel_init": init, "kernel_metadata": metadata, "param_dtype": dtype}
            return nnx.Linear(64, 768, use_bias=False, **options, rngs=rngs)

        self.layers = layers(rngs)


class TrainStateNNX(nnx.Module):
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer


def nnx_flow(tx, *, zero1=False, offload=False, steps=3, dtype=jnp.float32):
    """Runs MaxText's NNX flow: abstract state without a mesh, shardings from metadata, jitted init, donated steps."""
    mesh = mesh_of((2, 2, 2))

    def make():
        model = Stack(nnx.Rngs(0), dtype)
        return TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

    def placed(variable):
        names = variable.get_metadata().get("out_sharding") or ()
        return variable.replace(NamedSharding(mesh, P(*(dict(RULES)[n] if n else None for n in names))))

    def step(state, batch):
        train = nnx.merge(graph, state)
        grads = nnx.grad(lambda model: loss_of(nnx.state(model, nnx.Param), batch))(train.model)
        if offload:
            opt_state = jax.device_put(nnx.state(train.optimizer), jax.tree.map(on_device, where.optimizer))
            nnx.update(train.optimizer, opt_state)
        train.optimizer.update(train.model, grads)
        return nnx.state(train)

    with nnx.logical_axis_rules(RULES), nnx.use_eager_sharding(False):
        graph, abstract = nnx.split(nnx.eval_shape(make))
        where = jax.tree.map(placed, abstract, is_leaf=is_variable)
        if zero1:
            where.optimizer = jax.tree.map(lambda x, s: over_data(mesh, x, s), abstract.optimizer, where.optimizer)
            mu = dict(jax.tree_util.tree_leaves_with_path(find_mu(where.optimizer.opt_state), is_leaf=is_variable))
            where.model = jax.tree_util.tree_map_with_path(
                lambda path, v: v.replace(mu[path].get_value()), where.model, is_leaf=is_variable
            )
        if offload:
            where.optimizer = jax.tree.map(on_host, where.optimizer)
        state = jax.jit(lambda: nnx.state(make()), out_shardings=where)()
        step = jax.jit(step, in_shardings=(where, None), out_shardings=where, donate_argnums=0)
        for i in range(steps):
            state = step(state, batch_of(nnx.to_pure_dict(abstract.model), i))
    assert step._cache_size() <= 1
    return nnx.to_pure_dict(state.model), nnx.to_pure_dict(state.optimizer.opt_state)


def is_variable(x):
    return isinstance(x, nnx.Variable)


def find_mu(tree):
    """Like MaxText, takes the first node with `mu` and `nu` as Adam's state, and its `mu` as the parameters' tree."""
    if "mu" in tree and "nu" in tree:
        return tree["mu"]
    return next((mu for x in tree.values() if hasattr(x, "values") and (mu := find_mu(x)) is not None), None)


@every_optimizer
@every_format
@pytest.mark.one_in(7, start=1)
def test_codes_are_sharded_like_parameters_in_the_nnx_flow(name, state_format):
    tx = build(name, state_format)
    params, state = nnx_flow(tx)
    assert_codes_are_sharded_like_parameters(state, params)
    assert_same_numbers((params, state), without_framework(tx, params))


@every_format
@pytest.mark.parametrize("name", ["adamw8bit", "quantize_state"])  # MaxText has ZeRO-1 for Adam alone
@pytest.mark.one_in(5)
def test_the_nnx_flow_with_zero1_shards_the_state_over_data(name, state_format):
    tx = build(name, state_format)
    params, state = nnx_flow(tx, zero1=True)
    assert_codes_are_sharded_like_parameters(state, params)
    assert all("data" in str(codes.sharding.spec) for codes, _ in assert_8bit(state, params))
    assert_same_numbers((params, state), without_framework(tx, params))


@every_optimizer
@pytest.mark.one_in(5, start=1)
@pytest.mark.recent_compiler
def test_the_nnx_flow_keeps_the_state_in_host_memory(name):
    tx = build(name)
    params, state = nnx_flow(tx, offload=True)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
    assert_codes_are_sharded_like_parameters(state, params)
    assert_same_numbers((params, state), without_framework(tx, params))


# --- weight_dtype=bfloat16 --------------------------------------------------------------------------------------------

SPLIT = fse.in_place(fse.split_weights(build("adamw8bit")))


@pytest.mark.parametrize("flow", ["linen", "nnx"])
def test_split_weights_train_bfloat16_parameters_and_shard_their_remainders_like_them(flow):
    if flow == "linen":
        state = linen_flow(SPLIT, dtype=jnp.bfloat16)
        params, (count, remainder, *_) = state.params, state.opt_state
    else:
        params, state = nnx_flow(SPLIT, dtype=jnp.bfloat16)
        count, remainder = state["count"], state["remainder"]
    params, remainder = by_path(params), by_path(remainder)
    assert int(count) == 3 and params.keys() == remainder.keys()
    want, _ = without_framework(SPLIT, params)
    for path, p in params.items():
        assert (p.dtype, remainder[path].shape) == (jnp.bfloat16, p.shape), path
        assert remainder[path].sharding.is_equivalent_to(p.sharding, p.ndim), path
        np.testing.assert_allclose(np.asarray(p, np.float32), np.asarray(want[path], np.float32), rtol=2**-8)
    assert any(not p.sharding.is_fully_replicated for p in params.values())
