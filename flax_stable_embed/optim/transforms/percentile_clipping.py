r"""Clips gradients by a percentile of their past norms.

    h[t mod n] <- |g|^2;   c = sqrt(sorted(h)[percentile n / 100]);   u = g min(1, c / |g|)

h is a ring buffer of the last n squared norms. A norm of zero is an empty slot.
Source: `percentile_clipping` of bitsandbytes' optimizers, up to version 0.49 (there per parameter and with n = 100).
"""

import operator
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from ...ops.embedding.rows import is_sparse_rows
from ...ops.sharding import replicated
from ..arguments import check_fields, kind_of
from ..fused_update import ScalingTransformation
from ..placement import device_of
from ..rows.global_norm import Norm, multiplied, norm_of, values_of, with_values
from ..storage.rules import Rule, Rules, UserRules, show_pattern
from ..storage.state_format import StateFormat
from ..trees import path_name

# As in bitsandbytes. It is a NumPy integer because `optax.inject_hyperparams` turns every Python number into an array,
# which is traced under jit and then cannot be part of a shape.
_HISTORY = np.int64(100)


class PercentileClippingState(NamedTuple):
    """State of `percentile_clipping`.

    Always: `squared_norms` is a ring buffer along its first axis, and slots without a norm yet are zero.
    """

    count: Array  # shape=(), dtype=int32: number of steps
    # float32, (history,). With per_parameter=True (history, number of parameters), where slices of stacked ones count.
    squared_norms: Array


