"""T5X: logical axes of every optimizer state of this library.

T5X asks a table, keyed by the type of a state, which logical axes its arrays have, and refuses a state that is not in
it: https://github.com/google-research/t5x/blob/main/t5x/optimizers.py, `OptaxStatePartitionRules`.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ..optim.methods.adagrad import ScaleByAdagrad8bitState
from ..optim.methods.adam import ScaleByAdam8bitState
from ..optim.methods.ademamix import ScaleByAdemamix8bitState
from ..optim.methods.lion import ScaleByLion8bitState
from ..optim.methods.rmsprop import ScaleByRmsprop8bitState
from ..optim.methods.sgd import ScaleBySgd8bitState
from ..optim.rows.catch_up import RowSparseState
from ..optim.transforms.percentile_clipping import PercentileClippingState
from ..optim.transforms.quantize_state import QuantizedState
from ..optim.transforms.stochastic_rounding import StochasticRoundState
from ..optim.trees import is_hole

_STATES = (
    PercentileClippingState,
    QuantizedState,
    RowSparseState,
    ScaleByAdagrad8bitState,
    ScaleByAdam8bitState,
    ScaleByAdemamix8bitState,
    ScaleByLion8bitState,
    ScaleByRmsprop8bitState,
    ScaleBySgd8bitState,
    StochasticRoundState,
)


def t5x_partition_rules(shards: int = 8) -> dict[type, Callable[[Any, Any], Any]]:
    r"""Entries for T5X's `OptaxStatePartitionRules._RULES`, one for each state type of this library.

    $$\mathrm{axes}(x)_i = \mathrm{axes}(p)_i \text{ if } \mathrm{dim}(x)_i = \mathrm{dim}(p)_i \text{ or }
    \mathrm{shards} \mid \mathrm{dim}(x)_i, \text{ else None}$$

    Each is a function `(state, param_logical_axes) -> state` that puts logical axes, or None, in the place of arrays.
    Codes and fp32 moments have the axes of their parameter p. So have the scales, but for the blocked axis where the
    number of blocks need not divide. Counts, formats, placeholders and what has another rank than p are whole on every
    device. The transforms within `quantize_state`, `row_sparse` and `stochastic_round_updates` may be any.

    Args:
        shards: the most ways that an axis is cut; that of `StateFormat`.

    Returns:
        A dict to merge into T5X's.

    Raises:
        TypeError, ValueError: `shards` is not a positive integer.

    >>> import jax, jax.numpy as jnp, flax_stable_embed as fse
    >>> from jax.sharding import PartitionSpec
    >>> rules = fse.interop.t5x_partition_rules()  # OptaxStatePartitionRules._RULES.update(rules)
    >>> state = jax.eval_shape(fse.scale_by_lion8bit().init, {"kernel": jnp.ones((64, 1024))})
    >>> axes = rules[fse.ScaleByLion8bitState](state, {"kernel": PartitionSpec("embed", "mlp")})
    >>> state.mu_absmax["kernel"].shape, tuple(axes.mu_absmax["kernel"]), axes.count
    ((64, 8), ('embed', 'mlp'), None)
    """
    if not isinstance(shards, int) or isinstance(shards, bool):
        raise TypeError(f"`shards` must be an integer, got {shards!r}. It is that of `StateFormat`, 8 by default.")
    if shards < 1:
        raise ValueError(f"`shards` must be positive, got {shards}. It is that of `StateFormat`, 8 by default.")

    def rule(state: Any, param_logical_axes: Any) -> Any:
        return _axes_of_state(state, param_logical_axes, shards)

    return dict.fromkeys(_STATES, rule)


def _axes_of_state(state: Any, params_axes: Any, shards: int) -> Any:
    """Axes wherever the tree of the parameters lies in the state, and None elsewhere."""
    params_axes, tree = jax.tree.flatten(params_axes, is_leaf=_is_axes)
    parts, outer = jax.tree.flatten(state, is_leaf=lambda x: jax.tree.structure(x, is_leaf=is_hole) == tree)
    copies = [tree.flatten_up_to(x) if jax.tree.structure(x, is_leaf=is_hole) == tree else None for x in parts]
    # Moments have the shape of their parameter, and nothing beside them is larger.
    shapes = [max(column, key=prod) for column in zip(*([_shape(x) for x in copy] for copy in copies if copy))]
    return outer.unflatten(
        None if copy is None else tree.unflatten(map(_axes, copy, params_axes, shapes, [shards] * len(copy)))
        for copy in copies
    )


def _axes(x: Any, axes: Any, shape: tuple, shards: int) -> Any:
    """The axes of one array beside a parameter of this shape; a MaskedNode stays, as T5X asks."""
    if is_hole(x) or axes is None or not x.ndim == len(axes) == len(shape):
        return x if is_hole(x) else None
    kept = [a if n == of_parameter or n % shards == 0 else None for a, n, of_parameter in zip(axes, x.shape, shape)]
    return PartitionSpec(*kept) if any(kept) else None


def _shape(x: Any) -> tuple:
    return () if is_hole(x) else x.shape


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)
