"""Converts one moment of one parameter from bitsandbytes' storage to ours and back.

Codes are kept exactly where they mean the same on both sides: the same map, the same blocks, no transposition. In
all other cases the moment is decoded. It is then encoded again if the destination stores it in 8 bits.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ...ops.blockwise.blocks import Blocks
from ...optim.storage.moments import MomentSpec, dequantize_moment, quantize_moment
from ...optim.storage.plan import LeafPlan
from . import flat_blocks as flat
from .report import How


class Stored(NamedTuple):
    """A moment as bitsandbytes stores it.

    Either uint8 codes with one scale per block of the flattened tensor and a map, or floating point numbers alone.
    """

    values: np.ndarray
    absmax: np.ndarray | None = None
    qmap: np.ndarray | None = None

    @property
    def block_size(self) -> int:
        return flat.block_size(self.values.size, 0 if self.absmax is None else self.absmax.size)

    def decoded(self) -> np.ndarray:
        if self.absmax is None or self.qmap is None:
            return self.values
        return flat.decode(self.values, self.absmax, self.qmap, self.block_size)


class Place(NamedTuple):
    """How our optimizer state stores one moment of a parameter."""

    moment: MomentSpec
    signed: bool  # whether bitsandbytes stores it with its signed map
    plan: LeafPlan
    axes: tuple[int, ...]  # the axes of torch's tensor in our order, as for `numpy.transpose`

    @property
    def _stored(self):
        return self.moment.stored(self.plan.state_format)

    def shares_codes(self, block_size: int, qmap: np.ndarray) -> bool:
        """Returns whether a code stands for the same number here and in bitsandbytes."""
        blocks, in_order = self.plan.blocks, self.axes == tuple(range(len(self.axes)))
        if blocks is None or not in_order or self.plan.state_format.codec != "dynamic":
            return False
        return flat.are_ours(self.plan.shape, blocks, block_size) and flat.is_same_map(qmap, self.signed)

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, absmax = quantize_moment(jnp.asarray(x, jnp.float32), self._stored, _need(self.plan.blocks))
        return np.asarray(codes), np.asarray(absmax)

    def decode(self, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
        return np.asarray(
            dequantize_moment(jnp.asarray(codes), jnp.asarray(absmax), self._stored, _need(self.plan.blocks))
        )


def to_ours(moment: Stored, place: Place, values: Any, absmax: Any) -> tuple[np.ndarray, np.ndarray, How, float]:
    """Returns `(values, absmax, how, error)` for our state.

    The arguments `values` and `absmax` are the arrays of a fresh state. They set the shapes and dtypes of the results.
    """
    given = moment.decoded()
    if not place.moment.signed and given.size and given.min() < -1e-5 * np.abs(given).max():
        raise ValueError(
            f"`{place.moment.name}` cannot be negative, but the state to load into it has {given.min():g}. Check that "
            "`tx` is the same optimizer as the one that was saved."
        )
    if moment.absmax is not None and moment.qmap is not None:
        if place.shares_codes(moment.block_size, moment.qmap):
            off = np.abs(moment.qmap - flat.qmap(place.signed)).max()
            return flat.to_ours(moment.values, place.signed), moment.absmax.reshape(absmax.shape), "exact", float(off)
    given = given.transpose(place.axes)
    if place.plan.blocks is not None:
        codes, scales = place.encode(given)
        error = _error(given, place.decode(codes, scales), _spread(scales, place.plan.blocks, place.plan.shape))
        return codes, scales, "encoded", error
    floats = given if values.shape == given.shape else given.mean(-1, keepdims=True)  # "rowwise"
    floats = floats.astype(values.dtype)
    error = _error(given, floats.astype(given.dtype), np.abs(given).max(initial=0))
    return floats, np.asarray(absmax), "encoded" if error else "exact" if moment.absmax is None else "decoded", error


def to_theirs(values: np.ndarray, absmax: np.ndarray, place: Place) -> tuple[Stored, How, float]:
    """Returns `(stored, how, error)`: 8-bit moments stay in 8 bits, all others become float32."""
    back = np.argsort(place.axes)
    if place.plan.blocks is None:
        full = np.broadcast_to(values, place.plan.shape).transpose(back)
        floats = np.array(full, np.float32, order="C")  # np.ascontiguousarray would give a scalar an axis
        error = _error(full, floats, np.abs(full).max(initial=0))
        return Stored(floats), "encoded" if error else "exact", error
    qmap = flat.qmap(place.signed).copy()
    if place.shares_codes(flat.BLOCK, qmap):
        return Stored(flat.to_theirs(values, place.signed), absmax.reshape(-1), qmap), "exact", 0.0
    given = place.decode(values, absmax).transpose(back)
    new = Stored(*flat.encode(given, place.signed), qmap)
    return new, "encoded", _error(given, new.decoded(), flat.spread(_need(new.absmax), flat.BLOCK, given.shape))


def _error(x: np.ndarray, stored: np.ndarray, scales: Any) -> float:
    """Returns the largest change of a finite number, relative to `scales`."""
    change = np.abs(x - stored) / np.where(scales > 0, scales, 1)
    return float(np.max(change, initial=0, where=np.isfinite(x)))


def _spread(absmax: np.ndarray, blocks: Blocks, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the scale of every element."""
    if not shape:
        return absmax
    return np.repeat(absmax, blocks.size, blocks.axis).take(range(shape[blocks.axis]), blocks.axis)


def _need(x: Any) -> Any:
    assert x is not None
    return x
