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
from .row_step import RowStep, StepInputs, TableRows
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


def initial_state(inner_state: Any, params: Any, mask: Any) -> RowSparseState:
    """The state before the first step."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None or is_box(x))
    leaves = [unbox(x) for _, x in pairs]
    is_table = are_tables(mask, tree.unflatten(leaves), [path_name(path) for path, _ in pairs], leaves)

    def per_parameter(shape: tuple[int, ...], dtype: Any) -> Any:
        return tree.unflatten([jnp.zeros(shape, dtype) for _ in leaves])

    def per_row(*shape: int) -> Any:
        shapes = [(x.shape[0], *shape) if table else shape for table, x in zip(is_table, leaves)]
        return tree.unflatten([jnp.zeros(shape, jnp.int32) for shape in shapes])

    return RowSparseState(
        inner_state,
        count=jnp.zeros([], jnp.int32),
        log_decay=per_parameter((2,), jnp.int32),
        remainder=per_parameter((), jnp.float32),
        last=per_row(),
        last_log_decay=per_row(2),
    )


class Decay(NamedTuple):
    """What a step with gradient zero does to a row, as factors."""

    moments: dict[int, Array]  # by the place of the array in the flat state
    log_params: Array


class RowHistory:
    """What "catch_up" remembers, by the place of each parameter."""

    def __init__(self, inputs: StepInputs, tables: dict[int, SparseRows], state: RowSparseState):
        self.state, self.tables = state, tables
        fields = state.log_decay, state.remainder, state.last, state.last_log_decay
        leaves, self.trees = zip(*[jax.tree.flatten(tree, is_leaf=is_none) for tree in fields])
        lists: Any = [[None if x is None else jnp.asarray(x) for x in field] for field in leaves]
        self.log_decay, self.remainder, self.last, self.last_log_decay = lists
        if missing := [i for i, x in enumerate(self.last) if jnp.ndim(x) and i not in tables]:
            raise ValueError(
                f"{inputs.paths[missing[0]]!r} is a table by `mask`, but has no row gradient: with 'catch_up' "
                "every table must have one in every step. Leave it out of `mask`, or give its `token_ids`."
            )
        for place in tables:
            if self.last[place].shape != (tables[place].shape[0],):
                raise ValueError(
                    f"{inputs.paths[place]!r} has a row gradient, but 'catch_up' keeps no record of its rows: "
                    "name it in `mask` when the optimizer is made."
                )

    def catch_up(self, decays: dict[int, Decay], place: int, indices: Array, rows: TableRows) -> TableRows:
        """Rows with the steps made up for that they have missed."""
        decay, p = decays[place], rows.params
        assert p is not None  # checked by `step`
        skipped_steps = (self.state.count - take_rows(self.last[place], indices)).astype(jnp.float32)
        since = (self.log_decay[place][None] - take_rows(self.last_log_decay[place], indices)).astype(jnp.float32)
        log_factor = since[:, 0] + UNIT * since[:, 1]
        drift = p * jnp.expm1(log_factor)[:, None].astype(p.dtype)
        state = {
            i: (x * (decay.moments[i] ** skipped_steps).reshape(-1, *[1] * (x.ndim - 1))).astype(x.dtype)
            for i, x in rows.state.items()
        }
        return rows._replace(params=p + drift, state=state, drift=drift)

    def next_state(self, inner_state: Any, decays: dict[int, Decay]) -> RowSparseState:
        """The history after this step."""
        count = jnp.asarray(optax.safe_increment(self.state.count))
        for place, x in self.tables.items():
            units = (decays[place].log_params / UNIT) + self.remainder[place]
            rounded = jnp.clip(jnp.round(units), -(2.0**30), 2.0**30)  # a decay to zero is one by e^-16
            self.remainder[place] = units - rounded
            units = self.log_decay[place][1] + rounded.astype(jnp.int32)
            carry, units = units >> UNIT_BITS, units & (2**UNIT_BITS - 1)
            self.log_decay[place] = jnp.stack([self.log_decay[place][0] + carry, units])
            for field, value in ((self.last, count), (self.last_log_decay, self.log_decay[place])):
                values = jnp.broadcast_to(value, x.indices.shape + value.shape)
                field[place] = set_rows(field[place], x.indices, values)
        fields = zip(self.trees, (self.log_decay, self.remainder, self.last, self.last_log_decay))
        return RowSparseState(inner_state, count, *(tree.unflatten(field) for tree, field in fields))


def measure_decays(step: RowStep, inputs: StepInputs, tables: dict[int, SparseRows]) -> dict[int, Decay]:
    """Read off the optimizer: its step without a gradient on a row of which one moment, or the parameter, is ones."""
    n = max(len(inputs.rows_of_state(place)) for place in tables) + 1
    unit_rows = rows_without_gradient(inputs, tables, np.eye(n))
    after = step(inputs, unit_rows, others=False)
    return {
        place: Decay(
            {i: after.state[i][k].ravel()[0].astype(jnp.float32) for k, i in enumerate(rows.state)},
            jnp.log1p(after.out[place][-1].ravel()[0].astype(jnp.float32)),
        )
        for place, rows in unit_rows.items()
    }


def rows_without_gradient(inputs: StepInputs, tables: Any, numbers: np.ndarray) -> dict[int, TableRows]:
    """A row for each row of `numbers`, filled with them: the k-th moment with the k-th, the parameter with the last."""

    def filled(x: Array, column: np.ndarray) -> Array:
        column = column.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.asarray(np.broadcast_to(column, (len(numbers), *x.shape[1:])), x.dtype)

    rows = {}
    for place in tables:
        g = inputs.grads[place]
        p = None if inputs.params is None else filled(inputs.params[place], numbers[:, -1])
        state = {i: filled(inputs.state[i], numbers[:, k]) for k, i in enumerate(inputs.rows_of_state(place))}
        rows[place] = TableRows(jnp.zeros((len(numbers), g.shape[1]), g.dtype), p, state)
    return rows
