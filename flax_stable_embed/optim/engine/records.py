"""Records the decisions of `init`, for `describe` and `convert_state`, which trace `init` and read its records."""

from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise_step.step import Moment
from ..arguments import check_params, check_transform
from ..storage.plan import LeafPlan
from ..storage.state_format import StateFormat
from ..trees import Params
from .method import Method


class StoredMoment(NamedTuple):
    """Where and how a transform's state keeps one moment of one parameter.

    Attributes:
        path: The parameter's path.
        name: The moment's name, "mu".
        codes: The key path of its codes or values, from the transform's state.
        absmax: The key path of its scales.
        shape: Its shape once decoded.
        moment: How its codes are read; None where it is not in 8 bits.
        blocks: The blocks that share a scale; None where it is not in 8 bits.
    """

    path: str
    name: str
    codes: tuple
    absmax: tuple
    shape: tuple[int, ...]
    moment: Moment | None
    blocks: Blocks | None


class StayedField(NamedTuple):
    """A field of a wrapped transform's state that stays as it is, with the reason, in the report of `describe`."""

    field: str
    bytes: int
    reason: str


class Remainder(NamedTuple):
    """The remainder of a parameter that `split_weights` splits: the bits of both in all, and its bytes."""

    bits: int
    bytes: int


class Split(NamedTuple):
    """What `split_weights` keeps: the remainders by path of the parameter, and the values of its `format`."""

    remainders: dict[str, Remainder]
    code: np.ndarray


class Record(NamedTuple):
    """What one 8-bit transform keeps, or `split_weights`.

    Attributes:
        format: The very array that its state has as `format`, by which the state is found in a larger one.
        formats: The formats in use: the optimizer's, then the formats of its rules.
        plans: The plan of every parameter whose moments it keeps, by path.
        bytes: The bytes of its moments and their scales, by path of the parameter.
        moments: Where each moment is.
        method: The optimizer; None for `quantize_state`.
        stayed: Fields of a wrapped transform's state that stay as they are.
        split: What `split_weights` keeps; None for all others.
    """

    format: Array
    formats: list[StateFormat]
    plans: dict[str, LeafPlan]
    bytes: dict[str, int]
    moments: list[StoredMoment]
    method: Method | None = None
    stayed: tuple[StayedField, ...] = ()
    split: Split | None = None


# Where `trace_init` collects records; None at all other times.
RECORDS: ContextVar[list[Record] | None] = ContextVar("records", default=None)


def trace_init(tx: optax.GradientTransformation, params: Params) -> tuple[Any, list[tuple[tuple | None, Record]]]:
    """Traces `tx.init(params)`.

    Returns:
        The shapes of the state, and the record of every 8-bit transform in it with the key path of its state. The path
        is None where a wrapper made another array of `format`.

    Raises:
        TypeError: `tx` is not a transform, or the parameters have variables that are not trained.
    """
    check_transform(tx)
    check_params(params)
    records: list[Record] = []
    places: dict[int, tuple] = {}

    def init(params):
        state = tx.init(params)
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        places.update({id(leaf): path[:-1] for path, leaf in leaves if any(leaf is r.format for r in records)})
        return state

    token = RECORDS.set(records)
    try:
        with jax.disable_jit():  # a cached trace would record nothing
            state = jax.eval_shape(init, params)
    finally:
        RECORDS.reset(token)
    return state, [(places.get(id(record.format)), record) for record in records]
