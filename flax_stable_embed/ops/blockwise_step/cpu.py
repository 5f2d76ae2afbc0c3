"""The reference in cache-sized chunks, for CPU."""

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

PIECE = 1 << 18  # elements, 1 MB of float32: small enough for the caches, large enough to be split over cores


def chunked(step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = ()):
    """`plain` in a loop over pieces, in place; the array lies at `origin` of a global array of `shape`."""
    axis, size = step.blocks
    local = operands.g.shape
    if not operands.g.size:
        return plain(step, operands)
    view = _merged(local, axis)
    groups = range(axis), range(axis, axis + 1), range(axis + 1, len(local))
    scales = (view[0], step.blocks.count(local), *view[2:])
    merged_step = dataclasses.replace(step, blocks=Blocks(1, size))
    whole = operands._replace(
        g=_bits(operands.g.reshape(view)),
        p=None if operands.p is None else _bits(operands.p.reshape(view)),
        codes=tuple(c.reshape(view) for c in operands.codes),
        absmax=tuple(a.reshape(scales) for a in operands.absmax),
    )
    in_place = not step.fused and operands.g.dtype == step.dtype  # the update then overwrites the gradient
    out = whole.p if step.fused else whole.g if in_place else _bits(jnp.zeros(view, step.dtype))

    def one(at, lengths, carry):
        out, codes, absmax = carry
        before = whole._replace(codes=codes, absmax=absmax)
        before = before._replace(p=out) if step.fused else before._replace(g=out) if in_place else before
        piece = _slice(before, at, lengths, size)
        piece = piece._replace(
            g=_of_bits(piece.g, operands.g.dtype), p=None if piece.p is None else _of_bits(piece.p, operands.p.dtype)
        )
        index = (
            linear_index_of_tile(at, piece.g.shape, groups, local, origin, shape or local) if step.stochastic else None
        )
        if lengths[1] % size == 0 and operands.g.dtype == jnp.float32:
            return _write(carry, plain(merged_step, piece, index, _store_once), at, size)
        # A short last block is padded, and 16 bits are cast. The code for such moments alone rounds in another way
        # (which of two products is contracted into a sum), unless it is as the reference; in a conditional, as there.
        unchanged = (piece.p if step.fused else piece.g.astype(step.dtype), piece.codes, piece.absmax)
        always = ~(piece.absmax[0].ravel()[0] < 0)  # no scale is negative
        return _write(carry, lax.cond(always, lambda: plain(merged_step, piece, index), lambda: unchanged), at, size)

    out, codes, absmax = _loop(view, size, one, (out, whole.codes, whole.absmax))
    scales = step.blocks.absmax_shape(local)
    out = _of_bits(out, step.dtype).reshape(local)
    return out, tuple(c.reshape(local) for c in codes), tuple(a.reshape(scales) for a in absmax)


def _store_once(step: Step, out: Array, new: tuple[Array, ...], uniform: Array | None) -> Stored:
    """`store_moments`, from moments that are computed once.

    Left alone, XLA computes new moments again in each of the five loops that read them, and checks each time whether
    they are finite. It does not where a library's reduction or a conditional takes them. So scales come from the
    largest and the smallest number, sums say whether all are finite (those extremes drop NaN, jaxlib 0.10.2), and only
    where one is not `store_moments` decides.
    All that is written comes out of the conditional: else XLA could fuse a read of an array into a later write of it,
    and would copy the whole array on every turn. A branch that changed nothing of the output would let it pass by.
    """
    inside = step.blocks.axis + 1
    tops = [jnp.maximum(jnp.max(x, axis=inside), 0.0) for x in new]
    lows = [jnp.min(x, axis=inside) if moment.signed else None for x, moment in zip(new, step.moments)]
    finite = jnp.isfinite(sum(jnp.sum(jnp.sum(x, axis=inside)) for x in new))

    def of_finite():
        scales = [top if low is None else jnp.maximum(top, -low) for top, low in zip(tops, lows)]
        scales = [jnp.where(scale >= TINY, scale, 0.0) for scale in scales]
        return out, [
            (codes_of(x, jnp.expand_dims(scale, inside), moment.code, uniform if moment.stochastic else None), scale)
            for x, scale, moment in zip(new, scales, step.moments)
        ]

    return lax.cond(finite, of_finite, lambda: store_moments(step, jnp.where(finite, 0.0, out), new, uniform))


def _bits(x: Array) -> Array:
    """Numbers of 16 bits as integers: to read a piece of bfloat16, XLA on CPU would cast the whole array."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _of_bits(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _slice(operands: Operands, at, lengths, size) -> Operands:
    cut = partial(lax.dynamic_slice, start_indices=at, slice_sizes=lengths)
    at_scale, n = (at[0], at[1] // size, *at[2:]), (lengths[0], -(-lengths[1] // size), *lengths[2:])
    return operands._replace(
        g=cut(operands.g),
        p=None if operands.p is None else cut(operands.p),
        codes=tuple(cut(c) for c in operands.codes),
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
    """`carry = one(start, lengths, carry)` for pieces of about `PIECE` elements that cover `view`."""
    for starts, lengths, counts in _cut(view, size):

        def body(i, carry, starts=starts, lengths=lengths, counts=counts):
            steps = jnp.unravel_index(i, counts)
            at = tuple(np.int32(s) + k.astype(jnp.int32) * np.int32(l) for s, k, l in zip(starts, steps, lengths))
            return one(at, lengths, carry)

        carry = lax.fori_loop(0, prod(counts), body, carry) if prod(counts) > 1 else body(jnp.int32(0), carry)
    return carry


def _merged(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape as (before, blocked axis, after), without a last 1: XLA then disagrees with itself on the layout."""
    view = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    return view if view[2] > 1 else view[:2]


def _cut(view: tuple[int, ...], size: int):
    """Cuts (outer, blocked axis, inner) into grids of equal pieces of whole blocks: (starts, lengths, counts) each."""
    outer, d, *after = view
    inner = prod(after)
    if size * inner >= PIECE:
        lengths = (1, size, _near_divisor(inner, max(1, PIECE // size)))
    elif d * inner >= PIECE:
        lengths = (1, size * _near_divisor(d // size, max(1, PIECE // (size * inner))), inner)
    else:
        lengths = (_near_divisor(outer, max(1, PIECE // max(1, d * inner))), d, inner)
    return [
        tuple(zip(*grid)) for grid in itertools.product(*(_segments(n, length) for n, length in zip(view, lengths)))
    ]


def _near_divisor(n: int, limit: int) -> int:
    """The largest divisor of `n` in [limit / 2, limit], else `limit`: a last piece of its own costs a second loop."""
    return next((k for k in range(min(n, limit), limit // 2, -1) if n % k == 0), max(1, min(n, limit)))


def _segments(n: int, length: int) -> list[tuple[int, int, int]]:
    """`n` elements as (start, length, count): the whole pieces, then what is left."""
    whole, rest = divmod(n, length)
    return [s for s in ((0, length, whole), (whole * length, rest, 1)) if s[1] and s[2]]
