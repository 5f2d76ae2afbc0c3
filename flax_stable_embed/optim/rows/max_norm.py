r"""Stores looked-up rows scaled down to `max_norm`, as torch does, by a wrapper around an optimizer.

    p_i <- renorm(p_i) for the looked-up rows i;   p <- p + tx(g, p)

torch scales looked-up rows in the table itself, before the lookup, and the optimizer continues from there. The modules
of this library return scaled rows but do not change the table. This wrapper writes the scaled rows to the table in the
optimizer step. Its update is therefore the update of `tx` plus the change made by scaling.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ...ops.dtypes import at_least_float32
from ...ops.embedding.lookup import renorm
from ...ops.embedding.options import check_max_norm
from ...ops.embedding.rows import SparseRows, distinct, is_sparse_rows, set_rows, take_rows
from ..arguments import check_transform
from ..fused_update import FusedTransformation, fused_update, is_fused, takes_split_parameters
from ..trees import Mask, Params, Updates, is_none, path_name
from .tables import are_tables, row_numbers_by_path


def with_max_norm(
    tx: optax.GradientTransformation, max_norm: float, norm_type: float = 2.0, mask: Mask = None
) -> FusedTransformation:
    r"""Wraps `tx` so that looked-up rows are scaled down to `max_norm` in the table, as in torch.

    $$\theta_i \leftarrow \theta_i \frac{\mathrm{max\_norm}}{\lVert \theta_i \rVert_p + 10^{-7}} \ \text{ for looked-up
    rows } i \text{ with } \lVert \theta_i \rVert_p > \mathrm{max\_norm}, \qquad \theta, m \leftarrow
    \mathrm{tx}(g, m, \theta)$$

    Use it with `Embed(..., max_norm=max_norm, norm_type=norm_type)`. That module scales the rows that it returns, but
    does not store them. With this wrapper they are stored: weight decay and the update are applied to the scaled rows.
    The trajectory is that of torch's `max_norm`.

    Wrap the outermost chain of the optimizer, so that each of its transforms sees the scaled rows. A tied table
    must be scaled before logits are computed from it: `embed.attend(query, token_ids=ids)`.

    The looked-up rows are those of row gradients (`fse.row_value_and_grad`), or those of `token_ids`, an argument of
    `update`. This wrapper alone does not make a step cheaper. For a cost that grows with the rows and not with the
    table, put it inside: `fse.row_sparse(fse.with_max_norm(tx, max_norm))`.

    Args:
        tx: The optimizer.
        max_norm: The maximum p-norm of a row. Looked-up rows with a larger norm are scaled down to it. It may be
            traced, for example by `optax.inject_hyperparams`.
        norm_type: The p of the p-norm: 0 (number of nonzero elements), any positive number, or infinity.
        mask: Pytree of booleans with the structure of the parameters (or a prefix of it), or a function that takes the
            parameters and returns one. It is True for the embedding tables. By default, tables are two-dimensional
            parameters with the name of an embedding, as in the default rules of `adamw8bit`.

    Returns:
        An optax transform with the state of `tx` and `update(grads, state, params, token_ids=None)`. `token_ids` holds
        all ids that were looked up, padding included: an array if there is one table, else a dict from paths of tables
        to arrays or lists of arrays. After a lookup with `mode="clip"`, pass clipped ids. `fse.fused_update` takes the
        transform if it takes `tx`.

    Raises:
        TypeError: `tx` is not an optax transform, `max_norm` is not a number, or `norm_type` is an array.
        ValueError: `max_norm` is not positive, or `norm_type` is negative. In `update`: `params` is None, there is no
            table, or the looked-up rows of a table are not known.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"embedding": jnp.array([[3.0, 4.0], [6.0, 8.0]])}
    >>> tx = fse.with_max_norm(optax.sgd(1.0), max_norm=4.0, norm_type=jnp.inf)
    >>> grads = {"embedding": jnp.zeros((2, 2))}
    >>> updates, state = tx.update(grads, tx.init(params), params, token_ids=jnp.array([0]))
    >>> optax.apply_updates(params, updates)["embedding"]
    Array([[3., 4.],
           [6., 8.]], dtype=float32)

    Source: torch.nn.Embedding, `max_norm`.
    """
    check_transform(tx)
    if max_norm is None:
        raise TypeError("`max_norm` must be a number, got None.")
    if isinstance(norm_type, Array):
        raise TypeError(
            f"`norm_type` must be a Python number, got {norm_type}. With optax.inject_hyperparams, pass "
            'static_args=("norm_type",).'
        )
    # An array may be traced, and then has no value to check.
    check_max_norm(None if isinstance(max_norm, Array) else max_norm, norm_type)
    inner = optax.with_extra_args_support(tx)

    def scale_rows(grads: Updates, params: Params, token_ids: Any) -> tuple[Any, dict[int, SparseRows], Any]:
        """Returns the parameters with scaled rows, the change of each table by its place, and the tree structure."""
        if params is None:
            raise ValueError("`params` is None, but with_max_norm scales them. Call `update(grads, state, params)`.")
        pairs, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)
        paths, leaves = [path_name(path) for path, _ in pairs], [p for _, p in pairs]
        found = _looked_up_rows(
            are_tables(mask, params, paths, leaves), paths, leaves, tree.flatten_up_to(grads), token_ids
        )
        added = {}
        for i, row_numbers in found.items():
            leaves[i] = jnp.asarray(leaves[i])
            indices = distinct(row_numbers, leaves[i].shape[0])
            rows = take_rows(leaves[i], indices)
            scaled = renorm(rows, max_norm, norm_type)
            leaves[i] = set_rows(leaves[i], indices, scaled)
            wide = at_least_float32(rows.dtype)  # parameter and change nearly cancel if the norm was large
            added[i] = SparseRows(indices, scaled.astype(wide) - rows.astype(wide), leaves[i].shape[0])
        return tree.unflatten(leaves), added, tree

    def update(updates, state, params=None, *, token_ids=None, **extra_args):
        scaled_params, added, tree = scale_rows(updates, params, token_ids)
        updates, state = inner.update(updates, state, scaled_params, token_ids=token_ids, **extra_args)
        leaves = tree.flatten_up_to(updates)
        for i, rows in added.items():
            u = leaves[i]
            leaves[i] = rows if u is None else (u if is_sparse_rows(u) else u.astype(rows.dtype)) + rows
        return tree.unflatten(leaves), state

    def fused(grads, state, params, *, token_ids=None, **extra_args):
        scaled_params, *_ = scale_rows(grads, params, token_ids)
        return fused_update(tx, grads, state, scaled_params, token_ids=token_ids, **extra_args)

    return FusedTransformation(tx.init, update, fused if is_fused(tx) else None, takes_split=takes_split_parameters(tx))


def _looked_up_rows(
    is_table: list[bool], paths: list[str], params: list[Any], grads: list[Any], token_ids: Any
) -> dict[int, Array]:
    """Returns the row numbers that were looked up in each table, by the place of the table."""
    tables = {path: p.shape[0] for path, p, table in zip(paths, params, is_table) if table}
    if not tables:
        raise ValueError(
            f"`with_max_norm` found no table among the parameters: {', '.join(paths[:8])}. Give it a `mask`, a pytree "
            "of booleans like the parameters, that is True for the tables."
        )
    given = {} if token_ids is None else row_numbers_by_path(token_ids, tables, tables)
    found = {}
    for i, path in enumerate(paths):
        if path not in tables:
            continue
        if path in given:
            found[i] = given[path]
        elif is_sparse_rows(grads[i]):
            found[i] = jnp.minimum(grads[i].indices, tables[path])
        else:
            raise ValueError(
                f"`with_max_norm` does not know which rows of {path!r} were looked up. Pass them, tx.update(grads, "
                f"state, params, token_ids={{{path!r}: ids}}), or give it a `mask` that is False for this parameter."
            )
    return found
