"""T5X: logical axes of a state by the types in it, from `fse.interop.t5x_partition_rules`.

The flow is that of https://github.com/google-research/t5x/blob/main/t5x/optimizers.py (OptaxStatePartitionRules,
OptaxWrapper.derive_logical_axes), in our own words.
"""

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.frameworks.tools import (
    OF_256,
    assert_codes_lie_as_parameters,
    assert_same_numbers,
    batch_of,
    build,
    by_path,
    every_optimizer,
    loss_of,
    without_framework,
)
from tests.tools import SMALL
from tests.tools import build as build_case

AXES = flax.core.freeze(
    {
        "token_embedder": {"embedding": P("vocab", "embed")},
        "mlp": {"wi": {"kernel": P("embed", "mlp")}, "wo": {"kernel": P("mlp", "embed")}},
        "norm": {"scale": P("embed")},
    }
)
SIZES = {"vocab": 128, "embed": 64, "mlp": 768}
ON_MESH = {"vocab": "model", "mlp": "model", "embed": "data"}
SHAPES = jax.tree.map(lambda axes: jax.ShapeDtypeStruct([SIZES[a] for a in axes], jnp.float32), AXES)
ITS_OWN = {
    optax.EmptyState: lambda state, axes: state,
    optax.ScaleByScheduleState: lambda state, axes: state._replace(count=None),
    optax.MaskedState: lambda state, axes: optax.MaskedState(derive(state.inner_state, axes)),
    optax.MultiStepsState: lambda state, axes: optax.MultiStepsState(
        None, None, derive(state.inner_opt_state, axes), acc_grads=axes, skip_state=()
    ),
}
RULES = ITS_OWN | fse.interop.t5x_partition_rules()


def derive(state, axes):
    """What T5X makes of a state: its table for the types in it, None elsewhere, and no unknown type."""

    def is_state(x):
        return isinstance(x, tuple) and hasattr(x, "_fields") and type(x).__name__.endswith("State")

    def one(x):
        if type(x) not in RULES and is_state(x):
            raise ValueError(f"Encountered unregistered optax state type {type(x).__name__}")
        return RULES[type(x)](x, axes) if is_state(x) else None

    leaves, tree = jax.tree.flatten(state, is_leaf=is_state)
    return tree.unflatten(map(one, leaves))


def placed(axes):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, P() if axes is None else P(*(ON_MESH[a] if a else None for a in axes)))


def state_and_shardings(tx):
    """The abstract state, and where T5X puts it; through a state dict, as `Optimizer.restore_state` does."""
    state = jax.eval_shape(tx.init, SHAPES)
    axes = derive(state, AXES)
    axes = flax.serialization.from_state_dict(axes, flax.serialization.to_state_dict(axes))
    where = jax.tree.map(lambda x, axes: x if x is None else placed(axes), state, axes, is_leaf=lambda x: x is None)
    return state, where


def flow(tx, steps=3):
    params_where = jax.tree.map(placed, AXES)
    where = params_where, state_and_shardings(tx)[1]

    def init():
        params = jax.tree.map(lambda x: jnp.ones(x.shape), SHAPES)
        return params, tx.init(params)

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(init, out_shardings=where)()
    step = jax.jit(step, in_shardings=(*where, None), out_shardings=where, donate_argnums=(0, 1))
    for i in range(steps):
        params, state = step(params, state, batch_of(SHAPES, i))
    assert step._cache_size() == 1
    return params, state


@every_optimizer
@pytest.mark.one_in(3, start=2)
def test_the_flow_keeps_codes_where_parameters_are(name):
    tx = build(name)
    params, state = flow(tx)
    assert_codes_lie_as_parameters(state, params)
    assert_same_numbers((params, state), without_framework(tx, SHAPES))


def test_every_state_type_has_a_rule():
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
def test_every_state_is_cut_where_it_divides(name):
    state, where = state_and_shardings(WRAPPED[name])
    cut = {path: x for path, x in by_path(where).items() if x.spec != P()}
    for path, x in by_path(state).items():
        by_path(where)[path].shard_shape(x.shape)  # raises unless it divides
    kernels = {path for path in by_path(state) if "kernel" in path and ("mu" in path or "trace" in path)}
    assert {path for path in kernels if "absmax" not in path} <= cut.keys()
    scales = [cut[path].spec for path in kernels & cut.keys() if "absmax" in path]
    assert all(spec == P("data", "model") or spec == P("model", "data") for spec in scales)
    assert not any(path.endswith(("count", "format")) for path in cut)


def test_scales_are_cut_as_far_as_they_divide():
    state, where = state_and_shardings(build("adamw8bit", OF_256))
    assert state[0].mu_absmax["mlp"]["wi"]["kernel"].shape == (64, 3)
    assert where[0].mu["mlp"]["wi"]["kernel"].spec == P("data", "model")
    assert where[0].mu_absmax["mlp"]["wi"]["kernel"].spec == P("data", None)
    assert where[0].mu_absmax["token_embedder"]["embedding"].spec == P()


def test_shards_is_that_of_the_format():
    axes = {"kernel": P("embed", "mlp")}
    state = fse.scale_by_lion8bit(state_format=fse.StateFormat(shards=2, min_size=0)).init(
        {"kernel": jnp.ones((8, 128))}
    )
    assert state.mu_absmax["kernel"].shape == (8, 2)
    for shards, expected in ((2, P("embed", "mlp")), (8, P("embed", None))):
        rules = fse.interop.t5x_partition_rules(shards)
        assert rules[fse.ScaleByLion8bitState](state, axes).mu_absmax["kernel"] == expected
    with pytest.raises(ValueError, match="`shards` must be positive, got 0"):
        fse.interop.t5x_partition_rules(0)
    with pytest.raises(TypeError, match="`shards` must be an integer, got '8'"):
        fse.interop.t5x_partition_rules("8")
