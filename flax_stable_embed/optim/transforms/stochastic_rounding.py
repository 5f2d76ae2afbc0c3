r"""Rounds half-precision parameters stochastically, so that updates smaller than their last bit are not lost.

    p <- round(p + u), up or down at random, with mean p + u

Rounding to nearest drops every update that is smaller than half an ulp of its parameter. At 1.0, bfloat16 ignores
updates below 0.002. Stochastic rounding keeps them on average, without a float32 copy of the parameters.
Source: Gupta et al. 2015 (arXiv:1502.02551); for bfloat16 weights Zamirai et al. 2020 (arXiv:2010.06192).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ...ops.counter_random import random_bits
from ...ops.embedding.rows import is_none_or_rows, is_sparse_rows
from ...ops.rounding import stochastic_round
from ..arguments import check_fields, check_transform, kind_of
from ..derivatives import straight_through
from ..fused_update import FusedTransformation
from ..trees import is_none, path_name


class StochasticRoundState(NamedTuple):
    """State of `stochastic_round_updates`."""

    count: Array  # shape=(), dtype=int32: number of steps
    inner_state: Any


def stochastic_round_updates(tx: optax.GradientTransformation) -> FusedTransformation:
    r"""Wraps an optimizer so that bfloat16 and float16 parameters are rounded stochastically once its update is added.

    $$\theta \leftarrow \mathrm{round}(\theta + u), \quad \mathbb{E}[\theta] = \theta + u$$

    `tx` sees these parameters and their gradients in float32, and its state is that of float32 parameters. All other
    parameters are left alone. For half-precision parameters the returned updates are float32, and `optax.apply_updates`
    turns them into exactly the rounded parameters. So this wrapper must be outermost: nothing may change the updates
    after it. (`optax.apply_if_finite` goes inside, because it needs updates in the dtype of the gradients.)

    Limits: the sum is computed in float32, so an update that a float32 parameter would ignore is ignored
    here, too. Below 2^-118, backends that flush subnormal numbers to zero may leave a parameter unchanged. Row
    gradients of a half-precision table are refused.

    The random bits are a hash of the parameter's path, the global row-major position of the element, and the step.
    There is no key in the state, and the bits are the same on every mesh. Under `vmap` all members draw the same bits.
    So do all shards in `shard_map`, which hides the global position.

    Derivatives are straight-through: those of the update before it is rounded.

    Args:
        tx: Any optax transform whose updates are added to the parameters.

    Returns:
        An optax transform. `fse.fused_update` takes it for any `tx`, and gives the same bits as `update`.

    Raises:
        TypeError: `tx` is not an optax transform. In `update`: there is a row gradient of a half-precision table.
        ValueError: In `update`: `params` is None.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    >>> tx = fse.stochastic_round_updates(fse.adamw8bit(1e-5))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> sorted(set(params["kernel"].ravel().tolist()))  # the mean is 1 - 1e-5
    [0.99609375, 1.0]
    """
    check_transform(tx)
    inner = optax.with_extra_args_support(tx)

    def init(params):
        return StochasticRoundState(jnp.zeros([], jnp.int32), inner.init(jax.tree.map(_to_float32, params)))

    def updates_of(updates, state, params, run):
        if params is None:
            raise ValueError(
                "`params` is None, but stochastic_round_updates rounds them. Call `update(grads, state, params)`."
            )
        if not isinstance(state, StochasticRoundState):
            raise TypeError(
                f"`state` must be a StochasticRoundState, as `init` makes it, got {kind_of(state)}. The order is "
                "update(grads, state, params)."
            )
        check_fields(state, "count")
        params32 = jax.tree.map(_to_float32, params)
        half_rows = jax.tree.map(
            lambda g, p: is_sparse_rows(g) and _is_half(p), updates, params, is_leaf=is_none_or_rows
        )
        if any(jax.tree.leaves(half_rows)):
            raise TypeError(
                "A gradient is a fse.SparseRows of a table in half precision, but stochastic_round_updates cannot "
                "round single rows. Keep the table in float32, or compute dense gradients with jax.value_and_grad."
            )
        grads = jax.tree.map(
            lambda g, p: _to_float32(g) if _is_half(p) else g, updates, params, is_leaf=is_none_or_rows
        )
        updates, inner_state = run(grads, state.inner_state, params32)
        count = jnp.asarray(optax.safe_increment(state.count))

        def rounded(path, u, p):
            return _rounding_update(u, p, f"stochastic_round_updates/{path_name(path)}", count) if _is_half(p) else u

        updates = jax.tree_util.tree_map_with_path(rounded, updates, params, is_leaf=is_none_or_rows)
        return updates, StochasticRoundState(count, inner_state)

    def update(updates, state, params=None, **extra_args):
        return updates_of(updates, state, params, partial(inner.update, **extra_args))

    def applied(params, updates):
        def apply(p, u):  # as optax.apply_updates; a leaf may be without an update
            if p is None or u is None:
                return p
            return jnp.asarray(_to_float32(p) + u).astype(jnp.asarray(p).dtype)

        return jax.tree.map(apply, params, updates, is_leaf=is_none)

    def fused(grads, state, params, **extra_args):
        updates, state = update(grads, state, params, **extra_args)
        return applied(params, updates), state

    def scaled_step(grads, state, params, scale, *, fused):
        step: Any = getattr(tx, "scaled_step", None)
        run = partial(step, scale=scale, fused=False)
        updates, state = updates_of(grads, state, params, run)
        return applied(params, updates) if fused else updates, state

    return FusedTransformation(init, update, fused, scaled_step if hasattr(tx, "scaled_step") else None)


def _rounding_update(u: Any, p: Any, path: str, count: Array) -> Any:
    """Returns the float32 update that turns `p` into `p + u`, rounded stochastically.

    Adding it is exact. If `p + u` is so small compared with `p` that `new - old` needs more bits than float32 has, then
    `p + u` is a multiple of an ulp of `u` and has few bits. Rounding then leaves it unchanged, and `new - old` is `u`.
    """
    if u is None:
        return None
    p, u = jnp.asarray(p), jnp.asarray(u).astype(jnp.float32)
    old, bits = p.astype(jnp.float32), random_bits(path, count, p)
    new = stochastic_round(old + u, p.dtype, bits).astype(jnp.float32)
    rounding = jnp.where(new == old, -0.0, new - old)  # keeps infinite parameters, and -0.0
    return straight_through(rounding, u)


def _is_half(x: Any) -> bool:
    return getattr(x, "dtype", None) in (jnp.bfloat16, jnp.float16)


def _to_float32(x: Any) -> Any:
    """Converts half-precision arrays (or their ShapeDtypeStructs) to float32; returns anything else unchanged."""
    if not _is_half(x):
        return x
    return x.update(dtype=jnp.float32) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x).astype(jnp.float32)
