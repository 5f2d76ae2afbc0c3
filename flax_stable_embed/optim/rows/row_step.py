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


class Problem(NamedTuple):
    """What one step is given, as flat lists; `None` for parameters that were not given."""

    tree: Any  # of the gradients
    paths: list[str]
    grads: list[Any]
    params: list[Any] | None
    state: list[Any]
    state_tree: Any
    owners: list[int | None]  # of each array of the state: the place of its parameter

    @classmethod
    def of(cls, tree: Any, paths: list[str], grads: list[Any], params: Any, state: Any) -> "Problem":
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


class Rows(NamedTuple):
    """The rows that represent one table in a step."""

    grads: Array
    params: Array | None
    state: dict[int, Array]  # by its place in the flat state
    drift: Array | None = None  # what catching up has added to the parameters

    def written(self, out: Any, fused: bool) -> Any:
        """The update of these rows, or their new parameters."""
        return out if fused or self.drift is None else out + self.drift


class Outcome(NamedTuple):
    """What a step gave: updates, or new parameters where it was fused, and the state, as flat lists."""

    outputs: list[Any]
    state: list[Any]


class RowStep:
    """The step of an optimizer on a `Problem` whose tables are cut down to rows."""

    def __init__(self, tx: optax.GradientTransformation, fused: bool, extra_args: dict[str, Any]):
        self.apply: Callable = partial(fused_update, tx) if fused else optax.with_extra_args_support(tx).update
        self.fused, self.extra_args = fused, extra_args

    def __call__(self, problem: Problem, rows: dict[int, Rows], *, others: bool = True) -> Outcome:
        """One step; without `others`, whose results are then of no use, all other parameters are zeros."""
        keep: Any = (lambda x: x) if others else (lambda x: x if x is None else jnp.zeros_like(x))
        grads, params, state = map(list, (problem.grads, problem.params or (), problem.state))
        for i in range(len(grads)):
            grads[i] = rows[i].grads if i in rows else keep(grads[i])
        for i in range(len(params)):
            params[i] = rows[i].params if i in rows else keep(params[i])
        for i, (x, owner) in enumerate(zip(state, problem.owners)):
            if owner in rows:
                state[i] = rows[owner].state.get(i, x)
            elif owner is not None and jnp.ndim(x):
                state[i] = keep(x)
        given = problem.tree.unflatten(grads), problem.state_tree.unflatten(state)
        p = None if problem.params is None else problem.tree.unflatten(params)
        touched = {problem.paths[i]: np.arange(r.grads.shape[0]) for i, r in rows.items()}
        with shapes_of_tables({problem.paths[i]: problem.grads[i].shape for i in rows}):
            outputs, new_state = self.apply(*given, p, token_ids=touched, **self.extra_args)
        same = jax.tree.structure(new_state, is_leaf=is_none) == problem.state_tree
        assert same, "the state of the optimizer changed its structure in update"
        return Outcome(problem.tree.flatten_up_to(outputs), jax.tree.leaves(new_state, is_leaf=is_none))


def step_on_rows(
    step: RowStep,
    problem: Problem,
    tables: dict[int, SparseRows],
    catch_up: Callable[[int, Array, Rows], Rows] | None = None,
) -> Outcome:
    """The step on everything, tables by their rows: a first piece together with all other parameters, then the rest.

    `catch_up(place, indices, rows)` changes the rows of parameters and state before the step.
    """
    kept = {place: problem.rows_of_state(place) for place in tables}

    def cut(place: int, table: Any, arrays: dict[int, Array], start: Any, size: int) -> tuple[Array, Rows]:
        x = tables[place]
        indices, values = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (x.indices, x.values))
        p = None if table is None else take_rows(table, indices)
        whole = [a for a in (table, *arrays.values()) if a is not None and a.ndim == 2]
        values = beside_rows(whole[0], indices, values) if whole else values
        rows = Rows(values, p, {i: take_rows(a, indices) for i, a in arrays.items()})
        return indices, rows if catch_up is None else catch_up(place, indices, rows)

    heads = {place: _head(x) for place, x in tables.items()}
    before = {place: {i: problem.state[i] for i in kept[place]} for place in tables}
    params: Any = problem.params or {place: None for place in tables}
    first = {place: cut(place, params[place], before[place], 0, heads[place]) for place in tables}
    blank = {place: jax.tree.map(jnp.zeros_like, rows) for place, (_, rows) in first.items()}
    outputs, state = map(list, step(problem, {place: rows for place, (_, rows) in first.items()}))
    for place, x in tables.items():
        table, size, (indices, rows) = params[place], _chunk(x), first[place]
        arrays = {i: set_rows(a, indices, state[i]) for i, a in before[place].items()}
        out = rows.written(outputs[place], step.fused)
        if step.fused:
            target = set_rows(table, indices, out)
        else:
            target = jnp.zeros(x.values.shape, out.dtype, out_sharding=explicit_sharding(out))
            target = jax.lax.dynamic_update_slice_in_dim(target, out, 0, 0)

        def one(k: Any, carry: Any, place=place, table=table, size=size) -> Any:
            arrays, target = carry
            start = heads[place] + k * size
            indices, rows = cut(place, target if step.fused else table, arrays, start, size)
            outputs, state = step(problem, {**blank, place: rows}, others=False)
            out = rows.written(outputs[place], step.fused)
            arrays = {i: set_rows(a, indices, state[i]) for i, a in arrays.items()}
            if step.fused:
                return arrays, set_rows(target, indices, out)
            return arrays, jax.lax.dynamic_update_slice_in_dim(target, out, start, 0)

        if rest := (x.indices.size - heads[place]) // size:
            arrays, target = jax.lax.fori_loop(0, rest, one, (arrays, target))
        for i, a in arrays.items():
            state[i] = a
        outputs[place] = target if step.fused else x.with_values(target)
    return Outcome(outputs, state)


def _chunk(x: SparseRows) -> int:
    """How many rows make one piece: all, but on CPU a few."""
    if jax.default_backend() != "cpu":
        return max(1, x.indices.size)
    return max(1, CHUNK_BYTES // max(1, 4 * x.shape[1]))


def _head(x: SparseRows) -> int:
    """How many rows the first piece has, so that the rest are whole pieces."""
    n, size = x.indices.size, _chunk(x)
    return n % size or min(n, size)
