"""Tests that the 8-bit transform is found in every wrapper of an optimizer, its parameters and its state."""

import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import optax

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from tests.golden.make_optimizers import SAVED
from tests.interop.bitsandbytes.state_dicts import ADAM, GROUP, assert_same, one_vector, saved_of
from tests.interop.bitsandbytes.state_dicts import frozen as frozen
from tests.interop.bitsandbytes.tools import BLOCKS, our_optimizer


def test_the_state_is_found_inside_wrappers_and_every_count_is_set(frozen):
    saved, params = saved_of(ADAM, frozen)
    rate, options = optax.linear_schedule(1e-2, 0.0, 10), {"order": ["weight", "bias"]}
    inner = bitsandbytes.adamw8bit(rate, weight_decay=optax.constant_schedule(0.1), state_format=BLOCKS)
    expected, _ = bitsandbytes.load_optimizer_state(saved, our_optimizer(ADAM, state_format=BLOCKS), params, **options)
    for tx in (
        inner,
        optax.chain(optax.clip_by_global_norm(1.0), inner),
        fse.chain(optax.clip(1.0), inner),
        optax.inject_hyperparams(bitsandbytes.adamw8bit, static_args=("weight_decay",))(rate, state_format=BLOCKS),
    ):
        state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, **options)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        is_core = lambda x: isinstance(x, fse.ScaleByAdam8bitState)  # noqa: E731
        (core,) = [x for x in jax.tree.leaves(state, is_leaf=is_core) if is_core(x)]
        assert core.mu["weight"].dtype == jnp.uint8
        assert_same(core, expected[0])
        counts = [x for p, x in jax.tree_util.tree_leaves_with_path(state) if "count" in jax.tree_util.keystr(p[-1:])]
        assert len(counts) > 1 and all(count == SAVED for count in counts)
        tx.update(params, state, params)
        dumped, _ = bitsandbytes.dump_optimizer_state(tx, params, state, param_groups=GROUP, **options)
        assert dumped["state"][0]["step"] == SAVED


def test_parameters_may_be_variables_boxes_or_shapes(frozen):
    saved, params = saved_of(ADAM, frozen)
    tx, options = our_optimizer(ADAM, state_format=BLOCKS), {"order": ["weight", "bias"]}
    expected, _ = bitsandbytes.load_optimizer_state(saved, tx, params, **options)
    from_shapes, _ = bitsandbytes.load_optimizer_state(saved, tx, jax.eval_shape(lambda: params), **options)
    assert_same(from_shapes, expected)

    boxed = jax.tree.map(lambda p: nn.Partitioned(p, names=(None,) * p.ndim), params)
    variables = flax.nnx.State(jax.tree.map(flax.nnx.Param, params))
    for wrapped in (boxed, variables):
        state, _ = bitsandbytes.load_optimizer_state(saved, tx, wrapped, **options)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(wrapped))
        assert_same(jax.tree.leaves(state), jax.tree.leaves(expected))
        dumped, _ = bitsandbytes.dump_optimizer_state(tx, wrapped, state, param_groups=GROUP, **options)
        again, _ = bitsandbytes.load_optimizer_state(dumped, tx, wrapped, **options)
        assert jax.tree.structure(again) == jax.tree.structure(state)


def test_sharded_parameters_get_sharded_moments():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    saved = one_vector(8 * 512)
    saved["state"][0]["state1"] = saved["state"][0]["state1"].reshape(8, 512)
    params = {"kernel": jax.device_put(jnp.zeros((8, 512)), sharding)}
    state, _ = bitsandbytes.load_optimizer_state(saved, bitsandbytes.lion8bit(), params, order=["kernel"])
    assert state[0].mu["kernel"].sharding == sharding and state[0].mu_absmax["kernel"].sharding == sharding
