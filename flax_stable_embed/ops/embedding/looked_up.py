"""Differentiates a loss with respect to the rows that it looks up, instead of the table.

    rows_k = table[i_k] + tap_k,   tap = 0;      dL/dtap_k is the gradient of row i_k

`jax.grad` of a lookup has the shape of the table. The tap has only the rows that were looked up, and so has its
gradient. `fse.row_value_and_grad` first records which rows a loss looks up (`recording`), then runs it on a
`LookedUpTable` with a tap for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from ..dtypes import at_least_float32
from ..jax_compat import get_opaque_trace_state
from ..sharding import varying_like
from .gather import GatherOptions, plain_gather, rows_of_tangent, take
from .rows import SparseRows, find_rows, sealed, unsealed


@jax.custom_vjp
def _not_differentiated(table: Array, dummy: Array) -> Array:
    """Returns the table. A gradient with respect to it that is not zero by construction is an error."""
    del dummy
    return table


def _no_gradient(residuals: None, cotangent: Array) -> Any:
    raise TypeError(
        "The loss uses a table with `sparse=True` for more than lookups, so the table has a dense gradient. Leave the "
        "table out of that part of the loss (a sum over all parameters, say), or use jax.value_and_grad and "
        "sparse=False."
    )


_not_differentiated.defvjp(lambda table, dummy: (table, None), _no_gradient)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LookedUpTable:
    """Takes the place of a parameter while a loss is differentiated with respect to the rows that it looks up.

    table: Has the shape of the parameter, for Flax. Its gradient is an error.
    constant: The table that lookups read.
    tap: Zeros of shape (n, features), one row for each of n indices. It adds nothing to the rows and receives their
        gradient.
    sealed_indices: The n row numbers, sealed so that no arithmetic applies to them.
    """

    table: Array
    constant: Array
    tap: Array
    sealed_indices: Array

    @classmethod
    def at(cls, table: Array, indices: Array) -> "LookedUpTable":
        tap = jnp.zeros((indices.size, table.shape[1]), at_least_float32(table.dtype))
        # Inside of shard_map every device has its own rows. One tap for all would add up gradients of different rows.
        tap = varying_like(tap, indices, table)
        return cls(table, table, tap, sealed(indices))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.constant.shape

    @property
    def dtype(self) -> Any:
        return self.constant.dtype

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The table of a module with `sparse=True` has no {name!r} inside of fse.row_value_and_grad, where it "
            "supports lookups only. Use jax.value_and_grad for a loss that needs the full table."
        )

    def differentiated(self, tap: Array, dummy: Array) -> "LookedUpTable":
        """Returns the same table with `tap` and `dummy`, a number without effect, as inputs of a derivative."""
        return replace(self, table=_not_differentiated(self.table, dummy), tap=tap)

    def gradient(self, d_tap: Array) -> SparseRows:
        """Returns the gradient of the tap as the row gradient of the table."""
        return SparseRows(unsealed(self.sealed_indices, self.shape[0]), d_tap.astype(self.dtype), self.shape[0])

    def gather(self, options: GatherOptions, row_numbers: Array) -> Array:
        """Returns rows by number. One that is not among the indices gives NaN, because its gradient would be lost."""
        num_rows, n = self.shape[0], self.tap.shape[0]
        at = find_rows(unsealed(self.sealed_indices, num_rows), row_numbers, num_rows)
        known = jnp.where(at < n, row_numbers, num_rows)
        if options.padding_idx is not None:
            at = jnp.where(row_numbers == options.padding_idx, n, at)
        options = options._replace(in_bounds=False)  # unknown numbers are outside
        return _gather_tapped(options, self.constant, known, self.tap, at)


def is_looked_up_table(x: Any) -> bool:
    """Returns whether `x` is a LookedUpTable, for the `is_leaf` of tree functions."""
    return isinstance(x, LookedUpTable)


def _gather_tapped_primal(options, table, row_numbers, tap, at):
    del tap, at
    return plain_gather(options, table, row_numbers)


_gather_tapped = jax.custom_jvp(_gather_tapped_primal, nondiff_argnums=(0,))


def _gather_tapped_jvp(options, primals, tangents):
    """Returns the tangent of the tap, plus that of the table, for derivatives of `row_value_and_grad` itself."""
    table, row_numbers, tap, at = primals
    rows = _gather_tapped(options, table, row_numbers, tap, at)
    d_rows = jnp.zeros_like(rows)
    if not isinstance(tangents[0], SymbolicZero):
        d_rows = d_rows + rows_of_tangent(options, tangents[0], row_numbers)
    if not isinstance(tangents[2], SymbolicZero) and tap.shape[0]:
        d_tap = tangents[2].astype(at_least_float32(tap.dtype))
        d_rows = d_rows + take(d_tap, at, options.sharding, fill_value=0).astype(options.dtype)
    return rows, d_rows


_gather_tapped.defjvp(_gather_tapped_jvp, symbolic_zeros=True)


class Lookup(NamedTuple):
    """One lookup of a table marked `sparse=True`."""

    table: Any
    row_numbers: Array


class _Tape(NamedTuple):
    lookups: list[Lookup]
    trace: Any


_TAPE: ContextVar[_Tape | None] = ContextVar("lookups", default=None)


@contextmanager
def recording() -> Iterator[list[Lookup]]:
    """Yields a list that collects the lookups of `sparse=True` tables while the context is open."""
    tape = _Tape([], get_opaque_trace_state(convention="flax_stable_embed"))
    token = _TAPE.set(tape)
    try:
        yield tape.lookups
    finally:
        _TAPE.reset(token)


def record(table: Any, row_numbers: Array) -> None:
    """Records a lookup, if a recording is open.

    Raises:
        ValueError: The lookup is inside a transformation that started after the recording, so its ids are tracers.
    """
    tape = _TAPE.get()
    if tape is None:
        return
    if tape.trace != get_opaque_trace_state(convention="flax_stable_embed"):
        raise ValueError(
            f"A table of shape {table.shape} with `sparse=True` is looked up inside of jax.jit, jax.checkpoint, "
            "jax.vmap, jax.lax.scan or the like, which keeps its ids to itself. Pass the ids that the loss looks up: "
            "fse.row_value_and_grad(loss_fn, token_ids=lambda params, batch: batch['ids'])."
        )
    tape.lookups.append(Lookup(table, row_numbers))
