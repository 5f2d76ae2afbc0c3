r"""torch's `max_norm`, as a wrapper around an optimizer.

    p_i <- renorm(p_i) for the looked-up rows i;   u <- tx(g, p);   the update also carries p from where it was

torch renormalises looked-up rows in the table, before the lookup, and the optimizer starts from there. The modules here
renormalise what they return; this writes it to the table in the same step.
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
from ..fused_update import FusedTransformation, fused_update, is_fused
from ..trees import is_none, path_name
from .tables import are_tables, row_numbers_by_path


def with_max_norm(
    tx: optax.GradientTransformation, max_norm: float, norm_type: float = 2.0, mask: Any = None
) -> FusedTransformation:
    r"""`tx` on tables whose looked-up rows are first scaled down to `max_norm`: the trajectory of torch's `max_norm`.

    $$\theta_i \leftarrow \theta_i \frac{\mathrm{max\_norm}}{\lVert \theta_i \rVert_p + 10^{-7}} \ \text{ for looked-up
    rows } i \text{ with } \lVert \theta_i \rVert_p > \mathrm{max\_norm}, \qquad \theta, m \leftarrow
    \mathrm{tx}(g, m, \theta)$$

    For `Embed(..., max_norm=max_norm, norm_type=norm_type)`, whose lookup takes the gradient at the scaled rows but
    does not store them. With this wrapper they are stored: weight decay starts from them, and they are the parameters
    to which the update is added. Wrap the whole optimizer, so that every member of it sees them. A tied table must be
    scaled before logits are taken from it: `embed.attend(query, token_ids=ids)`.

    The rows are those of `token_ids`, an argument of `update`, or those of row gradients (`fse.row_value_and_grad`).
    For the cost of rows alone put it inside: `fse.row_sparse(fse.with_max_norm(tx, max_norm))`.

    Args:
        tx: the whole optimizer.
        max_norm: rows with a larger norm are scaled to it.
        norm_type: the p of that p-norm: 0, any positive number or infinity.
        mask: a pytree of booleans like the parameters, or a function of them that gives one: the tables. By default
            two-dimensional parameters with the name of an embedding, as in the default rules of `adamw8bit`.

    Returns:
        An optax transform with the state of `tx`; `update(grads, state, params, token_ids=None)`. `token_ids`: the ids
        that were looked up, padding included: an array, where there is one table, or
        `{"path/of/embedding": array or list of arrays}` (after a lookup with `mode="clip"`, clip them). It also serves
        `fse.fused_update` if `tx` does.

    Raises:
        TypeError: `tx` is not an optax transform; a `max_norm` that is no number.
        ValueError: a norm that cannot be; in `update`, no `params`, or a table without ids.

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
            f"`norm_type` must be a Python number, got {norm_type}. Under optax.inject_hyperparams pass "
            'static_args=("norm_type",).'
        )
    check_max_norm(None if isinstance(max_norm, Array) else max_norm, norm_type)  # it may be traced
    inner = optax.with_extra_args_support(tx)

    def scale_rows(grads: Any, params: Any, token_ids: Any) -> tuple[Any, dict[int, SparseRows], Any]:
        """The parameters with scaled rows, what that has added to which of them, and the gradients' leaves and tree."""
        if params is None:
            raise ValueError("max_norm needs `params`: call `update(grads, state, params)`; got None.")
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
            wide = at_least_float32(rows.dtype)  # of the sum of large numbers a small one is left
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

    return FusedTransformation(tx.init, update, fused if is_fused(tx) else None)


def _looked_up_rows(
    is_table: list[bool], paths: list[str], params: list[Any], grads: list[Any], token_ids: Any
) -> dict[int, Array]:
    """The row numbers that were looked up in each table, by its place."""
    tables = {path: p.shape[0] for path, p, table in zip(paths, params, is_table) if table}
    if not tables:
        raise ValueError(
            f"max_norm finds no table among the parameters {', '.join(paths[:8])}: name it with "
            "`mask`, a pytree of booleans like the parameters."
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
                f"max_norm does not know which rows of {path!r} were looked up: "
                f"tx.update(grads, state, params, token_ids={{{path!r}: ids}}); or leave it out of `mask`."
            )
    return found
