"""Computes gradients with respect to the rows that a loss looks up, without the dense gradient of the table.

    rows_k = table[i_k] + tap_k,   tap = 0;      dL/dtap_k is the gradient of row i_k

The gradient of a lookup with respect to the table has the shape of the table. The tap has only one row per looked-up
id, and so has its gradient. The ids are found by a first run of the loss, which records its lookups. Under `jit` the
compiler removes everything that only this run needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import core as jax_core

from ...ops.embedding.looked_up import LookedUpTable, Lookup, is_looked_up_table, recording
from ...ops.embedding.rows import distinct, is_sparse_rows
from ..boxes import as_jax, is_box, rebox, unbox
from ..trees import Updates, path_name
from .tables import is_table, row_numbers_by_path


def row_value_and_grad(
    loss_fn: Callable,
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    token_ids: Callable | None = None,
) -> Callable:
    r"""Computes a loss and its gradients, with row gradients for tables that have `sparse=True`.

    $$g_k = \sum_{j:\ \mathrm{ids}_j = i_k} \partial L / \partial y_j, \quad i = \text{distinct ids of the batch}$$

    It is used in place of `jax.value_and_grad` or `nnx.value_and_grad`. The gradient of a sparse table is a
    `fse.SparseRows` with at most as many rows as ids were looked up, a number that is static under `jit`. The dense
    gradient of shape (num_embeddings, features) is never computed. All other parameters get their usual gradients. Pass
    the result to `fse.row_sparse(tx)`.

    Several lookups of one table, in one module or in several, are summed. The row of `padding_idx` gets zeros.

    By default `loss_fn` runs twice, because the first run finds the ids. Side effects then happen twice, except for
    changes to NNX objects among the arguments. Outside `jit` the work is done twice, too. Lookups inside `jit`,
    `checkpoint`, `vmap` or `scan` cannot be recorded. Pass `token_ids` for them, or to run the loss only once. An id
    that `token_ids` leaves out gives a row of NaN. (A Linen table whose lookups are all inside a function that was
    compiled before is not found, and gets a dense gradient.)

    Limits:

    - It does not differentiate any other use of a sparse table than a lookup. `attend` needs a gradient for every row,
      so it raises a TypeError. Look up candidates and compare with those (sampled softmax), or use
      `jax.value_and_grad`.
    - It does not support `scale_grad_by_freq`, as in torch.
    - It does not accumulate over microbatches. Use `jax.lax.scan` over them, and `fse.sum_microbatches` on the stacked
      gradients.

    Args:
        loss_fn: Function `loss_fn(params, *args, **kwargs) -> loss`, where `params` is the pytree of parameters that a
            Linen model is applied to, or `loss_fn(model, *args, **kwargs) -> loss`, where `model` is an NNX module. It
            may change other state of the module.
        has_aux: Whether `loss_fn` returns a pair `(loss, aux)`. `aux` can be anything and is returned as it is.
        wrt: Filter of the NNX variables to differentiate with respect to, as `nnx.Optimizer` takes one. Not used with
            Linen.
        token_ids: Function that takes the arguments of `loss_fn` and returns the ids that it will look up: an array if
            there is one table, else a dict from paths of tables to arrays or lists of arrays. For modules with
            `mode="clip"`, return clipped ids.

    Returns:
        A function with the arguments of `loss_fn` that returns `(loss, gradients)`, or `((loss, aux), gradients)`. The
        gradients are a tree like the parameters. For an NNX module they are an `nnx.State`, as `nnx.Optimizer.update`
        takes it.

    Raises:
        ValueError: No table with `sparse=True` is looked up, or a lookup cannot be recorded; `token_ids` does not fit
            the tables; a keyword argument holds a part of the NNX model.
        TypeError: A sparse table is used in another way than by a lookup (`attend`), or is not floating.

    >>> import jax, jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> embed = fse.linen.Embed(50_000, 8, sparse=True)
    >>> ids = jnp.array([[3, 1, 3]])
    >>> params = embed.init(jax.random.key(0), ids)["params"]
    >>> loss_fn = lambda params, ids: embed.apply({"params": params}, ids).sum()
    >>> tx = fse.row_sparse(optax.adam(1e-3))
    >>> state = tx.init(params)
    >>> loss, grads = fse.row_value_and_grad(loss_fn)(params, ids)
    >>> grads["embedding"].indices[:2], grads["embedding"].values[:2, 0]
    (Array([1, 3], dtype=int32), Array([1., 2.], dtype=float32))
    >>> updates, state = tx.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)
    """
    if token_ids is not None and not callable(token_ids):
        raise TypeError(
            f"`token_ids` must be a function of the arguments of `loss_fn`, got {token_ids!r:.80}. Try "
            "token_ids=lambda params, ids: ids."
        )

    def value_and_grad(params, *args, **kwargs):
        given = None if token_ids is None else token_ids(params, *args, **kwargs)
        if isinstance(params, nnx.Module):
            return _module_value_and_grad(loss_fn, params, args, kwargs, has_aux, wrt, given)
        return _params_value_and_grad(loss_fn, params, args, kwargs, has_aux, given)

    return value_and_grad


class _Parameter(NamedTuple):
    """A parameter of the model, in its wrapper if it has one."""

    path: str
    box: Any
    sparse: bool  # NNX: its module has `sparse=True`. Linen: it has the name of an embedding


def _params_value_and_grad(loss_fn, params, args, kwargs, has_aux, given):
    """Returns the value and the gradients for a pytree of parameters; `given` are the ids, None to record them."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    leaves = [_Parameter(path_name(path), as_jax(box), is_table(path_name(path), box)) for path, box in pairs]
    if given is None:
        renewed = [leaf._replace(box=rebox(leaf.box, _as_new_object(unbox(leaf.box)))) for leaf in leaves]
        with recording() as lookups:
            loss_fn(tree.unflatten([leaf.box for leaf in renewed]), *args, **kwargs)
        given = _recorded_ids(lookups, renewed, others=())
    tables = _looked_up_tables(given, leaves)

    def loss_of_taps(differentiated, dummy):
        boxes = [
            rebox(leaf.box, tables[leaf.path].differentiated(x, dummy)) if leaf.path in tables else x
            for leaf, x in zip(leaves, differentiated)
        ]
        return _tables_to_arrays(loss_fn(tree.unflatten(boxes), *args, **kwargs))

    differentiated = [tables[leaf.path].tap if leaf.path in tables else leaf.box for leaf in leaves]
    value, (grads, _) = jax.value_and_grad(loss_of_taps, argnums=(0, 1), has_aux=has_aux)(differentiated, 0.0)
    return value, tree.unflatten(
        [rebox(x.box, tables[x.path].gradient(g)) if x.path in tables else g for x, g in zip(leaves, grads)]
    )


