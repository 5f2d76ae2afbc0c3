"""Tests that each parameter has one plan, which is the same in `init`, in every step and in the report."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from flax_stable_embed.optim.storage import plan as plan_module
from flax_stable_embed.optim.storage.rules import Rules
from tests.tools import SMALL, every_optimizer

PARAMS = {
    "kernel": jnp.ones((64, 512)),
    "head": jnp.ones((64, 512)),
    "norm": {"scale": jnp.ones(64)},
    "wte": {"embedding": jnp.ones((512, 64))},
}
RULES = (("head", 8), ("kernel", fse.Rule(lr_scale=0.5)))


@pytest.fixture
def lookups(monkeypatch):
    """Counts how often the user rules are searched for each parameter."""
    counted = collections.Counter()
    search = Rules.matches

    def matches(self, path, shape):
        counted[path] += 1
        return search(self, path, shape)

    monkeypatch.setattr(Rules, "matches", matches)
    return counted


@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused_update"])
@every_optimizer
def test_rules_are_searched_once_per_parameter_and_call(case, fused, lookups):
    tx = case.ours(**case.hyper, state_format=SMALL, rules=RULES)
    once = dict.fromkeys(("head", "kernel", "norm/scale", "wte/embedding"), 1)
    state = tx.init(PARAMS)
    assert lookups == once
    lookups.clear()
    jax.eval_shape(partial(fse.fused_update, tx) if fused else tx.update, PARAMS, state, PARAMS)
    assert lookups == once


def test_a_wrapped_transform_searches_rules_once_per_parameter_and_call(lookups):
    tx = fse.quantize_state(optax.adamw(1e-3), state_format=SMALL, rules=(("head", 32),))
    state = tx.init(PARAMS)
    assert set(lookups.values()) == {1}
    lookups.clear()
    jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert set(lookups.values()) == {1}


@every_optimizer
def test_describe_shows_the_plans_that_update_uses(case, monkeypatch):
    tx = case.ours(**case.hyper, state_format=SMALL, rules=(*RULES, ("norm", "bf16")))
    used = {}
    plan_stored = plan_module.Planner.plan_stored

    def spy(self, path, *args):
        used[path] = plan_stored(self, path, *args)
        return used[path]

    monkeypatch.setattr(plan_module.Planner, "plan_stored", spy)
    jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)
    rows = {row.path: row for row in fse.describe(tx, PARAMS).rows}
    assert rows.keys() == used.keys()
    for path, plan in used.items():
        shown = rows[path]
        assert (shown.shape, shown.bits, shown.block) == (plan.shape, plan.bits, plan.blocks_text)
        assert (shown.reason, shown.implementation) == (plan.reason, plan.implementation)
        assert shown.overrides == plan.rule.settings_text


def test_update_takes_the_bits_that_metadata_chose_in_init_from_the_state():
    """`update` does not get the metadata of NNX variables, but it gets the dtypes of the state."""
    planner = plan_module.Planner(Rules((), SMALL))
    plan = planner.plan_stored("kernel", jax.ShapeDtypeStruct((64, 512), jnp.float32), 32)
    assert (plan.bits, plan.blocks, plan.reason) == (32, None, "as the state stores it")
    plan = planner.plan_stored("wte/embedding", jax.ShapeDtypeStruct((64, 512), jnp.float32), 8)
    assert (plan.bits, plan.blocks) == (8, SMALL.blocks("wte/embedding", (64, 512)))


def test_partition_specs_without_a_mesh_are_an_error_in_a_step():
    tx = fse.adamw8bit(1e-3, partition_specs={"kernel": PartitionSpec("data")}, state_format=SMALL)
    params = {"kernel": jnp.ones((64, 512))}
    state = tx.init(params)  # a mesh may be set later
    with pytest.raises(
        ValueError, match=r"`partition_specs` has .*'data'.* for parameter 'kernel', which needs a mesh"
    ):
        tx.update(params, state, params)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        tx.update(params, state, params)


def test_partition_specs_with_an_axis_that_the_mesh_does_not_have_are_an_error():
    tx = fse.adamw8bit(1e-3, partition_specs={"kernel": PartitionSpec(("data", "model"))}, state_format=SMALL)
    params = {"kernel": jnp.ones((64, 512))}
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        with pytest.raises(ValueError, match="the mesh has the axes data and no 'model'"):
            tx.init(params)


@pytest.mark.parametrize(
    "spec, message",
    [
        (PartitionSpec(None, None, "data"), r"its shape \(64, 512\) has 2 axes"),
        (NamedSharding(AbstractMesh((4,), ("data",)), PartitionSpec("data")), "jax.set_mesh has {'data': 2}"),
    ],
)
def test_partition_specs_that_do_not_fit_the_parameter_or_the_mesh_are_an_error(spec, message):
    tx = fse.adamw8bit(1e-3, partition_specs={"kernel": spec}, state_format=SMALL)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))), pytest.raises(ValueError, match=message):
        tx.init({"kernel": jnp.ones((64, 512))})


def test_partition_specs_need_no_mesh_if_array_types_have_one():
    explicit = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,)), PartitionSpec("data"))
    params = jax.device_put({"kernel": jnp.ones((64, 512))}, explicit)
    tx = fse.adamw8bit(1e-3, partition_specs={"kernel": PartitionSpec("data")}, state_format=SMALL)
    jax.eval_shape(tx.update, params, tx.init(params), params)


def test_replicated_parameters_need_no_mesh():
    tx = fse.adamw8bit(1e-3, partition_specs={"kernel": PartitionSpec(None)}, state_format=SMALL)
    params = {"kernel": jnp.ones((64, 512))}
    tx.update(params, tx.init(params), params)


def test_moments_do_not_change_if_the_gradient_is_none():
    params = {"kernel": jnp.ones((64, 512)), "other": jnp.ones((64, 512))}
    tx = fse.adamw8bit(1e-3, rules=(("other", fse.Rule(8, fse.StateFormat("linear", min_size=0))),), weight_decay=0.0)
    state = tx.init(params)
    updates, new = tx.update({"kernel": params["kernel"], "other": None}, state, params)
    assert updates["other"] is None
    np.testing.assert_array_equal(new[0].mu["other"], state[0].mu["other"])


def test_a_report_can_be_made_for_another_platform():
    shapes = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    tx = fse.adamw8bit(1e-3)
    assert fse.describe(tx, shapes).rows[0].implementation == "xla"
    on_one = {"kernel": jax.device_put(jnp.ones((1024, 1024)), jax.devices()[0])}
    assert fse.describe(tx, on_one, platform="gpu").rows[0].implementation == "pallas_gpu"
    mesh = AbstractMesh((16,), ("fsdp",))
    sharded = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp"))}
    fits = fse.adamw8bit(1e-3, state_format=fse.StateFormat(shards=16))
    for platform in ("tpu", "gpu"):
        assert (
            fse.describe(fits, shapes, shardings=sharded, platform=platform).rows[0].implementation
            == f"pallas_{platform}"
        )
        row = fse.describe(
            fse.adamw8bit(1e-3, state_format=fse.StateFormat(block_size=512, block_axis=0)),
            shapes,
            shardings=sharded,
            platform=platform,
        ).rows[0]
        assert "does not divide it into shards of full blocks" in row.implementation
    with pytest.raises(ValueError, match="`platform` must be"):
        fse.describe(tx, shapes, platform="quantum")


def test_parameters_that_metadata_keeps_in_fp32_need_no_partition_specs():
    params = nnx.State({"a": nnx.Param(jnp.ones((64, 128)), optim_bits=32), "b": nnx.Param(jnp.ones((64, 128)))})
    tx = fse.adamw8bit(1e-3, partition_specs={"b": PartitionSpec()})
    jax.eval_shape(tx.update, params, tx.init(params), params)


def test_rules_are_not_checked_for_a_parameter_without_a_gradient():
    params = {"a": jnp.ones((64, 128), jnp.int32), "b": jnp.ones((64, 128))}
    tx = fse.adamw8bit(1e-3, rules=((".*", 8),))
    jax.eval_shape(tx.update, {"a": None, "b": params["b"]}, tx.init(params), params)


DEAD = {
    "everything first": (((".*", 8), ("kernel", 32)), ("'kernel'", "'.*'")),
    "the same twice": ((("a/kernel", 32), ("a/kernel", 8), (".*", 32)), ("'a/kernel'", "'a/kernel'")),
    "by a predicate": (((fse.where(lambda path, shape: len(shape) == 2), 8), ("kernel$", 32)), ("'kernel$'", "where")),
    "by two rules": ((("a/", 32), ("b/", 8), ("kernel", 32)), ("'kernel'", "'a/'")),
}


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("wrapped", [False, True], ids=["ours", "quantize_state"])
def test_a_rule_that_an_earlier_one_always_hides_is_an_error(name, wrapped):
    rules, (dead, first) = DEAD[name]
    params = {"a": {"kernel": jnp.ones((64, 128))}, "b": {"kernel": jnp.ones((64, 128))}}
    tx = fse.quantize_state(optax.adam(1e-3), rules=rules) if wrapped else fse.adamw8bit(1e-3, rules=rules)
    with pytest.raises(ValueError, match="which never applies") as error:
        tx.init(params)
    assert f"`rules` has ({dead}, ...), which never applies: ({first}" in str(error.value)


def test_a_rule_that_applies_to_some_of_its_matches_is_alive():
    params = {"a": {"kernel": jnp.ones((64, 128))}, "b": {"kernel": jnp.ones((64, 128))}}
    fse.adamw8bit(1e-3, rules=(("a/", 32), ("kernel", 8))).init(params)
