"""Tests `t5x_partition_rules`: logical axes of every state type, and shardings that divide every array."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.frameworks.t5x import AXES, derive, state_and_shardings
from tests.frameworks.tools import OF_256, build, by_path
from tests.tools import SMALL
from tests.tools import build as build_case


def test_every_state_type_has_a_rule_and_others_are_refused():
    types = {x for name, x in vars(fse).items() if name.endswith("State") and hasattr(x, "_fields")}
    assert types == set(fse.interop.t5x_partition_rules())
    with pytest.raises(ValueError, match="unregistered optax state type"):
        derive(optax.ScaleByAdamState(None, None, None), AXES)


WRAPPED = {
    "quantize_state": build("quantize_state"),
    "bf16": fse.adamw8bit(0.01, rules=(("wi", "bf16"),), state_format=SMALL),
    "rowwise": fse.adamw8bit(0.01, rules=(("wi", "rowwise"),), state_format=SMALL),
    "lazy": fse.row_sparse(build("adamw8bit")),
    "catch_up": fse.row_sparse(build("lion8bit"), semantics="catch_up"),
    "stochastic_round_updates": fse.stochastic_round_updates(build("adamw8bit")),
    "percentile_clipping": fse.chain(fse.percentile_clipping(per_parameter=True), build("adamw8bit")),
    "masked": optax.masked(build("adamw8bit"), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "MultiSteps": optax.MultiSteps(build("lion8bit"), 2).gradient_transformation(),
    **{case.name: build_case(case) for case in OPTIMIZERS},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_every_state_is_sharded_along_axes_that_divide(name):
    state, where = state_and_shardings(WRAPPED[name])
    sharded = {path: x for path, x in by_path(where).items() if x.spec != P()}
    for path, x in by_path(state).items():
        by_path(where)[path].shard_shape(x.shape)  # raises unless it divides
    kernels = {path for path in by_path(state) if "kernel" in path and ("mu" in path or "trace" in path)}
    assert {path for path in kernels if "absmax" not in path} <= sharded.keys()
    scales = [sharded[path].spec for path in kernels & sharded.keys() if "absmax" in path]
    assert all(spec == P("data", "model") or spec == P("model", "data") for spec in scales)
    assert not any(path.endswith(("count", "format")) for path in sharded)


def test_scales_are_sharded_only_along_axes_that_divide():
    state, where = state_and_shardings(build("adamw8bit", OF_256))
    assert state[0].mu_absmax["mlp"]["wi"]["kernel"].shape == (64, 3)
    assert where[0].mu["mlp"]["wi"]["kernel"].spec == P("data", "model")
    assert where[0].mu_absmax["mlp"]["wi"]["kernel"].spec == P("data", None)
    assert where[0].mu_absmax["token_embedder"]["embedding"].spec == P()


def test_scales_are_sharded_if_shards_divides_the_blocks():
    axes = {"kernel": P("embed", "mlp")}
    state = fse.scale_by_lion8bit(state_format=fse.StateFormat(shards=2, min_size=0)).init(
        {"kernel": jnp.ones((8, 128))}
    )
    assert state.mu_absmax["kernel"].shape == (8, 2)
    for shards, expected in ((2, P("embed", "mlp")), (8, P("embed", None))):
        rules = fse.interop.t5x_partition_rules(shards)
        assert rules[fse.ScaleByLion8bitState](state, axes).mu_absmax["kernel"] == expected


def test_shards_must_be_a_positive_integer():
    with pytest.raises(ValueError, match="`shards` must be positive, got 0"):
        fse.interop.t5x_partition_rules(0)
    with pytest.raises(TypeError, match="`shards` must be an integer, got '8'"):
        fse.interop.t5x_partition_rules("8")