def percentile_clipping(
    percentile: float = 5,
    history: int | np.integer = _HISTORY,
    *,
    per_parameter: bool = False,
    rules: UserRules = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Clips a gradient whose norm exceeds a percentile of the last n norms, its own included.

    $$h_{t \bmod n} \leftarrow \lVert g \rVert^2, \quad c = \sqrt{\mathrm{sort}(h)_{\lfloor pn/100 \rfloor}}, \quad
    u = g \cdot \min(1, c / \lVert g \rVert)$$

    The first norm fills all n slots, so the first gradient is never clipped. Norms are recorded before clipping, in
    float32. Updates keep the dtype of the gradients. A gradient that is not clipped is returned bit for bit.

    Where this differs from bitsandbytes:
        - There every parameter has a norm of its own. Here the norm is that of all gradients, because clipping then
          keeps the direction of the gradient. `per_parameter=True` does as bitsandbytes.
        - A gradient with NaN or infinite elements is returned as it is and is not recorded. The user or
          `optax.apply_if_finite` can handle it. In bitsandbytes it destroys the history.
        - A finite gradient whose squared norm overflows is clipped and recorded as the largest float32.
        - A limit of 0, which comes from initial gradients of zero, does not clip. In bitsandbytes it sets all following
          gradients to zero.

    Args:
        percentile: Percentile of the recorded norms to clip to, from 0 to 100. 0 clips to the smallest norm, 100 does
            not clip.
        history: Number n of norms that are kept.
        per_parameter: Whether every parameter is clipped by its own norms.
        rules: The rules of the optimizer, if some of them say that parameters stack layers: `fse.Rule(stacked=1)`. With
            `per_parameter`, each slice is then clipped by its own norms. Other settings of a rule change nothing here.

    Returns:
        An optax transform; place it before the optimizer. With `optax.inject_hyperparams`, `percentile` can be changed
        and scheduled. `history` cannot. If you set `history` and `init` runs under `jit`, name it in `static_args`.

    Raises:
        ValueError: `percentile` is not between 0 and 100, `history` is less than 1, or there are `rules` without
            `per_parameter`. In `init`: a rule with `stacked` matches no parameter. In `update`: the state was made for
            other parameters.
        TypeError: An argument is not a number. In `init`: `history` is traced.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> optimizer = fse.chain(fse.percentile_clipping(5), fse.adamw8bit(1e-3))
    >>> tx, grads = fse.percentile_clipping(5), {"kernel": jnp.ones(4)}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> updates, state = tx.update({"kernel": 8 * grads["kernel"]}, state)  # eight times the usual norm
    >>> updates["kernel"].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    _check(percentile, history)
    checked_rules = Rules(rules, StateFormat())
    if checked_rules.user and not per_parameter:
        raise ValueError(
            "`rules` tell which slices of parameters have norms of their own, but without `per_parameter=True` there "
            "is one norm of all gradients. Set it, or drop `rules`."
        )

    def init(params):
        if isinstance(history, Tracer):
            raise TypeError(
                "`history` must be a concrete integer, because the state's shape depends on it, but it is traced. With "
                'optax.inject_hyperparams, pass static_args=("history",).'
            )
        n = ()
        if per_parameter:
            axes = _stacked_axes(checked_rules, params)
            _check_matches(checked_rules, params, axes)
            n = (sum(prod(_stack(x, own)) for x, own in zip(jax.tree.leaves(params), axes)),)
        norms = jnp.zeros((operator.index(history), *n), jnp.float32, device=device_of(params))
        return PercentileClippingState(jnp.zeros([], jnp.int32), norms)

    def factors(leaves, axes, state, scale=None):
        """Returns the factor of all gradients, or given the stacked axes those of all slices, and the next state."""
        if not isinstance(state, PercentileClippingState):
            raise TypeError(f"`state` must be a PercentileClippingState, as `init` makes it, got {kind_of(state)}.")
        check_fields(state, "count", "squared_norms")
        norm, squared, finite = _norms(leaves, axes)
        if scale is not None:
            norm, squared = norm * jnp.abs(scale), squared * jnp.square(scale)
        if state.squared_norms.shape[1:] != squared.shape:
            raise ValueError(
                f"The gradients have {len(leaves)} leaves, but the state has norms of shape "
                f"{state.squared_norms.shape}. Make the state by `init` with the same parameters and `per_parameter`."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        ring = _with_recorded(state.squared_norms, count, squared, finite)
        limit = jnp.sqrt(_percentile(ring, percentile))
        clips = finite & (norm > limit) & (limit > 0)
        factor = jnp.where(clips, jnp.where(clips, limit, 1) / jnp.where(clips, norm, 1), 1)
        return factor, PercentileClippingState(count, ring)

    def update_slices(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, tree = jax.tree.flatten(values_of(updates))
        axes = _stacked_axes(checked_rules, updates)
        factor, state = factors(leaves, axes, state)
        clipped = [multiplied(g, own, own < 1) for g, own in zip(leaves, _of_leaves(factor, leaves, axes))]
        return with_values(updates, tree.unflatten(clipped)), state

    def factor_of_all(updates, state, scale=None):
        return factors(jax.tree.leaves(values_of(updates)), None, state, scale)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        factor, state = factor_of_all(updates, state)
        return multiplied(updates, factor, factor < 1), state  # integers above 2^24 are not exact in float32

    if per_parameter:
        return optax.GradientTransformationExtraArgs(init, update_slices)
    return ScalingTransformation(init, update, factor_of_all)


def _check(percentile: Any, history: Any) -> None:
    """Raises if `percentile` or `history` is not a number in its range; traced numbers pass."""
    numbers = int | float | np.number | np.ndarray | Array
    if not isinstance(percentile, numbers) or isinstance(percentile, bool) or np.ndim(percentile):
        raise TypeError(
            f"`percentile` must be a number, got {percentile!r}. For a schedule use "
            "optax.inject_hyperparams(percentile_clipping)."
        )
    if not isinstance(percentile, Tracer) and not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` must be in [0, 100], in percent, got {percentile}; try 5.")
    if isinstance(history, Tracer):
        return
    if isinstance(history, bool) or not hasattr(history, "__index__"):
        raise TypeError(f"`history` must be an integer, got {history!r}; try 100.")
    if operator.index(history) < 1:
        raise ValueError(f"`history` must be at least 1, got {history}; try 100.")


def _stacked_axes(rules: Rules, tree: Any) -> list[tuple[int, ...]]:
    """Returns the axes of each leaf that stack independent parameters."""
    found = []
    for key_path, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_sparse_rows)[0]:
        path, shape = path_name(key_path), np.shape(x)
        rule = next((rules.user[i][1] for i in rules.matches(path, shape)), Rule())
        if rule.stacked and is_sparse_rows(x):
            raise ValueError(
                f"`rules` has stacked={rule.stacked} for {path!r}, whose gradient is a fse.SparseRows. A table of rows "
                "stacks no parameters. Match only those that a scan over layers has stacked."
            )
        found.append(rule.stacked_axes(path, shape))
    return found


def _check_matches(rules: Rules, params: Any, axes: list[tuple[int, ...]]) -> None:
    """Raises if rules with `stacked` match no parameter."""
    wanted = [show_pattern(pattern) for pattern, rule in rules.user if rule.stacked]
    if wanted and axes and not any(axes):
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            f"`rules` has `stacked` for {', '.join(wanted)}, which match none of the parameters: "
            f"{', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}. Correct the pattern, or drop the rule."
        )


def _stack(x: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the lengths of the axes that stack parameters. Their product is the number of norms."""
    return tuple(np.shape(x)[axis] for axis in axes)


def _norms(leaves: list, axes: list[tuple[int, ...]] | None) -> Norm:
    """Returns the norm of all gradients, or, given the axes that stack parameters, of each slice; in float32."""
    if axes is None:
        return _in_float32(norm_of(leaves))
    if not leaves:
        return Norm(jnp.zeros(0), jnp.zeros(0), jnp.zeros(0, bool))
    norms = [_in_float32(_norms_of_slices(jnp.asarray(g), own)) for g, own in zip(leaves, axes)]
    return jax.tree.map(lambda *x: jnp.concatenate([replicated(n).reshape(-1) for n in x]), *norms)


def _norms_of_slices(g: Array, axes: tuple[int, ...]) -> Norm:
    """Returns the norm of every slice; the results have the shape of the stack."""

    def norms(g: Array) -> Norm:
        return norm_of([g])

    for _ in axes:
        norms = jax.vmap(norms)
    return norms(jnp.moveaxis(g, axes, range(len(axes))))


def _in_float32(n: Norm) -> Norm:
    return Norm(n.norm.astype(jnp.float32), n.squared.astype(jnp.float32), n.finite)


def _of_leaves(scale: Array, leaves: list, axes: list[tuple[int, ...]]) -> list[Array]:
    """Splits a vector of one number per slice into an array for each leaf that broadcasts with it."""
    found, start = [], 0
    for x, own in zip(leaves, axes):
        stack = _stack(x, own)
        numbers = scale[start : start + prod(stack)].reshape(stack)
        others = [axis for axis in range(np.ndim(x)) if axis not in own] if own else ()
        found.append(jnp.expand_dims(numbers, others))
        start += prod(stack)
    return found


def _with_recorded(ring: Array, count: Array, squares: Array, finite: Array) -> Array:
    """Writes squared norms into their slot of the ring buffer and into all empty slots, if they are finite."""
    slot = jax.lax.broadcasted_iota(jnp.int32, ring.shape, 0) == count % ring.shape[0]
    squares = jnp.minimum(squares, np.finfo(np.float32).max)
    return jnp.where((slot | (ring == 0)) & finite[None], squares[None], ring)


def _percentile(ring: Array, percentile: Any) -> Array:
    """Returns the entry that is larger than `percentile` percent of the ring buffer; infinity for 100."""
    nearly = 1 + 2.0**-20  # so that an integer that float32 computes as 28.999998 is not rounded down to 28
    index = jnp.floor(percentile * jnp.float32(ring.shape[0] / 100 * nearly)).astype(jnp.int32)
    return jnp.sort(ring, axis=0).at[index].get(mode="fill", fill_value=jnp.inf)
