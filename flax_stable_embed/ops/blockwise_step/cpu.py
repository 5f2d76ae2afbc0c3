"""Runs the reference in chunks that fit the caches, for CPU.

XLA on CPU would run the reference as several loops that each read the full arrays from memory. Here one loop takes a
chunk of full blocks at a time, computes its step by the reference, and writes the results in place: over the parameter
(or the gradient, if the step returns an update), the codes and the scales.

Arrays of up to `SMALL` elements take the reference as it is.

Layout: the array is viewed as (before, blocked axis, after). A loop over a sharded axis would gather it, so on a mesh
the loop runs on the shard of each device (`per_shard.py`) if shardings are known, and else not at all.

What limits it: arithmetic, the roots and divisions of the codecs. XLA splits each chunk over the cores.
"""

import dataclasses
import itertools
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..blockwise.blocks import Blocks
from ..blockwise.codecs import TINY
from ..blockwise.quantize import codes_of, split
from ..counter_random import linear_index_of_tile
from .reference import Stored, needs_index, partitioned, plain
from .step import Operands, Step, without_overflow

CHUNK = 1 << 18  # elements, 1 MB of float32: small enough for the caches, large enough to be split over cores
SMALL = 1 << 16  # elements up to which the reference is as fast, and compiles in half the time


class Place(NamedTuple):
    """Where a chunk starts in the view, along each axis."""

    of_elements: tuple[Any, ...]
    of_scales: tuple[Any, ...]


def run(step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = ()):
    """Runs the step in a loop over chunks, in place.

    Args:
        step: Everything static about the step.
        operands: The arrays, or their shards on one device.
        origin: Where the shard starts in the global array, along each axis; empty if it starts at zero.
        shape: The shape of the global array; empty if `operands` are the global arrays.
    """
    axis, size = step.blocks
    local = operands.g.shape
    if operands.g.size <= SMALL:
        return partitioned(step, operands, origin, shape)
    view = prod(local[:axis]), local[axis], prod(local[axis + 1 :])
    groups = range(axis), range(axis, axis + 1), range(axis + 1, len(local))
    view = view if view[2] > 1 else view[:2]  # with a last axis of 1, XLA does not agree with itself on the layout
    scales = (view[0], step.blocks.count(local), *view[2:])
    merged_step = dataclasses.replace(step, blocks=Blocks(1, size))
    arrays = operands._replace(
        g=_bits(operands.g.reshape(view)),
        p=None if operands.p is None else _bits(operands.p.reshape(view)),
        remainder=None if operands.remainder is None else operands.remainder.reshape(view),
        codes=tuple(c.reshape(view) for c in operands.codes),
        absmax=tuple(a.reshape(scales) for a in operands.absmax),
    )
    in_place = not step.fused and operands.g.dtype == step.dtype  # the update then overwrites the gradient
    is_split = step.fused and step.split is not None
    out: Any = arrays.g if in_place else _bits(jnp.zeros(view, step.dtype))
    if step.fused:
        out = (arrays.p, arrays.remainder) if is_split else arrays.p

    def one(at, lengths, carry):
        out, codes, absmax = carry
        before = arrays._replace(codes=codes, absmax=absmax)
        if is_split:
            before = before._replace(p=out[0], remainder=out[1])
        else:
            before = before._replace(p=out) if step.fused else before._replace(g=out) if in_place else before
        chunk = _slice(before, at, lengths, size)
        chunk = chunk._replace(
            g=_of_bits(chunk.g, operands.g.dtype), p=None if chunk.p is None else _of_bits(chunk.p, operands.p.dtype)
        )
        index = None
        if needs_index(step):
            index = linear_index_of_tile(at.of_elements, chunk.g.shape, groups, local, origin, shape or local)
        old: Any = chunk.g.astype(step.dtype)
        if step.fused:
            old = (chunk.p, chunk.remainder) if is_split else chunk.p
        unchanged = (old, chunk.codes, chunk.absmax)
        if lengths[1] % size == 0 and operands.g.dtype == jnp.float32 and not is_split:
            split_again = [split(x, merged_step.blocks) for x in (unchanged[0], *chunk.codes)]
            stays = split_again[0], list(zip(split_again[1:], chunk.absmax))
            return _write(carry, plain(merged_step, chunk, index, partial(_store_once, stays)), at)
        # A short last block is padded, and 16-bit numbers are cast. As a part of the loop, such a chunk would round
        # differently from the reference, because XLA contracts another of two products into a sum. Inside of a
        # conditional it is compiled like the reference.
        always = ~(chunk.absmax[0].ravel()[0] < 0)  # no scale is negative
        return _write(carry, lax.cond(always, lambda: plain(merged_step, chunk, index), lambda: unchanged), at)

    out, codes, absmax = _loop(view, size, one, (out, arrays.codes, arrays.absmax))
    scales = step.blocks.absmax_shape(local)
    parts = [_of_bits(x, dtype).reshape(local) for x, dtype in zip(out if is_split else [out], step.outputs)]
    return (
        tuple(parts) if is_split else parts[0],
        tuple(c.reshape(local) for c in codes),
        tuple(a.reshape(scales) for a in absmax),
    )


