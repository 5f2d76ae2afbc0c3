"""Tells T5X the logical axes of every optimizer state of this library.

T5X has a table from types of optimizer states to functions that return the logical axes of their arrays. It refuses a
state whose type is not in the table.
Source: `OptaxStatePartitionRules` in https://github.com/google-research/t5x/blob/main/t5x/optimizers.py
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
from ..optim.transforms.split_weights import SplitWeightsState
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
    SplitWeightsState,
    StochasticRoundState,
)


def t5x_partition_rules(shards: int = 8) -> dict[type, Callable[[Any, Any], Any]]:
    r"""Returns entries for T5X's `OptaxStatePartitionRules._RULES`, one for each state type of this library.

    $$\mathrm{axes}(x)_i = \mathrm{axes}(p)_i \text{ if } \mathrm{dim}(x)_i = \mathrm{dim}(p)_i \text{ or }
    \mathrm{shards} \mid \mathrm{dim}(x)_i, \text{ else None}$$

    Each entry is a function `(state, param_logical_axes) -> state`. It replaces every array x of the state by its
    logical axes, given those of the parameter p that x belongs to. Codes and fp32 moments get the axes of their
    parameter. Scales get them too, except for the blocked axis if the number of blocks is not a multiple of `shards`.
    Counts, formats, placeholders and arrays of another rank than p get None and are replicated. Any transform may be
    inside `quantize_state`, `row_sparse`, `split_weights` and `stochastic_round_updates`.

    Args:
        shards: The largest number of devices that one axis is sharded over. Use the `shards` of your `StateFormat`.

    Returns:
        A dictionary to merge into T5X's table.

    Raises:
        TypeError: If `shards` is not an integer.
        ValueError: If `shards` is not positive.

    >>> import jax, jax.numpy as jnp, flax_stable_embed as fse
    >>> from jax.sharding import PartitionSpec
    >>> rules = fse.interop.t5x_partition_rules()  # OptaxStatePartitionRules._RULES.update(rules)
    >>> state = jax.eval_shape(fse.scale_by_lion8bit().init, {"kernel": jnp.ones((64, 1024))})
    >>> axes = rules[fse.ScaleByLion8bitState](state, {"kernel": PartitionSpec("embed", "mlp")})
    >>> state.mu_absmax["kernel"].shape, tuple(axes.mu_absmax["kernel"]), axes.count
    ((64, 8), ('embed', 'mlp'), None)
    """
    if not isinstance(shards, int) or isinstance(shards, bool):
        raise TypeError(
            f"`shards` must be an integer, got {shards!r}. Use the `shards` of `StateFormat`, by default 8."
        )
    if shards < 1:
        raise ValueError(f"`shards` must be positive, got {shards}. Use the `shards` of `StateFormat`, by default 8.")

    def rule(state: Any, param_logical_axes: Any) -> Any:
        return _axes_of_state(state, param_logical_axes, shards)

    return dict.fromkeys(_STATES, rule)


def _axes_of_state(state: Any, params_axes: Any, shards: int) -> Any:
    """Returns the state with axes wherever a field has the tree of the parameters, and None elsewhere."""
    params_axes, tree = jax.tree.flatten(params_axes, is_leaf=_is_axes)
    parts, outer = jax.tree.flatten(state, is_leaf=lambda x: jax.tree.structure(x, is_leaf=is_hole) == tree)
    copies = [tree.flatten_up_to(x) if jax.tree.structure(x, is_leaf=is_hole) == tree else None for x in parts]
    # Moments have the shape of their parameter, and no other array that belongs to it is larger.
    shapes = [max(column, key=prod) for column in zip(*([_shape(x) for x in copy] for copy in copies if copy))]
    return outer.unflatten(
        None if copy is None else tree.unflatten(map(_axes, copy, params_axes, shapes, [shards] * len(copy)))
        for copy in copies
    )


def _axes(x: Any, axes: Any, shape: tuple, shards: int) -> Any:
    """Returns the axes of one array that belongs to a parameter of this shape. T5X wants a MaskedNode to stay."""
    if is_hole(x) or axes is None or not x.ndim == len(axes) == len(shape):
        return x if is_hole(x) else None
    kept = [a if n == of_parameter or n % shards == 0 else None for a, n, of_parameter in zip(axes, x.shape, shape)]
    return PartitionSpec(*kept) if any(kept) else None


def _shape(x: Any) -> tuple:
    return () if is_hole(x) else x.shape


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)