def _module_value_and_grad(loss_fn, model, args, kwargs, has_aux, wrt, given):
    """Returns the value and the gradients for an NNX module; `given` are the ids, None to record them."""
    _check_keywords(model, kwargs)
    sparse_variables = {
        id(m.embedding) for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Embed) and getattr(m, "sparse", False)
    }
    variables = dict(nnx.to_flat_state(nnx.state(model, wrt)))
    leaves = [_Parameter("/".join(map(str, path)), x, id(x) in sparse_variables) for path, x in variables.items()]
    if given is None:
        copy, copied_args, copied_kwargs = jax.tree.map(  # the recording run may change the state of NNX objects
            lambda x: nnx.clone(x) if _is_nnx_object(x) else x, (model, args, kwargs), is_leaf=_is_nnx_object
        )
        values = {}
        for path, x in nnx.to_flat_state(nnx.state(copy)):
            x.set_raw_value(_as_new_object(x.get_raw_value()))
            values[path] = x.get_raw_value()
        with recording() as lookups:
            loss_fn(copy, *copied_args, **copied_kwargs)
        originals = [leaf._replace(box=values[path]) for leaf, path in zip(leaves, variables)]
        given = _recorded_ids(lookups, originals, others=values.values())
    tables = _looked_up_tables(given, leaves)
    for leaf in leaves:  # no lookup was seen, so the table gets no rows; ids that are looked up nevertheless give NaN
        if leaf.sparse and leaf.path not in tables:
            tables[leaf.path] = LookedUpTable.at(leaf.box.get_raw_value(), jnp.zeros(0, jnp.int32))
    paths = {leaf.path: path for leaf, path in zip(leaves, variables)}
    of_tables = {paths[name] for name in tables}
    rest = nnx.All(wrt, lambda path, _: path not in of_tables)

    def loss_of_taps(model, taps, dummy, *args):
        inside = dict(nnx.to_flat_state(nnx.state(model, wrt)))
        for name, tap in taps.items():
            inside[paths[name]].set_raw_value(tables[name].differentiated(tap, dummy))
        out = loss_fn(model, *args, **kwargs)
        for name in taps:
            inside[paths[name]].set_raw_value(tables[name].constant)
        return _tables_to_arrays(out)

    taps = {name: table.tap for name, table in tables.items()}
    differentiate = nnx.value_and_grad(loss_of_taps, argnums=(nnx.DiffState(0, rest), 1, 2), has_aux=has_aux)
    value, (grads, tap_grads, _) = differentiate(model, taps, 0.0, *args)
    flat = dict(nnx.to_flat_state(grads))
    for name, table in tables.items():
        flat[paths[name]] = variables[paths[name]].replace(table.gradient(tap_grads[name]))
    return value, nnx.from_flat_state({path: flat[path] for path in variables})


def _check_keywords(model: nnx.Module, kwargs: dict[str, Any]) -> None:
    """Raises a ValueError if a keyword argument holds variables of the model, which would be constants there."""
    own = _variable_ids(model)
    for name, value in kwargs.items():
        for part in filter(_is_nnx_object, jax.tree.leaves(value, is_leaf=_is_nnx_object)):
            if own & _variable_ids(part):
                raise ValueError(
                    f"The keyword argument `{name}` shares variables with the model. Only the first argument is "
                    "differentiated, so take the module from there, inside the loss."
                )


