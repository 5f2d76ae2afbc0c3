r"""Computes norms of gradients that are partly row gradients, and clips by them.

    |g| = sqrt(sum over dense gradients |g_j|^2 + sum over row gradients |values_j|^2)

The rows that a row gradient does not hold are zero. So its norm is that of its values.
"""

from typing import Any

import jax
import optax

from ...ops.embedding.rows import SparseRows, is_sparse_rows
from ..arguments import check_numbers
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

    The result is that of `optax.global_norm` on the dense arrays, which are not built.

    Args:
        updates: Pytree of arrays and `fse.SparseRows`.

    Returns:
        The norm, a scalar array.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> rows = fse.SparseRows.of_lookups(jnp.array([7, 7]), jnp.array([[1.0, 0.0], [0.0, 2.0]]), num_rows=1000)
    >>> global_norm({"embedding": rows, "kernel": jnp.array([2.0])})
    Array(3., dtype=float32)
    """
    return optax.tree.norm(values_of(updates))


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformation:
    r"""Clips gradients by their global norm, dense ones and `fse.SparseRows` together.

    $$g \leftarrow g \cdot \min(1, \mathrm{max\_norm} / \lVert g \rVert)$$

    The result is that of `optax.clip_by_global_norm` on the dense gradients. Place it before `fse.row_sparse`, not
    inside: there the optimizer sees only some of the rows.

    Args:
        max_norm: The maximum global norm. Gradients with a larger norm are scaled down to it.

    Returns:
        An optax transform without state, for a chain.

    Raises:
        TypeError: `max_norm` is not a number.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.clip_by_global_norm(1.0), fse.row_sparse(optax.adam(1e-3)))
    """
    check_numbers(max_norm=max_norm)
    inner = optax.clip_by_global_norm(max_norm)

    def update(updates, state, params=None):
        values, state = inner.update(values_of(updates), state, params)
        return with_values(updates, values), state

    return optax.GradientTransformation(inner.init, update)
