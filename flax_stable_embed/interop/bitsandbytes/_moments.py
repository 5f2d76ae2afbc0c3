"""One moment of one parameter, from bitsandbytes' storage to ours and back.

Codes survive bit by bit where they mean the same on both sides: the same map, the same blocks, no transposition. In all
other cases the moment is decoded, and encoded anew if the other side stores bytes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ...ops.blockwise.blocks import Blocks
from ...optim.storage.moments import MomentName, dequantize_moment, quantize_moment
from ...optim.storage.plan import LeafPlan
from . import _blocks as flat
from ._report import How


class Stored(NamedTuple):
    """A moment as bitsandbytes stores it: uint8 with scales of the flattened tensor and a map, or floating point."""

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
    """How our state stores one moment of a parameter."""

    moment: MomentName
    signed: bool  # which of bitsandbytes' maps is its
    plan: LeafPlan
    axes: tuple[int, ...]  # those of torch's tensor, in our order

    @property
    def _stored(self):
        return self.moment.stored(self.plan.state_format)._replace(stochastic=False)

    def shares_codes(self, block_size: int, qmap: np.ndarray) -> bool:
        """Whether bytes mean the same here and there."""
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
    """`(values, absmax, how, error)`; those that are given have the shapes and dtypes of our state."""
    given = moment.decoded()
    if not place.moment.signed and given.size and given.min() < -1e-5 * np.abs(given).max():
        raise ValueError(
            f"`{place.moment.name}` is never negative, but the state that is to become it has {given.min():g}. Is it "
            "the same optimizer?"
        )
    if moment.absmax is not None and moment.qmap is not None:
        if place.shares_codes(moment.block_size, moment.qmap):
            off = np.abs(moment.qmap - flat.qmap(place.signed)).max()
            return moment.values, moment.absmax.reshape(absmax.shape), "exact", float(off)
    given = given.transpose(place.axes)
    if place.plan.blocks is not None:
        codes, scales = place.encode(given)
        error = _error(given, place.decode(codes, scales), _spread(scales, place.plan.blocks, place.plan.shape))
        return codes, scales, "encoded", error
    floats = given if values.shape == given.shape else given.mean(-1, keepdims=True)  # one number a row
    floats = floats.astype(values.dtype)
    error = _error(given, floats.astype(given.dtype), np.abs(given).max(initial=0))
    return floats, np.asarray(absmax), "encoded" if error else "exact" if moment.absmax is None else "decoded", error


def to_theirs(values: np.ndarray, absmax: np.ndarray, place: Place) -> tuple[Stored, How, float]:
    """`(what bitsandbytes stores, how, error)`: bytes of our bytes, fp32 of all else."""
    back = np.argsort(place.axes)
    if place.plan.blocks is None:
        whole = np.broadcast_to(values, place.plan.shape).transpose(back)
        floats = np.array(whole, np.float32, order="C")  # np.ascontiguousarray would give a scalar an axis
        error = _error(whole, floats, np.abs(whole).max(initial=0))
        return Stored(floats), "encoded" if error else "exact", error
    qmap = flat.qmap(place.signed).copy()
    if place.shares_codes(flat.BLOCK, qmap):
        return Stored(values, absmax.reshape(-1), qmap), "exact", 0.0
    given = place.decode(values, absmax).transpose(back)
    new = Stored(*flat.encode(given, place.signed), qmap)
    return new, "encoded", _error(given, new.decoded(), flat.spread(_need(new.absmax), flat.BLOCK, given.shape))


def _error(x: np.ndarray, stored: np.ndarray, scales: Any) -> float:
    """The largest change in parts of `scales`, over what is finite."""
    change = np.abs(x - stored) / np.where(scales > 0, scales, 1)
    return float(np.max(change, initial=0, where=np.isfinite(x)))


def _spread(absmax: np.ndarray, blocks: Blocks, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of every element."""
    if not shape:
        return absmax
    return np.repeat(absmax, blocks.size, blocks.axis).take(range(shape[blocks.axis]), blocks.axis)


def _need(x: Any) -> Any:
    assert x is not None
    return x
