r"""Gradient clipping against a percentile of the norms that came before.

    h[t mod n] <- ||g||^2;   c = sqrt(sorted(h)[percentile n / 100]);   u = g min(1, c / ||g||)

Source: the `percentile_clipping` of bitsandbytes' optimizers, up to version 0.49 (there per parameter and n = 100).
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from ..rows.global_norm import values_of, with_values

# As in bitsandbytes. A numpy integer, because `optax.inject_hyperparams` makes a traced array of every Python number,
# and no traced number can be a shape.
_HISTORY = np.int64(100)
_DOWN = 2.0**-80  # squares of float32 numbers that are this much smaller do not overflow, nor does their sum


class PercentileClippingState(NamedTuple):
    """State of `percentile_clipping`. A slot of the ring that holds no norm yet is infinite."""

    count: Array  # shape=(), dtype=int32
    squared_norms: Array  # float32, (history,); (history, number of parameters) with per_parameter


def percentile_clipping(
    percentile: float = 5,
    history: int | np.integer = _HISTORY,
    *,
    per_parameter: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales a gradient down whose norm exceeds a percentile of the last norms, its own among them.

    $$h_{t \bmod n} \leftarrow \lVert g \rVert^2, \quad c = \sqrt{\mathrm{sort}(h)_{\lfloor pn/100 \rfloor}}, \quad
    u = g \cdot \min(1, c / \lVert g \rVert)$$

    The first norm fills all n slots, so the first gradient is never clipped. Norms are recorded unclipped, in float32;
    updates keep the dtype of the gradients, and a gradient that is not clipped is kept to the last bit.

    A limit of 0, from gradients that began as zeros, does not clip; in bitsandbytes it stops all that follow.

    Where this differs from bitsandbytes:
        - There the norm is each parameter's own; here it is that of the whole tree, so that clipping does not turn the
          gradient. `per_parameter=True` gives theirs.
        - A gradient with NaN or infinite elements passes as it is, for the user or `optax.apply_if_finite` to see, and
          is not recorded; there the history is lost.
        - A finite gradient whose square overflows is clipped all the same, and recorded as the largest float32. (What
          is too large for float32 itself, in float64, counts as infinite.)

    Args:
        percentile: in percent, 0 to 100: 0 clips to the smallest of the norms, 100 does not clip.
        history: how many norms are kept, n.
        per_parameter: every parameter is clipped against norms of its own.

    Returns:
        An optax transform; place it before the optimizer. Under `optax.inject_hyperparams` `percentile` can be changed
        and scheduled. `history` cannot: other than by default, name it in `static_args` where `init` is traced.

    Raises:
        ValueError: a percentile outside of 0 to 100, a history below 1; in `update`, a state of other parameters.
        TypeError: arguments that are no numbers; in `init`, a traced history.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> optimizer = fse.chain(fse.percentile_clipping(5), fse.adamw8bit(1e-3))
    >>> tx, grads = fse.percentile_clipping(5), {"kernel": jnp.ones(4)}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> updates, state = tx.update({"kernel": 8 * grads["kernel"]}, state)  # eight times the usual norm
    >>> updates["kernel"].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    _check(percentile, history)

    def init(params):
        if isinstance(history, Tracer):
            raise TypeError(
                "`history` must be a concrete integer, as the state's shape depends on it, got a traced array. Under "
                'optax.inject_hyperparams pass static_args=("history",).'
            )
        n = (len(jax.tree.leaves(params)),) if per_parameter else ()
        return PercentileClippingState(
            jnp.zeros([], jnp.int32), jnp.full((operator.index(history), *n), jnp.inf, jnp.float32)
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, tree = jax.tree.flatten(values_of(updates))
        squares, small = _squared_norms(leaves, per_parameter), _squared_norms(leaves, per_parameter, factor=_DOWN)
        if state.squared_norms.shape[1:] != squares.shape:
            raise ValueError(
                f"The gradients have {len(leaves)} leaves, but the state has norms of shape "
                f"{state.squared_norms.shape}: was it made by `init` of the same parameters and `per_parameter`?"
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        ring = _with_recorded(state.squared_norms, count, squares, jnp.isfinite(small))
        norm = jnp.where(jnp.isfinite(squares), jnp.sqrt(squares), jnp.sqrt(small) * np.float32(1 / _DOWN))
        limit = jnp.sqrt(_percentile(ring, percentile))
        # A limit of 0, where gradients began as zeros, would stop all that follow (in bitsandbytes it does).
        scale = jnp.where(jnp.isfinite(small) & (norm > limit) & (limit > 0), limit / norm, 1.0)
        scales = scale if per_parameter else [scale] * len(leaves)

        def clip(g: Any, scale: Array) -> Array:
            g = jnp.asarray(g)
            clipped = (g.astype(jnp.promote_types(g.dtype, jnp.float32)) * scale).astype(g.dtype)
            return jnp.where(scale < 1, clipped, g)  # integers above 2^24 are not exact in float32

        clipped = tree.unflatten(map(clip, leaves, scales))
        return with_values(updates, clipped), PercentileClippingState(count, ring)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(percentile: Any, history: Any) -> None:
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


def _squared_norms(leaves: list, per_parameter: bool, factor: float = 1.0) -> Array:
    """Squared norms of the gradients times `factor`, float32: one, or one each."""
    sums = [jnp.sum(jnp.square(jnp.abs(g).astype(jnp.float32) * np.float32(factor))) for g in leaves]
    return jnp.asarray(sums, jnp.float32) if per_parameter else sum(sums, start=jnp.zeros([], jnp.float32))


def _with_recorded(ring: Array, count: Array, squares: Array, finite: Array) -> Array:
    """The ring with these norms in their slot, and in all that are empty; unchanged where they are not finite."""
    slot = jax.lax.broadcasted_iota(jnp.int32, ring.shape, 0) == count % ring.shape[0]
    squares = jnp.minimum(squares, np.finfo(np.float32).max)
    return jnp.where((slot | jnp.isinf(ring)) & finite[None], squares[None], ring)


def _percentile(ring: Array, percentile: Any) -> Array:
    """The entry below which lie `percentile` percent of the ring; infinite at 100."""
    nearly = 1 + 2.0**-20  # so that what float32 makes of a whole number, 28.999998, is that number
    index = jnp.floor(percentile * jnp.float32(ring.shape[0] / 100 * nearly)).astype(jnp.int32)
    return jnp.sort(ring, axis=0).at[index].get(mode="fill", fill_value=jnp.inf)
