"""Averages the gradients of microbatches inside one step, in float32 or in randomly rounded bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..ops.counter_random import array_key, hashed_bits, linear_index, mix
from ..ops.dtypes import at_least_float32
from ..ops.embedding.rows import is_sparse_rows
from ..ops.rounding import stochastic_round
from ..ops.sharding import placed_like
from .derivatives import straight_through
from .trees import path_name


def microbatch_mean(dtype: Any = jnp.float32, *, step: Array | None = None) -> optax.microbatching.Accumulator:
    r"""Averages gradients over microbatches inside one step, for `optax.microbatching.microbatch`.

    $$\bar g = \frac{1}{k} \sum_{j=1}^{k} g_j$$

    The sum exists only inside the step, and the optimizer steps once. `optax.MultiSteps` keeps the sum in the optimizer
    state, and computes a step of the optimizer for each microbatch.

    The sum is float32, also of bfloat16 gradients, in which small gradients would be lost. `dtype=jnp.bfloat16` stores
    it in 2 bytes: each sum, and the mean, is rounded up or down at random, so that on average nothing is lost. Vectors
    and scalars, such as the loss, stay in float32. A derivative through the rounding is straight-through.

    Args:
        dtype: Of the sum and of the mean of arrays with two or more axes: float32 or bfloat16. The sum of float64
            gradients is float64 in any case.
        step: The number of the step, for bfloat16: an integer that differs from step to step, so that the rounding
            does too.

    Returns:
        An accumulator, for `microbatch(jax.value_and_grad(loss_fn), accumulator=...)`.

    Raises:
        TypeError: `dtype` is another one, or `step` is not an integer. While it runs: a value is not floating, such as
            the number of tokens, or is a row gradient.
        ValueError: `dtype` is bfloat16, and there is no `step`.

    >>> import jax, jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> loss_fn = lambda params, batch: jnp.mean((batch @ params["kernel"]) ** 2)
    >>> params, batch = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}, jnp.ones((32, 64), jnp.bfloat16)
    >>> of_microbatches = optax.microbatching.microbatch(
    ...     jax.value_and_grad(loss_fn), argnums=1, microbatch_size=8, accumulator=fse.microbatch_mean()
    ... )
    >>> loss, grads = of_microbatches(params, batch)
    >>> float(loss), str(grads["kernel"].dtype)
    (4096.0, 'float32')
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"`dtype` must be float32 or bfloat16, got {dtype}.")
    if dtype == jnp.bfloat16 and step is None:
        raise ValueError("bfloat16 sums are rounded at random, which needs `step`: pass the number of the step.")
    if step is not None and not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(f"`step` must be an integer, got {step!r:.80}.")
    offset = jnp.uint32(0) if step is None else mix(jnp.asarray(step).astype(jnp.uint32))

    def dtype_of(x):
        wide = at_least_float32(x.dtype)
        return dtype if wide == jnp.float32 and x.ndim > 1 else wide

    def rounded(path, wide, like, count):
        """Returns a sum in its dtype. It is not dithered, because dither of repeated sums is not independent."""
        if like.dtype != jnp.bfloat16:
            return wide
        key = array_key(f"microbatch_mean/{path_name(path)}", count) + offset
        bits = placed_like(hashed_bits(linear_index(wide.shape), key), wide)
        return straight_through(stochastic_round(wide, jnp.bfloat16, bits), wide.astype(jnp.bfloat16))

    def added(path, total, x, count):
        x = jnp.asarray(x)
        wide = at_least_float32(x.dtype)
        return rounded(path, total.astype(wide) + x.astype(wide), total, count)

    def divided(path, total, count):
        wide = total.astype(at_least_float32(total.dtype))
        return rounded(path, wide / jnp.maximum(count, 1).astype(wide.dtype), total, -count)

    def init(first):
        """Starts with zeros, or with the first values themselves (optax before 0.2.8)."""
        first = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), first)
        jax.tree_util.tree_map_with_path(_check, first, is_leaf=is_sparse_rows)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype_of(x)), first)
        carry = zeros, jnp.zeros([], jnp.int32)
        is_shape = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(first))
        return carry if is_shape else update(carry, first, 0)

    def update(carry, values, _):
        totals, count = carry
        totals = jax.tree_util.tree_map_with_path(lambda path, total, x: added(path, total, x, count), totals, values)
        return totals, count + 1

    def finalize(carry):
        totals, count = carry
        return jax.tree_util.tree_map_with_path(lambda path, total: divided(path, total, count), totals)

    def aggregate(stacked):
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
        jax.tree_util.tree_map_with_path(_check, first)
        means = jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)).mean(0), stacked)
        return jax.tree.map(lambda mean, x: mean.astype(dtype_of(x)), means, first)

    return optax.microbatching.Accumulator(init, update, finalize, aggregate)


def _check(path: tuple, x: Any) -> None:
    """Raises unless `x` is an array of floating numbers."""
    if is_sparse_rows(x):
        raise TypeError(
            f"The gradient of {path_name(path)!r} is a row gradient, which has other rows in each microbatch. Stack "
            "the gradients of all microbatches with jax.lax.scan and use fse.sum_microbatches."
        )
    if x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(
            f"microbatch_mean averages numbers of float16 to float64, and {path_name(path)!r} is {x.dtype}. Give "
            "`microbatch` a tuple of accumulators, with optax.microbatching.AccumulationType.SUM for this value."
        )
