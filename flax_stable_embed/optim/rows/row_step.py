"""One step of an optimizer in which some parameters are represented by a few of their rows.

Whatever belongs to such a table, its gradient, its parameter and every array of the state with its path, is cut down to
the same rows; the optimizer sees small arrays in the places of large ones.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...ops.embedding.rows import SparseRows, beside_rows, set_rows, take_rows
from ...ops.sharding import explicit_sharding
from ..boxes import as_jax
from ..fused_update import fused_update
from ..storage.moments import is_codes, memory_of
from ..storage.rules import shapes_of_tables
from ..trees import is_none, path_name

CHUNK_BYTES = 2**18  # of rows in one piece, on CPU: they stay in the cache (measured: best of 2^15 to 2^22)


class StepInputs(NamedTuple):
    """What one step is given, as flat lists; `None` for parameters that were not given."""

    tree: Any  # of the gradients
    paths: list[str]
    grads: list[Any]
    params: list[Any] | None
    state: list[Any]
    state_tree: Any
    owners: list[int | None]  # of each array of the state: the place of its parameter

    @classmethod
    def of(cls, tree: Any, paths: list[str], grads: list[Any], params: Any, state: Any) -> "StepInputs":
        pairs, state_tree = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_none)
        p_leaves = None if params is None else [as_jax(x) for x in jax.tree.leaves(params, is_leaf=is_none)]
        keys = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree.unflatten(range(len(paths))))[0]]
        owners = [_owner(path, keys, paths) for path, _ in pairs]
        grads, state_leaves = list(map(as_jax, grads)), [as_jax(x) for _, x in pairs]
        return cls(tree, paths, grads, p_leaves, state_leaves, state_tree, owners)

    def rows_of_state(self, place: int) -> list[int]:
        """Which arrays of the state have a row for each row of a table."""
        num_rows = self.grads[place].shape[0]
        found = []
        for i, (owner, x) in enumerate(zip(self.owners, self.state)):
            if owner != place or x is None:
                continue
            if is_codes(x.dtype):
                raise TypeError(
                    f"the moments of {self.paths[place]!r} are in 8 bits, but `row_sparse` updates fp32 moments: give "
                    "the table 32 in `rules`, as the default rules do for the name 'embedding'."
                )
            if memory_of(x) != "device":
                raise NotImplementedError(
                    f"the moments of {self.paths[place]!r} are in the host's memory, where no rows can be looked up: "
                    "give the table memory_kind='device' in `rules`."
                )
            if x.shape[:1] == (num_rows,):
                found.append(i)
            elif x.size > 1:
                raise TypeError(
                    f"the state of {self.paths[place]!r} has an array of shape {x.shape}, which is not made of rows of "
                    f"the {num_rows} of the table: `row_sparse` is for optimizers that treat rows one by one."
                )
        return found


def _owner(path: tuple, keys: Sequence[tuple], names: Sequence[str]) -> int | None:
    """The parameter whose path a path in the state ends with: its keys or, in another kind of tree, their names.

    A field `nu` of the state and a parameter's own "nu" are different keys of one name.
    """
    fits = [i for i, key in enumerate(keys) if path[len(path) - len(key) :] == key]
    if not fits:
        name = path_name(path)
        fits = [i for i, p in enumerate(names) if not p or name == p or name.endswith("/" + p)]
    return max(fits, key=lambda i: len(keys[i]), default=None)


class TableRows(NamedTuple):
    """The rows that represent one table in a step."""

    grads: Array
    params: Array | None
    state: dict[int, Array]  # by its place in the flat state
    drift: Array | None = None  # what catching up has added to the parameters

    def with_drift(self, out: Any, *, fused: bool) -> Any:
        """The update of these rows, or their new parameters."""
        return out if fused or self.drift is None else out + self.drift


class StepOutputs(NamedTuple):
    """What a step gave: updates, or new parameters where it was fused, and the state, as flat lists."""

    out: list[Any]
    state: list[Any]


class RowStep:
    """The step of an optimizer on a `StepInputs` whose tables are cut down to rows."""

    def __init__(self, tx: optax.GradientTransformation, extra_args: dict[str, Any], *, fused: bool):
        self.apply: Callable = partial(fused_update, tx) if fused else optax.with_extra_args_support(tx).update
        self.fused, self.extra_args = fused, extra_args

    def __call__(self, inputs: StepInputs, rows: dict[int, TableRows], *, others: bool = True) -> StepOutputs:
        """One step; without `others`, whose results are then of no use, all other parameters are zeros."""
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
        with shapes_of_tables({inputs.paths[i]: inputs.grads[i].shape for i in rows}):
            out, new_state = self.apply(*given, p, token_ids=token_ids, **self.extra_args)
        same = jax.tree.structure(new_state, is_leaf=is_none) == inputs.state_tree
        assert same, "the state of the optimizer changed its structure in update"
        return StepOutputs(inputs.tree.flatten_up_to(out), jax.tree.leaves(new_state, is_leaf=is_none))


def step_on_rows(
    step: RowStep,
    inputs: StepInputs,
    tables: dict[int, SparseRows],
    catch_up: Callable[[int, Array, TableRows], TableRows] | None = None,
) -> StepOutputs:
    """The step on everything, tables by their rows: a first piece together with all other parameters, then the rest.

    `catch_up(place, indices, rows)` changes the rows of parameters and state before the step.
    """
    kept = {place: inputs.rows_of_state(place) for place in tables}

    def gather(place: int, table: Any, arrays: dict[int, Array], start: Any, size: int) -> tuple[Array, TableRows]:
        x = tables[place]
        indices, values = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (x.indices, x.values))
        p = None if table is None else take_rows(table, indices)
        like = next((a for a in (table, *arrays.values()) if a is not None and a.ndim == 2), None)
        values = values if like is None else beside_rows(like, indices, values)
        rows = TableRows(values, p, {i: take_rows(a, indices) for i, a in arrays.items()})
        return indices, rows if catch_up is None else catch_up(place, indices, rows)

    first_sizes = {place: _first_chunk_size(x) for place, x in tables.items()}
    before = {place: {i: inputs.state[i] for i in kept[place]} for place in tables}
    params: Any = inputs.params or dict.fromkeys(tables)
    first = {place: gather(place, params[place], before[place], 0, first_sizes[place]) for place in tables}
    zero_rows = {place: jax.tree.map(jnp.zeros_like, rows) for place, (_, rows) in first.items()}
    out, state = map(list, step(inputs, {place: rows for place, (_, rows) in first.items()}))
    for place, x in tables.items():
        table, size, (indices, rows) = params[place], _chunk_size(x), first[place]
        arrays = {i: set_rows(a, indices, state[i]) for i, a in before[place].items()}
        written = rows.with_drift(out[place], fused=step.fused)
        if step.fused:
            target = set_rows(table, indices, written)
        else:
            target = jnp.zeros(x.values.shape, written.dtype, out_sharding=explicit_sharding(written))
            target = jax.lax.dynamic_update_slice_in_dim(target, written, 0, 0)

        def one_chunk(k: Any, carry: Any, place=place, table=table, size=size) -> Any:
            arrays, target = carry
            start = first_sizes[place] + k * size
            indices, rows = gather(place, target if step.fused else table, arrays, start, size)
            out, state = step(inputs, {**zero_rows, place: rows}, others=False)
            written = rows.with_drift(out[place], fused=step.fused)
            arrays = {i: set_rows(a, indices, state[i]) for i, a in arrays.items()}
            if step.fused:
                return arrays, set_rows(target, indices, written)
            return arrays, jax.lax.dynamic_update_slice_in_dim(target, written, start, 0)

        if n_chunks := (x.indices.size - first_sizes[place]) // size:
            arrays, target = jax.lax.fori_loop(0, n_chunks, one_chunk, (arrays, target))
        for i, a in arrays.items():
            state[i] = a
        out[place] = target if step.fused else x.with_values(target)
    return StepOutputs(out, state)


def _chunk_size(x: SparseRows) -> int:
    """How many rows make one piece: all, but on CPU a few."""
    if jax.default_backend() != "cpu":
        return max(1, x.indices.size)
    return max(1, CHUNK_BYTES // max(1, 4 * x.shape[1]))


def _first_chunk_size(x: SparseRows) -> int:
    """How many rows the first piece has, so that the rest are whole pieces."""
    n, size = x.indices.size, _chunk_size(x)
    return n % size or min(n, size)
