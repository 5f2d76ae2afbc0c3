r"""Computes norms of gradients that are partly row gradients, and clips by them.

    |g| = sqrt(sum over dense gradients |g_j|^2 + sum over row gradients |values_j|^2)

The rows that a row gradient does not hold are zero. So its norm is that of its values.

Squares are summed in at least float32, twice: as they are, and scaled down for numbers whose squares overflow. So every
finite gradient whose norm is a float32 has a finite norm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...ops.dtypes import at_least_float32
from ...ops.embedding.rows import SparseRows, is_sparse_rows
from ..arguments import check_numbers
from ..fused_update import ScalingTransformation
from ..trees import Updates


def values_of(tree: Any) -> Any:
    """Replaces each row gradient of a tree by its values, which have the same norm."""
    return jax.tree.map(lambda x: x.values if is_sparse_rows(x) else x, tree, is_leaf=is_sparse_rows)


def with_values(tree: Any, values: Any) -> Any:
    """Puts changed `values_of(tree)` back into the row gradients of `tree`."""

    def put_back(old: Any, new: Any) -> Any:
        return old.with_values(new) if isinstance(old, SparseRows) else new

    return jax.tree.map(put_back, tree, values, is_leaf=is_sparse_rows)


def global_norm(updates: Updates) -> jax.Array:
    r"""Computes the global norm of gradients or updates, dense ones and `fse.SparseRows` together.

    $$\lVert x \rVert = \sqrt{\sum_i |x_i|^2}$$

    The result is that of `optax.global_norm` on the dense arrays, which are not built. Two cases differ: gradients in
    half precision are summed in float32, and squares that overflow do not make the norm infinite.

    Args:
        updates: Pytree of arrays and `fse.SparseRows`.

    Returns:
        The norm, a scalar array in at least float32.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> rows = fse.SparseRows.of_lookups(jnp.array([7, 7]), jnp.array([[1.0, 0.0], [0.0, 2.0]]), num_rows=1000)
    >>> global_norm({"embedding": rows, "kernel": jnp.array([2.0])})
    Array(3., dtype=float32)
    """
    return norm_of(jax.tree.leaves(values_of(updates))).norm


class Norm(NamedTuple):
    """The norm of several arrays together, its square, which may overflow, and whether all elements are finite."""

    norm: Array
    squared: Array
    finite: Array


def norm_of(arrays: Sequence[Any]) -> Norm:
    """Computes the norm of all arrays together, in at least float32."""
    arrays = [jnp.asarray(x) for x in arrays]
    real = [jnp.finfo(at_least_float32(x.dtype)).dtype for x in arrays]
    dtype = max(real, default=np.dtype(np.float32), key=lambda d: d.itemsize)
    down = 2.0 ** -(jnp.finfo(dtype).maxexp * 5 // 8)  # the squares of numbers times this factor do not overflow
    squares, small = (_sum_of_squares(arrays, dtype, factor) for factor in (1.0, down))
    overflows = ~(squares < jnp.inf)  # also for NaN
    plain, scaled = jnp.where(overflows, 1, squares), jnp.where(overflows, small, 1)  # derivatives take both branches
    norm = jnp.where(overflows, jnp.sqrt(scaled) * dtype.type(1 / down), jnp.sqrt(plain))
    return Norm(norm, squares, jnp.isfinite(small))


def _sum_of_squares(arrays: Sequence[Array], dtype: Any, factor: float) -> Array:
    total = jnp.zeros([], dtype)
    for x in arrays:
        parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
        for part in parts:
            total = total + jnp.sum(jnp.square(part.astype(dtype) * dtype.type(factor)))
    return total


def multiplied(tree: Updates, factor: Array, where: Any) -> Updates:
    """Multiplies gradients by a number where a condition holds, in at least float32. Row gradients keep their rows."""

    def multiply(x: Any) -> Array:
        x = jnp.asarray(x)
        wide = x.astype(at_least_float32(x.dtype))
        return jnp.where(where, (wide * factor.astype(wide.dtype)).astype(x.dtype), x)

    return with_values(tree, jax.tree.map(multiply, values_of(tree)))


def clip_by_global_norm(max_norm: Any) -> ScalingTransformation:
    r"""Clips gradients by their global norm, dense ones and `fse.SparseRows` together.

    $$g \leftarrow g \cdot \min(1, \mathrm{max\_norm} / \lVert g \rVert)$$

    The result is that of `optax.clip_by_global_norm` on the dense gradients, with the norm of `fse.global_norm`. Place
    it before `fse.row_sparse`, not inside: there the optimizer sees only some of the rows.

    Args:
        max_norm: The maximum global norm. Gradients with a larger norm are scaled down to it.

    Returns:
        An optax transform without state, for a chain. Right before the optimizer in `fse.chain`, it writes no gradients
        to memory.

    Raises:
        TypeError: `max_norm` is not a number.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.clip_by_global_norm(1.0), fse.row_sparse(optax.adam(1e-3)))
    """
    check_numbers(max_norm=max_norm)

    def factor(updates, state, scale=None):
        norm = global_norm(updates)
        norm = norm if scale is None else norm * jnp.abs(scale)
        limit = jnp.asarray(max_norm, norm.dtype)
        return jnp.where(norm < limit, 1, limit / jnp.where(norm == 0, 1, norm)), state

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        number, state = factor(updates, state)
        return multiplied(updates, number, number != 1), state

    return ScalingTransformation(optax.init_empty_state, update, factor)