def _store_once(stays: Stored, step: Step, out: Array, new: tuple[Array, ...], numbers: Array | None) -> Stored:
    """Does what `store_moments` does, and computes the new moments once.

    By default XLA computes new moments again in each of the loops that read them. It does not if a reduction of its
    library or a conditional reads them.

    Every array that is written comes out of the conditional. Otherwise XLA could fuse a read of an array into a later
    write of it, and would copy the full array in every iteration. The condition is always true, which XLA cannot know.
    The other branch returns `stays`, the chunk before the step.
    """
    inside = step.blocks.axis + 1
    new = without_overflow(new)
    scales = [jnp.max(x, axis=inside) for x in new]
    scales = [
        jnp.maximum(top, -jnp.min(x, axis=inside) if moment.signed else 0.0)
        for top, x, moment in zip(scales, new, step.moments)
    ]
    scales = [jnp.where(scale >= TINY, scale, 0.0) for scale in scales]

    def encoded():
        each = [None if moment.rounding == "nearest" else numbers for moment in step.moments]
        parts = zip(new, scales, step.moments, each)
        return out, [(codes_of(x, jnp.expand_dims(scale, inside), m.code, n), scale) for x, scale, m, n in parts]

    return lax.cond(~(scales[0].ravel()[0] < 0), encoded, lambda: stays)


def _bits(x: Array) -> Array:
    """Returns 16-bit floats as integers. To read a chunk of bfloat16, XLA on CPU would cast the full array."""
    is_half = x.dtype.itemsize == 2 and jnp.issubdtype(x.dtype, jnp.floating)
    return lax.bitcast_convert_type(x, jnp.uint16) if is_half else x


def _of_bits(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


# No index is negative. JAX would add the length to negative ones, which is three operations more for every array.
_slice_at = partial(lax.dynamic_slice, allow_negative_indices=False)
_update_at = partial(lax.dynamic_update_slice, allow_negative_indices=False)


def _slice(operands: Operands, at: Place, lengths: tuple[int, ...], size: int) -> Operands:
    chunk_of = partial(_slice_at, start_indices=at.of_elements, slice_sizes=lengths)
    n = (lengths[0], -(-lengths[1] // size), *lengths[2:])
    return operands._replace(
        g=chunk_of(operands.g),
        p=None if operands.p is None else chunk_of(operands.p),
        remainder=None if operands.remainder is None else chunk_of(operands.remainder),
        codes=tuple(chunk_of(c) for c in operands.codes),
        absmax=tuple(_slice_at(a, at.of_scales, n) for a in operands.absmax),
    )


def _write(carry, results, at: Place):
    (out, codes, absmax), (new_out, new_codes, new_absmax) = carry, results
    return (
        jax.tree.map(lambda x, new: _update_at(x, _bits(new), at.of_elements), out, new_out),
        tuple(_update_at(c, x, at.of_elements) for c, x in zip(codes, new_codes)),
        tuple(_update_at(a, x, at.of_scales) for a, x in zip(absmax, new_absmax)),
    )


def _loop(view, size, one, carry):
    """Runs `carry = one(place, lengths, carry)` for chunks of about `CHUNK` elements that cover `view`."""
    for starts, lengths, counts in _chunks(view, size):

        def body(i, carry, starts=starts, lengths=lengths, counts=counts):
            return one(_place(i, starts, lengths, counts, size), lengths, carry)

        carry = lax.fori_loop(0, prod(counts), body, carry) if prod(counts) > 1 else body(jnp.int32(0), carry)
    return carry


def _place(i: Array, starts: tuple[int, ...], lengths: tuple[int, ...], counts: tuple[int, ...], size: int) -> Place:
    """Returns where chunk `i` of a grid of equal chunks starts.

    XLA repeats this arithmetic in every loop that reads or writes a chunk, so it has as few operations as possible.
    """
    elements, scales, rest = [], [], i
    for axis in reversed(range(len(starts))):
        start, length, count = starts[axis], lengths[axis], counts[axis]
        is_last = prod(counts[: axis + 1]) == count  # all axes before have one chunk
        k = np.int32(0) if count == 1 else rest if is_last else lax.rem(rest, np.int32(count))
        rest = rest if count == 1 or is_last else lax.div(rest, np.int32(count))
        elements.append(_start(k, start, length))
        scales.append(_start(k, start // size, length // size) if axis == 1 else elements[-1])
    return Place(tuple(reversed(elements)), tuple(reversed(scales)))


def _start(k: Any, start: int, length: int) -> Any:
    scaled = k if length == 1 else k * np.int32(length)
    return scaled + np.int32(start) if start else scaled


def _chunks(view: tuple[int, ...], size: int):
    """Returns grids of equal chunks of full blocks that cover the view: (starts, lengths, counts) of each grid."""
    outer, d, *after = view
    inner = prod(after)
    if size * inner >= CHUNK:
        lengths = (1, size, _near_divisor(inner, max(1, CHUNK // size)))
    elif d * inner >= CHUNK:
        lengths = (1, size * _near_divisor(d // size, max(1, CHUNK // (size * inner))), inner)
    else:
        lengths = (_near_divisor(outer, max(1, CHUNK // max(1, d * inner))), d, inner)
    segments = []  # of each axis, as (start, length, count): the chunks of equal length, then the rest
    for n, length in zip(view, lengths):
        count, rest = divmod(n, length)
        segments.append([s for s in ((0, length, count), (count * length, rest, 1)) if s[1] and s[2]])
    return [tuple(zip(*grid)) for grid in itertools.product(*segments)]


def _near_divisor(n: int, limit: int) -> int:
    """Returns the largest divisor of `n` in [limit / 2, limit], else `limit`. A rest would need a second loop."""
    return next((k for k in range(min(n, limit), limit // 2, -1) if n % k == 0), max(1, min(n, limit)))
