"""Runs one optimizer step in which every embedding table is represented by a few of its rows.

    g, p, m <- rows i of the gradient, the table and its moments
    p, m    <- step(g, p, m)
    table[i], moments[i] <- p, m

The optimizer sees small arrays in the places of large ones. So any optimizer that treats rows one by one can run here,
with its own formula. All other parameters take part with their full arrays.

On CPU the rows of a table are processed in chunks that fit into the cache. The first chunk of every table runs in one
step together with all other parameters; the remaining chunks run in a loop. In the loop the other parameters are zeros,
so that the compiler removes their computation.

A parameter is referred to by its place: its index in the flat list of parameters.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...ops.embedding.rows import SparseRows, placed_like_rows, set_rows, take_rows
from ...ops.sharding import explicit_sharding
from ..boxes import as_jax
from ..fused_update import fused_update
from ..split_parameter import SplitParameter
from ..storage.moments import is_codes, memory_of
from ..storage.rules import table_shapes
from ..trees import Params, is_none, path_name

CHUNK_BYTES = 2**18  # size of a chunk of float32 rows on CPU: it stays in the cache (measured: best of 2^15 to 2^22)


class StepInputs(NamedTuple):
    """Gradients, parameters and state of one step, as flat lists.

    Always: `grads` and `params` have one element per path, `owners` one per array of the state.
    """

    tree: Any  # structure of the gradients
    paths: list[str]
    grads: list[Any]
    params: list[Any] | None  # None if the caller gave no parameters
    state: list[Any]
    state_tree: Any  # structure of the state
    owners: list[int | None]  # for each array of the state, the place of its parameter; None for counts and the like

    @classmethod
    def of(cls, tree: Any, paths: list[str], grads: list[Any], params: Params, state: Any) -> "StepInputs":
        """Builds the flat lists, and finds for each array of the state the parameter it belongs to."""
        pairs, state_tree = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_none)
        p_leaves = None if params is None else [as_jax(x) for x in jax.tree.leaves(params, is_leaf=is_none)]
        keys = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree.unflatten(range(len(paths))))[0]]
        owners = [_owner(path, keys, paths) for path, _ in pairs]
        grads, state_leaves = list(map(as_jax, grads)), [as_jax(x) for _, x in pairs]
        return cls(tree, paths, grads, p_leaves, state_leaves, state_tree, owners)

    def rows_of_state(self, place: int) -> list[int]:
        """Returns the indices of the state's arrays that have one row for each row of a table.

        Raises:
            TypeError: The moments of the table are stored in 8 bits, or are not made of rows.
            ValueError: They have another number of rows than the table.
            NotImplementedError: The moments of the table are in host memory.
        """
        num_rows, features = self.grads[place].shape
        found = []
        for i, (owner, x) in enumerate(zip(self.owners, self.state)):
            if owner != place or x is None:
                continue
            if is_codes(x.dtype):
                raise TypeError(
                    f"The moments of {self.paths[place]!r} are stored in 8 bits, but `row_sparse` updates fp32 "
                    "moments. Give the table 32 in `rules`, as the default rules do for parameters named 'embedding'."
                )
            if memory_of(x) != "device":
                raise NotImplementedError(
                    f"The moments of {self.paths[place]!r} are in host memory, where rows cannot be looked up. Give "
                    "the table memory_kind='device' in `rules`."
                )
            if x.shape[:1] == (num_rows,):
                found.append(i)
            elif x.ndim == 2 and x.shape[0] > 1 and x.shape[1] in (1, features):
                raise ValueError(
                    f"The state of {self.paths[place]!r} has {x.shape[0]} rows, but the table has {num_rows}. Call "
                    "`update` with the parameters that the state was made for. If the table has grown or shrunk, "
                    "adapt the state: fse.adapt_state."
                )
            elif x.size > 1:
                raise TypeError(
                    f"The state of {self.paths[place]!r} has an array of shape {x.shape}, which does not have a row "
                    f"for each of the {num_rows} rows of the table. `tx` of `row_sparse` must be an optimizer that "
                    "treats rows one by one."
                )
        return found


def _owner(path: tuple, keys: Sequence[tuple], names: Sequence[str]) -> int | None:
    """Returns the place of the parameter that an array of the state belongs to, or None.

    The array's path ends with the path of its parameter. Keys are compared first, because a field `nu` of the state and
    a parameter called "nu" are different keys with the same name. If no keys match, because the state is another kind
    of tree, names are compared.
    """
    fits = [i for i, key in enumerate(keys) if path[len(path) - len(key) :] == key]
    if not fits:
        name = path_name(path)
        fits = [i for i, p in enumerate(names) if not p or name == p or name.endswith("/" + p)]
    return max(fits, key=lambda i: len(keys[i]), default=None)


class TableRows(NamedTuple):
    """Holds the rows that represent one table in a step."""

    grads: Array
    params: Array | None
    state: dict[int, Array]  # by the index of the array in the flat state
    drift: Array | None = None  # change of the parameters by `catch_up`, before the step

    def with_drift(self, out: Any, *, fused: bool) -> Any:
        """Returns new parameters (`fused`) as they are, and updates with the drift added.

        An update is added to the stored parameters, which do not contain the drift yet.
        """
        return out if fused or self.drift is None else out + self.drift


class StepOutputs(NamedTuple):
    """Holds the results of a step, as flat lists."""

    out: list[Any]  # updates; new parameters if the step was fused
    state: list[Any]


class RowStep:
    """Runs the step of an optimizer with rows in the places of tables.

    Args:
        tx: The optimizer.
        extra_args: Further keyword arguments of its `update`.
        fused: Whether to call `fse.fused_update`, which returns new parameters, and not `tx.update`.
    """

    def __init__(self, tx: optax.GradientTransformation, extra_args: dict[str, Any], *, fused: bool):
        self.apply: Callable = partial(fused_update, tx) if fused else optax.with_extra_args_support(tx).update
        self.fused, self.extra_args = fused, extra_args

    def __call__(self, inputs: StepInputs, rows: dict[int, TableRows], *, others: bool = True) -> StepOutputs:
        """Runs one step.

        Args:
            inputs: The full arrays.
            rows: By place, the rows that stand for each table.
            others: If False, the other parameters and their states are replaced by zeros, and their results mean
                nothing.
        """
        keep: Any = (lambda x: x) if others else (lambda x: x if x is None else jnp.zeros_like(x))
        grads, params, state = map(list, (inputs.grads, inputs.params or (), inputs.state))
        for i in range(len(grads)):
            grads[i] = rows[i].grads if i in rows else keep(grads[i])
        for i in range(len(params)):
            params[i] = rows[i].params if i in rows else keep(params[i])
        for i, (x, owner) in enumerate(zip(state, inputs.owners)):
            if owner in rows:
                state[i] = rows[owner].state.get(i, x)
            elif owner is not None and jnp.ndim(x):
                state[i] = keep(x)
        given = inputs.tree.unflatten(grads), inputs.state_tree.unflatten(state)
        p = None if inputs.params is None else inputs.tree.unflatten(params)
        token_ids = {inputs.paths[i]: np.arange(r.grads.shape[0]) for i, r in rows.items()}
        with table_shapes({inputs.paths[i]: inputs.grads[i].shape for i in rows}):
            out, new_state = self.apply(*given, p, token_ids=token_ids, **self.extra_args)
        same = jax.tree.structure(new_state, is_leaf=is_none) == inputs.state_tree
        assert same, "The `update` of the optimizer changed the structure of its state."
        return StepOutputs(inputs.tree.flatten_up_to(out), jax.tree.leaves(new_state, is_leaf=is_none))


def step_on_rows(
    step: RowStep,
    inputs: StepInputs,
    tables: dict[int, SparseRows],
    catch_up: Callable[[int, Array, TableRows], TableRows] | None = None,
) -> StepOutputs:
    """Runs one step on the touched rows of all tables and on all other parameters.

    Args:
        step: The optimizer's step.
        inputs: Gradients, parameters and state.
        tables: The row gradient of each table, by place.
        catch_up: Function `(place, indices, rows) -> rows` that changes parameters and moments of these rows before the
            step.

    Returns:
        Full arrays of the state, written in place where they are donated. For each table, a `SparseRows` update, or the
        full table if the step is fused.
    """
    kept = {place: inputs.rows_of_state(place) for place in tables}

    def gather(place: int, table: Any, arrays: dict[int, Array], start: Any, size: int) -> tuple[Array, TableRows]:
        x = tables[place]
        indices, values = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (x.indices, x.values))
        p = None if table is None else _rows(table, indices)
        stored = table.p if isinstance(table, SplitParameter) else table
        like = next((a for a in (stored, *arrays.values()) if a is not None and a.ndim == 2), None)
        values = values if like is None else placed_like_rows(like, indices, values)
        rows = TableRows(values, p, {i: take_rows(a, indices) for i, a in arrays.items()})
        return indices, rows if catch_up is None else catch_up(place, indices, rows)

    first_sizes = {place: _first_chunk_size(x) for place, x in tables.items()}
    before = {place: {i: inputs.state[i] for i in kept[place]} for place in tables}
    params: Params = inputs.params or dict.fromkeys(tables)
    first = {place: gather(place, params[place], before[place], 0, first_sizes[place]) for place in tables}
    zero_rows = {place: jax.tree.map(jnp.zeros_like, rows) for place, (_, rows) in first.items()}
    out, state = map(list, step(inputs, {place: rows for place, (_, rows) in first.items()}))
    for place, x in tables.items():
        table, size, (indices, rows) = params[place], _chunk_size(x), first[place]
        arrays = {i: set_rows(a, indices, state[i]) for i, a in before[place].items()}
        written = rows.with_drift(out[place], fused=step.fused)
        if step.fused:
            target = _with_rows(table, indices, written)
        else:
            target = jnp.zeros(x.values.shape, written.dtype, out_sharding=explicit_sharding(written))
            target = jax.lax.dynamic_update_slice_in_dim(target, written, 0, 0)

        def one_chunk(k: Any, carry: Any, place=place, table=table, size=size) -> Any:
            arrays, parts = carry
            target = _whole(table, parts)
            start = first_sizes[place] + k * size
            indices, rows = gather(place, target if step.fused else table, arrays, start, size)
            out, state = step(inputs, {**zero_rows, place: rows}, others=False)
            written = rows.with_drift(out[place], fused=step.fused)
            arrays = {i: set_rows(a, indices, state[i]) for i, a in arrays.items()}
            if step.fused:
                return arrays, _parts(_with_rows(target, indices, written))
            return arrays, jax.lax.dynamic_update_slice_in_dim(target, written, start, 0)

        if n_chunks := (x.indices.size - first_sizes[place]) // size:
            arrays, parts = jax.lax.fori_loop(0, n_chunks, one_chunk, (arrays, _parts(target)))
            target = _whole(table, parts)
        for i, a in arrays.items():
            state[i] = a
        out[place] = target if step.fused else x.with_values(target)
    return StepOutputs(out, state)


def _rows(table: Any, indices: Array) -> Array:
    """Returns rows of a table; in float32 if it is split."""
    return table.rows(indices) if isinstance(table, SplitParameter) else take_rows(table, indices)


def _with_rows(table: Any, indices: Array, rows: Array) -> Any:
    """Returns a table with other values in some rows."""
    return table.with_rows(indices, rows) if isinstance(table, SplitParameter) else set_rows(table, indices, rows)


def _parts(x: Any) -> Any:
    """Returns the arrays of a target, for a loop to carry."""
    return (x.p, x.remainder) if isinstance(x, SplitParameter) else x


def _whole(table: Any, parts: Any) -> Any:
    """Returns the target again, of the arrays of `_parts`."""
    return table.with_value(parts) if isinstance(parts, tuple) else parts


def _chunk_size(x: SparseRows) -> int:
    """Returns the number of rows in a chunk: all rows, except on CPU, where a chunk is small."""
    if jax.default_backend() != "cpu":
        return max(1, x.indices.size)
    return max(1, CHUNK_BYTES // max(1, 4 * x.shape[1]))


def _first_chunk_size(x: SparseRows) -> int:
    """Returns the size of the first chunk, chosen so that all further chunks are of full size."""
    n, size = x.indices.size, _chunk_size(x)
    return n % size or min(n, size)
