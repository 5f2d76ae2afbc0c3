"""What an `init` decides, for those who look on: they trace it and read its records."""

from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise_step.step import Moment
from ..storage.rules import Decision
from ..storage.state_format import StateFormat
from .method import Method


class Row(NamedTuple):
    """One parameter in the report of `describe`."""

    path: str
    shape: tuple[int, ...]
    bits: int | str
    block: str
    reason: str
    implementation: str
    bytes: int
    overrides: str = ""
    cut: tuple[int, ...] | None = None
    straddles: str = ""


class Stayed(NamedTuple):
    """A field of a wrapped transform's state that is no moment in 8 bits, in the report of `describe`."""

    field: str
    bytes: int
    reason: str


class Leaf(NamedTuple):
    """One moment of one parameter: its shape once decoded, and where and how the transform's state keeps it."""

    name: str  # the moment's
    codes: tuple  # key paths from the transform's state
    absmax: tuple
    shape: tuple[int, ...]
    moment: Moment | None  # None where it is not in 8 bits
    blocks: Blocks | None


class Record(NamedTuple):
    """What one transform keeps. Its state is known again by its `format`, the very array."""

    format: Array
    formats: list[StateFormat]
    rows: list[Row]
    leaves: list[Leaf]
    parameters: dict[str, tuple[tuple[int, ...], Decision]]  # by path: the shape, and the decision
    method: Method | None = None  # of an optimizer of this library
    stayed: tuple[Stayed, ...] = ()


# Where `trace_init` collects records; None at all other times.
RECORDS: ContextVar[list[Record] | None] = ContextVar("records", default=None)


def trace_init(tx: optax.GradientTransformation, params: Any) -> tuple[Any, list[tuple[tuple | None, Record]]]:
    """The shapes of `tx.init(params)`, and the records of all in it with the key paths of their states.

    A path is None where a wrapper made another array of `format`.
    """
    records: list[Record] = []
    places: dict[int, tuple] = {}

    def init(params):
        state = tx.init(params)
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        places.update({id(leaf): path[:-1] for path, leaf in leaves if any(leaf is r.format for r in records)})
        return state

    token = RECORDS.set(records)
    try:
        with jax.disable_jit():  # not from a cached trace, which would record nothing: a new function, and jits within
            state = jax.eval_shape(init, params)
    finally:
        RECORDS.reset(token)
    return state, [(places.get(id(record.format)), record) for record in records]
