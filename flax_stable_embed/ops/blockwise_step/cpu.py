"""Runs the reference in chunks that fit the caches, for CPU.

XLA on CPU would run the reference as several loops that each read the full arrays from memory. Here one loop takes a
chunk of full blocks at a time, computes its step by the reference, and writes the results in place: over the parameter
(or the gradient, if the step returns an update), the codes and the scales.

Layout: the array is viewed as (before, blocked axis, after). A loop over a sharded axis would gather it, so on a mesh
the loop runs on the shard of each device (`per_shard.py`) if shardings are known, and else not at all.

What limits it: arithmetic, the roots and divisions of the codecs. XLA splits each chunk over the cores.
"""

import dataclasses
import itertools
from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..blockwise.blocks import Blocks
from ..blockwise.codecs import TINY
from ..blockwise.quantize import codes_of
from ..counter_random import linear_index_of_tile
from .reference import Stored, plain, store_moments
from .step import Operands, Step

CHUNK = 1 << 18  # elements, 1 MB of float32: small enough for the caches, large enough to be split over cores


def run(step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = ()):
    """Runs `plain` in a loop over chunks, in place.

    Args:
        step: Everything static about the step.
        operands: The arrays, or their shards on one device.
        origin: Where the shard starts in the global array, along each axis; empty if it starts at zero.
        shape: The shape of the global array; empty if `operands` are the global arrays.
    """
    axis, size = step.blocks
    local = operands.g.shape
    if not operands.g.size:
        return plain(step, operands)
    view = prod(local[:axis]), local[axis], prod(local[axis + 1 :])
    view = view if view[2] > 1 else view[:2]  # with a last axis of 1, XLA does not agree with itself on the layout
    groups = range(axis), range(axis, axis + 1), range(axis + 1, len(local))
    scales = (view[0], step.blocks.count(local), *view[2:])
    merged_step = dataclasses.replace(step, blocks=Blocks(1, size))
    arrays = operands._replace(
        g=_bits(operands.g.reshape(view)),
        p=None if operands.p is None else _bits(operands.p.reshape(view)),
        codes=tuple(c.reshape(view) for c in operands.codes),
        absmax=tuple(a.reshape(scales) for a in operands.absmax),
    )
    in_place = not step.fused and operands.g.dtype == step.dtype  # the update then overwrites the gradient
    out = arrays.p if step.fused else arrays.g if in_place else _bits(jnp.zeros(view, step.dtype))

    def one(at, lengths, carry):
        out, codes, absmax = carry
        before = arrays._replace(codes=codes, absmax=absmax)
        before = before._replace(p=out) if step.fused else before._replace(g=out) if in_place else before
        chunk = _slice(before, at, lengths, size)
        chunk = chunk._replace(
            g=_of_bits(chunk.g, operands.g.dtype), p=None if chunk.p is None else _of_bits(chunk.p, operands.p.dtype)
        )
        index = None
        if step.rounding != "nearest":
            index = linear_index_of_tile(at, chunk.g.shape, groups, local, origin, shape or local)
        if lengths[1] % size == 0 and operands.g.dtype == jnp.float32:
            return _write(carry, plain(merged_step, chunk, index, _store_once), at, size)
        # A short last block is padded, and 16-bit numbers are cast. As a part of the loop, such a chunk would round
        # differently from the reference, because XLA contracts another of two products into a sum. Inside of a
        # conditional it is compiled like the reference.
        unchanged = (chunk.p if step.fused else chunk.g.astype(step.dtype), chunk.codes, chunk.absmax)
        always = ~(chunk.absmax[0].ravel()[0] < 0)  # no scale is negative
        return _write(carry, lax.cond(always, lambda: plain(merged_step, chunk, index), lambda: unchanged), at, size)

    out, codes, absmax = _loop(view, size, one, (out, arrays.codes, arrays.absmax))
    scales = step.blocks.absmax_shape(local)
    out = _of_bits(out, step.dtype).reshape(local)
    return out, tuple(c.reshape(local) for c in codes), tuple(a.reshape(scales) for a in absmax)


def _store_once(step: Step, out: Array, new: tuple[Array, ...], numbers: Array | None) -> Stored:
    """Does what `store_moments` does, and computes the new moments once.

    By default XLA computes new moments again in each of the five loops that read them, and checks each time whether
    they are finite. It does not if a reduction of its library or a conditional reads them. So scales come from the
    largest and the smallest number. Sums tell whether all are finite, because those extremes drop NaN (jaxlib 0.10.2).
    Only if one is not, `store_moments` decides.

    Every array that is written comes out of the conditional. Otherwise XLA could fuse a read of an array into a later
    write of it, and would copy the full array in every iteration. Both branches change the output, because XLA would
    move it past a branch that does not.
    """
    inside = step.blocks.axis + 1
    tops = [jnp.maximum(jnp.max(x, axis=inside), 0.0) for x in new]
    lows = [jnp.min(x, axis=inside) if moment.signed else None for x, moment in zip(new, step.moments)]
    finite = jnp.isfinite(sum(jnp.sum(jnp.sum(x, axis=inside)) for x in new))

    def of_finite():
        scales = [top if low is None else jnp.maximum(top, -low) for top, low in zip(tops, lows)]
        scales = [jnp.where(scale >= TINY, scale, 0.0) for scale in scales]
        return out, [
            (
                codes_of(
                    x, jnp.expand_dims(scale, inside), moment.code, None if moment.rounding == "nearest" else numbers
                ),
                scale,
            )
            for x, scale, moment in zip(new, scales, step.moments)
        ]

    return lax.cond(finite, of_finite, lambda: store_moments(step, jnp.where(finite, 0.0, out), new, numbers))


def _bits(x: Array) -> Array:
    """Returns 16-bit numbers as integers. To read a chunk of bfloat16, XLA on CPU would cast the full array."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _of_bits(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _slice(operands: Operands, at, lengths, size) -> Operands:
    chunk_of = partial(lax.dynamic_slice, start_indices=at, slice_sizes=lengths)
    at_scale, n = (at[0], at[1] // size, *at[2:]), (lengths[0], -(-lengths[1] // size), *lengths[2:])
    return operands._replace(
        g=chunk_of(operands.g),
        p=None if operands.p is None else chunk_of(operands.p),
        codes=tuple(chunk_of(c) for c in operands.codes),
        absmax=tuple(lax.dynamic_slice(a, at_scale, n) for a in operands.absmax),
    )


def _write(carry, results, at, size):
    (out, codes, absmax), (new_out, new_codes, new_absmax) = carry, results
    at_scale = (at[0], at[1] // size, *at[2:])
    return (
        lax.dynamic_update_slice(out, _bits(new_out), at),
        tuple(lax.dynamic_update_slice(c, x, at) for c, x in zip(codes, new_codes)),
        tuple(lax.dynamic_update_slice(a, x, at_scale) for a, x in zip(absmax, new_absmax)),
    )


def _loop(view, size, one, carry):
    """Runs `carry = one(start, lengths, carry)` for chunks of about `CHUNK` elements that cover `view`."""
    for starts, lengths, counts in _chunks(view, size):

        def body(i, carry, starts=starts, lengths=lengths, counts=counts):
            steps = jnp.unravel_index(i, counts)
            at = tuple(np.int32(s) + k.astype(jnp.int32) * np.int32(l) for s, k, l in zip(starts, steps, lengths))
            return one(at, lengths, carry)

        carry = lax.fori_loop(0, prod(counts), body, carry) if prod(counts) > 1 else body(jnp.int32(0), carry)
    return carry


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
