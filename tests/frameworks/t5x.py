"""T5X's derivation of logical axes and shardings for an optimizer state, for tests.

The code is that of https://github.com/google-research/t5x/blob/main/t5x/optimizers.py (OptaxStatePartitionRules,
OptaxWrapper.derive_logical_axes), written again here.
"""

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse

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
    """Applies T5X's table to the states in a state, gives None elsewhere, and raises for an unknown type of state."""

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
    """The abstract state and T5X's shardings of it, via a state dict, as in `Optimizer.restore_state`."""
    state = jax.eval_shape(tx.init, SHAPES)
    axes = derive(state, AXES)
    axes = flax.serialization.from_state_dict(axes, flax.serialization.to_state_dict(axes))
    where = jax.tree.map(lambda x, axes: x if x is None else placed(axes), state, axes, is_leaf=lambda x: x is None)
    return state, where
