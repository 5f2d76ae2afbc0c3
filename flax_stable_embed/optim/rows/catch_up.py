"""What "catch_up" of `row_sparse` remembers of every row, and how it makes up for the steps that a row was not touched.

    m_i <- c^k m_i,   p_i <- p_i exp(L - L_i),   L = sum over steps of log(1 - rate * decay)

k: steps since the row's last one; L_i: what L was then. c and the rate are read off the optimizer itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...ops.embedding.rows import SparseRows, set_rows, take_rows
from ..boxes import is_box, unbox
from ..trees import is_none, path_name
from .row_step import Problem, Rows, RowStep
from .tables import are_tables

# Sums of logarithms are whole multiples of this, so that differences are exact however long a training is. They are
# kept as two whole numbers, (L rounded down, what is left in units), since one would wrap around.
UNIT_BITS = 26


UNIT = 2.0**-UNIT_BITS


class RowSparseState(NamedTuple):
    """State of `row_sparse(tx, semantics="catch_up")`; with "lazy" it is that of `tx` alone."""

    inner_state: Any
    count: Array  # shape=(), dtype=int32: steps done
    log_decay: (
        Any  # like the parameters, int32 (2,): sum over the steps of log(1 - rate * decay): whole, units of 2^-26
    )
    remainder: Any  # like the parameters, float32 (): what `log_decay` lacks, less than a unit
    last: Any  # like the parameters, int32 (num_rows,): the count after the last step that touched a row
    last_log_decay: Any  # like the parameters, int32 (num_rows, 2): `log_decay` after that step


def initial_records(inner_state: Any, params: Any, mask: Any) -> RowSparseState:
    """The state before the first step."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_box_or_none)
    leaves = [unbox(x) for _, x in pairs]
    ours = are_tables(mask, tree.unflatten(leaves), [path_name(path) for path, _ in pairs], leaves)

    def zeros(dtype: Any, of_rows: bool, *words: int) -> Any:
        shapes = [(*x.shape[:1], *words) if table and of_rows else words for table, x in zip(ours, leaves)]
        return tree.unflatten([jnp.zeros(shape, dtype) for shape in shapes])

    count = jnp.zeros([], jnp.int32)
    sums = zeros(jnp.int32, False, 2), zeros(jnp.float32, False)
    return RowSparseState(inner_state, count, *sums, zeros(jnp.int32, True), zeros(jnp.int32, True, 2))


def _is_box_or_none(x: Any) -> bool:
    return x is None or is_box(x)


class Decay(NamedTuple):
    """What a step with gradient zero does to a row, as factors."""

    moments: dict[int, Array]  # by the place of the array in the flat state
    log_params: Array


class Records:
    """What "catch_up" remembers, by the place of each parameter."""

    def __init__(self, problem: Problem, tables: dict[int, SparseRows], state: RowSparseState):
        self.state, self.tables = state, tables
        trees = [jax.tree.flatten(tree, is_leaf=is_none) for tree in state[2:]]
        columns, self.trees = zip(*trees)
        lists: Any = [[None if x is None else jnp.asarray(x) for x in column] for column in columns]
        self.log_decay, self.remainder, self.last, self.last_log_decay = lists
        named = [i for i, x in enumerate(self.last) if jnp.ndim(x)]
        if missing := [i for i in named if i not in tables]:
            raise ValueError(
                f"{problem.paths[missing[0]]!r} is a table by `mask`, but has no row gradient: with 'catch_up' "
                "every table must have one in every step. Leave it out of `mask`, or give its `token_ids`."
            )
        for place in tables:
            if self.last[place].shape != (tables[place].shape[0],):
                raise ValueError(
                    f"{problem.paths[place]!r} has a row gradient, but 'catch_up' keeps no record of its rows: "
                    "name it in `mask` when the optimizer is made."
                )

    def catch_up(self, decays: dict[int, Decay], place: int, indices: Array, rows: Rows) -> Rows:
        """Rows with the steps made up for that they have missed."""
        decay, p = decays[place], rows.params
        assert p is not None  # checked by `step`
        skipped = (self.state.count - take_rows(self.last[place], indices)).astype(jnp.float32)
        passed = (self.log_decay[place][None] - take_rows(self.last_log_decay[place], indices)).astype(jnp.float32)
        log_factor = passed[:, 0] + UNIT * passed[:, 1]
        drift = p * jnp.expm1(log_factor)[:, None].astype(p.dtype)
        state = {
            i: (x * (decay.moments[i] ** skipped).reshape(-1, *[1] * (x.ndim - 1))).astype(x.dtype)
            for i, x in rows.state.items()
        }
        return rows._replace(params=p + drift, state=state, drift=drift)

    def after(self, inner_state: Any, decays: dict[int, Decay]) -> RowSparseState:
        """The records after this step."""
        count = jnp.asarray(optax.safe_increment(self.state.count))
        for place, x in self.tables.items():
            units = (decays[place].log_params / UNIT) + self.remainder[place]
            whole = jnp.clip(jnp.round(units), -(2.0**30), 2.0**30)  # a decay to zero is one by e^-16
            self.remainder[place] = units - whole
            units = self.log_decay[place][1] + whole.astype(jnp.int32)
            carry, units = units >> UNIT_BITS, units & (2**UNIT_BITS - 1)
            self.log_decay[place] = jnp.stack([self.log_decay[place][0] + carry, units])
            for column, value in ((self.last, count), (self.last_log_decay, self.log_decay[place])):
                column[place] = set_rows(
                    column[place], x.indices, jnp.broadcast_to(value, x.indices.shape + value.shape)
                )
        columns = zip(self.trees, (self.log_decay, self.remainder, self.last, self.last_log_decay))
        return RowSparseState(inner_state, count, *(tree.unflatten(column) for tree, column in columns))


def decays_of(step: RowStep, problem: Problem, tables: dict[int, SparseRows]) -> dict[int, Decay]:
    """Read off the optimizer: its step without a gradient on a row of which one moment, or the parameter, is ones."""
    n = max(len(problem.rows_of_state(place)) for place in tables) + 1
    blank = rows_without_gradient(problem, tables, np.eye(n))
    outcome = step(problem, blank, others=False)
    return {
        place: Decay(
            {i: outcome.state[i][k].ravel()[0].astype(jnp.float32) for k, i in enumerate(rows.state)},
            jnp.log1p(outcome.outputs[place][-1].ravel()[0].astype(jnp.float32)),
        )
        for place, rows in blank.items()
    }


def rows_without_gradient(problem: Problem, tables: Any, numbers: np.ndarray) -> dict[int, Rows]:
    """A row for each row of `numbers`, filled with them: the k-th moment with the k-th, the parameter with the last."""

    def filled(x: Array, column: np.ndarray) -> Array:
        column = column.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.asarray(np.broadcast_to(column, (len(numbers), *x.shape[1:])), x.dtype)

    blank = {}
    for place in tables:
        g, kept = problem.grads[place], problem.rows_of_state(place)
        p = None if problem.params is None else filled(problem.params[place], numbers[:, -1])
        state = {i: filled(problem.state[i], numbers[:, k]) for k, i in enumerate(kept)}
        blank[place] = Rows(jnp.zeros((len(numbers), g.shape[1]), g.dtype), p, state)
    return blank