def _variable_ids(part: Any) -> set[int]:
    """Returns the Python ids of the variables in a part of a model."""
    return {id(x) for _, x in nnx.to_flat_state(nnx.state(part))}


def _is_nnx_object(x: Any) -> bool:
    return isinstance(x, nnx.Pytree)


def _as_new_object(x: Any) -> Any:
    """Returns the same array as a new object, to tell a parameter from others that hold the same array."""
    if isinstance(x, jax_core.Tracer):
        return jax.lax.optimization_barrier(x)
    if not isinstance(x, jax.Array) or len(x.shape) != 2:
        return x
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [s.data for s in x.addressable_shards])


def _tables_to_arrays(out: Any) -> Any:
    """Replaces looked-up tables by their arrays in the output of a loss, which may return tables in `aux`."""
    return jax.tree.map(lambda x: x.constant if is_looked_up_table(x) else x, out, is_leaf=is_looked_up_table)


def _recorded_ids(lookups: list[Lookup], leaves: list[_Parameter], others: Any) -> dict[str, list[jax.Array]]:
    """Returns the recorded ids of each table, by path. A table is recognized by object identity.

    A recorded table that is not a parameter is taken for a constant if it is one of `others`, or if no parameter has
    its shape.

    Raises:
        ValueError: A recorded table may be a parameter but cannot be recognized, or nothing was recorded.
    """
    found = {}
    for lookup in lookups:
        paths = [leaf.path for leaf in leaves if unbox(leaf.box) is lookup.table]
        if paths:
            found.setdefault(paths[0], []).append(lookup.row_numbers)
        elif any(lookup.table is x for x in others):
            continue
        elif any(getattr(unbox(leaf.box), "shape", None) == lookup.table.shape for leaf in leaves):
            raise ValueError(
                f"`loss_fn` looks up a table of shape {lookup.table.shape} with `sparse=True`, but no parameter is "
                "this array. Either it was cast, reshaped or sliced before the lookup, or it is not a parameter. Look "
                "up the parameter itself, or name it: row_value_and_grad(loss_fn, token_ids=lambda ...: {'path': ids})."
            )
    if not found:
        raise ValueError(
            "`loss_fn` looks up no table with `sparse=True`, or its lookups are inside a function that was compiled "
            "before. Build the module with sparse=True, pass the ids by `token_ids`, or use jax.value_and_grad."
        )
    return found


def _looked_up_tables(given: Any, leaves: list[_Parameter]) -> dict[str, LookedUpTable]:
    """Returns the tables with taps for the given ids, by path."""
    arrays = {leaf.path: unbox(leaf.box) for leaf in leaves}
    num_rows = {path: x.shape[0] for path, x in arrays.items() if len(getattr(x, "shape", ())) == 2}
    sparse = {leaf.path: num_rows[leaf.path] for leaf in leaves if leaf.sparse and leaf.path in num_rows}
    tables = {}
    for path, row_numbers in row_numbers_by_path(given, sparse, num_rows).items():
        if not jnp.issubdtype(arrays[path].dtype, jnp.inexact):
            raise TypeError(
                f"The table {path!r} has dtype {arrays[path].dtype}, but only floating parameters have gradients. Use "
                "a floating `param_dtype`."
            )
        tables[path] = LookedUpTable.at(jnp.asarray(arrays[path]), distinct(row_numbers, num_rows[path]))
    return tables


def sum_microbatches(grads: Updates) -> Any:
    """Sums gradients of microbatches that `jax.lax.scan` or `jax.vmap` has stacked along a new first axis.

    It does not divide by the number of microbatches. For the mean, divide the loss of each microbatch by k.

    Args:
        grads: Pytree of stacked arrays, shape (k, ...), and stacked `fse.SparseRows`, whose values have shape
            (k, n, features).

    Returns:
        The tree without the first axis. Row gradients of k microbatches with n ids each become one row gradient with at
        most k n rows.

    >>> import jax, jax.numpy as jnp, flax_stable_embed as fse
    >>> embed = fse.linen.Embed(50_000, 4, sparse=True)
    >>> batches = jnp.array([[1, 2], [2, 3]])
    >>> params = embed.init(jax.random.key(0), batches)["params"]
    >>> of_one = fse.row_value_and_grad(lambda params, ids: embed.apply({"params": params}, ids).sum())
    >>> _, (losses, stacked) = jax.lax.scan(lambda _, ids: (None, of_one(params, ids)), None, batches)
    >>> fse.sum_microbatches(stacked)["embedding"].values[:3, 0]
    Array([1., 2., 1.], dtype=float32)
    """

    def summed(x):
        return x.summed_over_first_axis() if is_sparse_rows(x) else jnp.sum(x, axis=0)

    return jax.tree.map(summed, grads, is_leaf=is_sparse_rows)
