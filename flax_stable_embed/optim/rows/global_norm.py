"""The norm of all gradients, where some of them are of a few rows only."""

from typing import Any

import jax
import optax

from ...ops.embedding.rows import SparseRows, is_sparse_rows
from ..arguments import check_numbers


def values_of(tree: Any) -> Any:
    """A tree of gradients with the values of row gradients in their place.

    Sums over all elements are those of the dense gradients, whose other rows are zero.
    """
    return jax.tree.map(lambda x: x.values if is_sparse_rows(x) else x, tree, is_leaf=is_sparse_rows)


def with_values(tree: Any, values: Any) -> Any:
    """`tree` with other values: those that `values_of` took from it, changed."""

    def put_back(old: Any, new: Any) -> Any:
        return old.with_values(new) if isinstance(old, SparseRows) else new

    return jax.tree.map(put_back, tree, values, is_leaf=is_sparse_rows)


def global_norm(updates: Any) -> jax.Array:
    r"""`optax.global_norm` of gradients or updates, dense ones and `fse.SparseRows`.

    $$\sqrt{\sum_i |x_i|^2}$$

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> rows = fse.SparseRows.of_lookups(jnp.array([7, 7]), jnp.array([[1.0, 0.0], [0.0, 2.0]]), num_rows=1000)
    >>> global_norm({"embedding": rows, "kernel": jnp.array([2.0])})
    Array(3., dtype=float32)
    """
    return optax.tree.norm(values_of(updates))


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformation:
    r"""`optax.clip_by_global_norm` for dense gradients and `fse.SparseRows` together.

    $$g \leftarrow g \cdot \min(1, \mathrm{max\_norm} / \lVert g \rVert)$$

    Args:
        max_norm: the largest norm that is left alone.

    Raises:
        TypeError: `max_norm` is no number.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.clip_by_global_norm(1.0), fse.row_sparse(optax.adam(1e-3)))
    """
    check_numbers(max_norm=max_norm)
    inner = optax.clip_by_global_norm(max_norm)

    def update(updates, state, params=None):
        values, state = inner.update(values_of(updates), state, params)
        return with_values(updates, values), state

    return optax.GradientTransformation(inner.init, update)
