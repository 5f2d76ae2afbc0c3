"""Lets rows catch up on the steps that did not touch them: semantics="catch_up" of `row_sparse`.

    m_i <- c^k m_i,   p_i <- p_i exp(L - L_i),   L = sum over steps of log(1 - rate * decay)

k is the number of steps that skipped row i, c the decay rate of the moment, and L_i the value of L after the last step
that touched the row. The dense optimizer would have made these k steps with a zero gradient. Each such step multiplies
moments and parameters by a factor. The factors are measured: the optimizer makes a step with a zero gradient on rows of
ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...ops.embedding.rows import SparseRows, set_rows, take_rows
from ..boxes import is_box, unbox
from ..placement import device_of
from ..trees import Mask, Params, is_none, path_name
from .row_step import RowStep, StepInputs, TableRows
from .tables import are_tables

# L is an integer multiple of this unit, so that differences of L are exact however long a training run is. It is stored
# as two integers, (L rounded down, the remainder in units), because a single int32 would overflow.
UNIT_BITS = 26
UNIT = 2.0**-UNIT_BITS


class RowSparseState(NamedTuple):
    """State of `row_sparse(tx, semantics="catch_up")`. With "lazy" the state is that of `tx`.

    Always: the last four fields are trees like the parameters. For a parameter that is not a table, `last` and
    `last_log_decay` have no axis of rows and are not used.
    """

    inner_state: Any
    count: Array  # shape=(), dtype=int32: number of steps
    log_decay: Any  # (2,) int32: L, the sum of log(1 - rate * decay) over steps, as integer part and units of 2^-26
    remainder: Any  # () float32: the part of L that is smaller than a unit, in units
    last: Any  # (num_rows,) int32: `count` after the last step that touched each row
    last_log_decay: Any  # (num_rows, 2) int32: `log_decay` after that step


def initial_state(inner_state: Any, params: Params, mask: Mask) -> RowSparseState:
    """Returns the state before the first step. `inner_state` is that of the wrapped optimizer."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None or is_box(x))
    leaves = [unbox(x) for _, x in pairs]
    is_table = are_tables(mask, tree.unflatten(leaves), [path_name(path) for path, _ in pairs], leaves)

    def per_parameter(shape: tuple[int, ...], dtype: Any) -> Any:
        return tree.unflatten([jnp.zeros(shape, dtype, device=device_of(x)) for x in leaves])

    def per_row(*shape: int) -> Any:
        pairs = [(x, (x.shape[0], *shape) if table else shape) for table, x in zip(is_table, leaves)]
        return tree.unflatten([jnp.zeros(shape, jnp.int32, device=device_of(x)) for x, shape in pairs])

    return RowSparseState(
        inner_state,
        count=jnp.zeros([], jnp.int32),
        log_decay=per_parameter((2,), jnp.int32),
        remainder=per_parameter((), jnp.float32),
        last=per_row(),
        last_log_decay=per_row(2),
    )


class Decay(NamedTuple):
    """Factors by which a step with a zero gradient multiplies the rows of one table."""

    moments: dict[int, Array]  # float32 factor of each moment, by the index of its array in the flat state
    log_params: Array  # logarithm of the factor of the parameters: log(1 - rate * decay)


class RowHistory:
    """Knows when each row was last updated, and lets rows catch up from there.

    Holds the fields of `RowSparseState` as lists with one array per parameter.

    Raises:
        ValueError: A table has no row gradient in this step, or a row gradient has no history in the state.
    """

    def __init__(self, inputs: StepInputs, tables: dict[int, SparseRows], state: RowSparseState):
        self.state, self.tables = state, tables
        fields = state.log_decay, state.remainder, state.last, state.last_log_decay
        leaves, self.trees = zip(*[jax.tree.flatten(tree, is_leaf=is_none) for tree in fields])
        lists: Any = [[None if x is None else jnp.asarray(x) for x in field] for field in leaves]
        self.log_decay, self.remainder, self.last, self.last_log_decay = lists
        if missing := [i for i, x in enumerate(self.last) if jnp.ndim(x) and i not in tables]:
            raise ValueError(
                f"{inputs.paths[missing[0]]!r} is a table by `mask` or by its name, but this step has no row gradient "
                "for it. With semantics='catch_up' every table needs one in every step. Pass its ids in `token_ids`, "
                "or give row_sparse a `mask` that is False for it."
            )
        for place in tables:
            rows, known = tables[place].shape[0], jnp.shape(self.last[place])
            if known and known != (rows,):
                raise ValueError(
                    f"The state of {inputs.paths[place]!r} has {known[0]} rows, but the table has {rows}. Call "
                    "`update` with the parameters that the state was made for. If the table has grown or shrunk, "
                    "adapt the state: fse.adapt_state."
                )
            if not known:
                raise ValueError(
                    f"{inputs.paths[place]!r} has a row gradient, but the state has no history of its rows. With "
                    "semantics='catch_up', make the optimizer with a `mask` that is True for every table."
                )

    def catch_up(self, decays: dict[int, Decay], place: int, indices: Array, rows: TableRows) -> TableRows:
        """Returns the rows as the dense optimizer would have them after the skipped steps (except for momentum)."""
        decay, p = decays[place], rows.params
        assert p is not None  # `row_sparse` has checked it
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
        """Returns the state after this step, which touched the rows of `tables`."""
        count = jnp.asarray(optax.safe_increment(self.state.count))
        for place, x in self.tables.items():
            units = (decays[place].log_params / UNIT) + self.remainder[place]
            rounded = jnp.clip(jnp.round(units), -(2.0**30), 2.0**30)  # a factor of zero counts as e^-16
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
    """Measures the factors of a step with a zero gradient.

    The optimizer makes this step on one row per moment, in which that moment is ones and everything else zeros, and on
    one row in which the parameter is ones.
    """
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
    """Returns rows with a zero gradient for every table, filled with constants.

    Args:
        inputs: Shapes and dtypes are taken from here.
        tables: The places of the tables.
        numbers: One row per row of the result, shape (n, columns). The k-th moment of a table is filled with column k,
            the parameter with the last column.
    """

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
