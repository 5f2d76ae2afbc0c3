"""Encodes a number in [-1, 1] (signed) or [0, 1] (unsigned) as one byte, by one of three codecs.

A code is a *level* from 0 to `top`, with a sign, modulo 256. So byte 0 stands for exactly zero in every codec, and an
array of zero bytes is an array of zeros. A level stands for a magnitude, `value(level)`, which grows from 0 to exactly
1:

    root     signed    (level / 127)^2
             unsigned  (level / 255)^4
    dynamic  signed    10^(e-6) (0.1 + 0.9 (j + 1/2) / 2^e)    with level = 2^e + j
             unsigned  10^(e-7) (0.1 + 0.9 (j + 1/2) / 2^e)    with level + 1 = 2^e + j
    linear   signed    level / 127
             unsigned  level / 255

Nearest rounding: `root` rounds the level, half to even. `dynamic` and `linear` compare with the float32 midpoints of
neighboring values, and a tie goes to the lower code (for negative numbers, to the larger magnitude).
Unsigned `root`, and every unsigned codec with dithered or stochastic rounding, uses level 0 for zero only. If the
second moment became 0 while the first did not, the update would blow up. Unsigned `dynamic` and `linear` to nearest
round small numbers to 0, as bitsandbytes does.
All of it is arithmetic. There is no table, no gather and no search, so it vectorizes on every backend.

Sources: `dynamic` is the map of bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861, sec. 1.3), equal bit for bit in
float32. Its signed codes are bitsandbytes' minus 127, modulo 256. `linear` is that paper's ablation. `root` is ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The smallest normal float32. Some backends flush smaller numbers to zero, so here all backends take them as zero.
TINY = float(np.finfo(np.float32).tiny)


class Code(NamedTuple):
    """One codec for signed or for unsigned numbers; `value`, `nearest` and `below` work on magnitudes.

    Always: code = level for x >= 0, -level modulo 256 for x < 0; level <= top, and <= bottom for x < 0;
            value(0) == 0 and value(top) == 1 exactly; value(level) grows with the level.
    """

    dtype: np.dtype
    bottom: int
    top: int
    smallest_level: int  # of a number above zero, rounded to nearest
    value: Callable[[Array], Array]  # int32 level -> float32 magnitude
    nearest: Callable[[Array, Array], Array]  # float32 magnitude, is it negative -> int32 level
    below: Callable[[Array], Array]  # float32 magnitude -> the highest level whose value does not exceed it


def _compare_with_midpoint(value, boundary: Array, n: Array, negative: Array) -> Array:
    """Returns `boundary - 1` or `boundary`, by the float32 midpoint of their values; ties go to the lower code."""
    midpoint = (value(boundary - 1) + value(boundary)) * 0.5
    return boundary - 1 + ((n > midpoint) | (negative & (n == midpoint))).astype(jnp.int32)


def _step_down(value, level: Array, n: Array) -> Array:
    """Corrects a level whose value exceeds `n` because of rounding."""
    return level - (value(level) > n).astype(jnp.int32)


def _nearest_integer(x: Array) -> Array:
    """Rounds float32 in [0, 2^22] to int32, half to even, by the bits of 2^23 + x; XLA's cast checks the range."""
    integer = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)  # first, because XLA may contract a sum with a product
    return lax.bitcast_convert_type(integer + np.float32(2.0**23), jnp.int32) - np.int32(0x4B000000)


def _root(signed: bool) -> Code:
    top = 127 if signed else 255

    def value(level):
        s = level.astype(jnp.float32) * np.float32(1 / top)  # exactly 1 at the top
        return s * s if signed else (s * s) * (s * s)

    def scaled(n):
        return (lax.sqrt(n) if signed else lax.sqrt(lax.sqrt(n))) * np.float32(top)

    def nearest(n, negative):
        del negative
        return _nearest_integer(scaled(n))

    def below(n):
        return _step_down(value, scaled(n).astype(jnp.int32), n)

    dtype = np.dtype(np.int8 if signed else np.uint8)
    return Code(dtype, top if signed else 0, top, 0 if signed else 1, value, nearest, below)


def _linear(signed: bool) -> Code:
    top = 127 if signed else 255
    unit = np.uint32(np.float32(1 / top) * 2.0**31)  # exact: float32(1 / top) is a multiple of 2^-31

    def value(level):
        # The product is one of integers, exact and rounded once by its conversion, because XLA could contract a float
        # product into the sum of a midpoint, which would then round once and not twice. 2^-31 is subtracted from the
        # exponent, because XLA would multiply the scale by a factor of 2^-31 first, and the scale may underflow.
        product = (level.astype(jnp.uint32) * unit).astype(jnp.float32)
        bits = lax.bitcast_convert_type(product, jnp.int32) - (31 << 23)
        return jnp.where(level == 0, 0.0, lax.bitcast_convert_type(bits, jnp.float32))

    def nearest(n, negative):
        boundary = jnp.minimum((n * np.float32(top)).astype(jnp.int32) + 1, top)
        return _compare_with_midpoint(value, boundary, n, negative)

    def below(n):
        return _step_down(value, (n * np.float32(top)).astype(jnp.int32), n)

    dtype = np.dtype(np.int8 if signed else np.uint8)
    return Code(dtype, top if signed else 0, top, 0, value, nearest, below)


_DECADES = 7
_TENTH = 13421773 * 8  # float32(0.1) in units of 2^-30
_SPAN = 15099494  # float32(1 - float32(0.1)), the length of a decade, in units of 2^-24


def _by_decade(e: Array, first: int, table: Callable[[int], float]) -> Array:
    """Returns `table(e)` for e in first..first + 6, by selects between seven constants."""
    out = jnp.full_like(e, np.float32(table(first)), dtype=jnp.float32)
    for k in range(first + 1, first + _DECADES):
        out = jnp.where(e >= k, np.float32(table(k)), out)
    return out


def _dynamic_bound(k: Array) -> Array:
    """Returns the k-th of 129 evenly spaced points in [0.1, 1], rounded to float32 once, as by a fused multiply-add.

    Points of the lower half are counted from 0.1, those of the upper half from 1, in exact integers of 2^-30.
    """
    from_below = k * (_SPAN // 2) + _TENTH
    from_above = (1 << 30) - (128 - k) * (_SPAN // 2)
    return jnp.where(k < 64, from_below, from_above).astype(jnp.float32) * np.float32(2.0**-30)


def _dynamic(signed: bool) -> Code:
    top, first = (128, 0) if signed else (255, 1)  # `first`: the exponent of the lowest decade
    shift = 0 if signed else 1  # level + shift = 2^e + j in decade e

    def value(level):
        bits = lax.bitcast_convert_type((level + shift).astype(jnp.float32), jnp.int32)
        e = (bits >> 23) - 127
        k = (bits >> 16) & 127  # j scaled to 128 points per decade, from the top of the mantissa
        middle = (_dynamic_bound(k) + _dynamic_bound(k + (128 >> jnp.clip(e, 0, 7)))) * 0.5
        inside = _by_decade(e, first, lambda d: 10.0 ** (d - first - 6)) * middle
        return jnp.where(level == 0, 0.0, jnp.where(level == top, 1.0, inside))

    def nearest(n, negative):
        e = jnp.full_like(n, first, dtype=jnp.int32)
        for d in range(first + 1, first + _DECADES):
            e = e + (n >= np.float32(10.0 ** (d - first - 7))).astype(jnp.int32)
        per_unit = _by_decade(e, first, lambda d: 2**d / 0.9 * 10.0 ** (6 + first - d))
        offset = _by_decade(e, first, lambda d: 0.5 - 2**d / 9)
        j = jnp.maximum(n * per_unit + offset, 0.0).astype(jnp.int32)  # the bound nearest to n in its decade
        boundary = jnp.clip((1 << e) + j - shift, 1, jnp.where(negative, top - 1, top) if signed else top)
        return _compare_with_midpoint(value, boundary, n, negative)

    def below(n):
        return _step_down(value, nearest(n, jnp.zeros_like(n, dtype=bool)), n)

    return Code(np.dtype(np.uint8), 127 if signed else 0, top, 0, value, nearest, below)


Codec = Literal["root", "dynamic", "linear"]
CODECS: dict[str, Callable[[bool], Code]] = {"root": _root, "dynamic": _dynamic, "linear": _linear}


def encode(magnitude: Array, negative: Array, code: Code, uniform: Array | None = None) -> Array:
    """Returns the codes of numbers.

    Args:
        magnitude: float32 in [0, 1], either 0 or at least `TINY`.
        negative: Whether each number is negative, for codecs of signed numbers.
        code: The codec.
        uniform: float32 in [0, 1) of the same shape, for dithered and stochastic rounding. A magnitude is rounded up
            where (magnitude - lower) / (upper - lower) is larger, so that the mean of the decoded values is the
            number. If None, rounds to nearest.
    """
    if uniform is None:
        level = code.nearest(magnitude, negative)
    else:
        level = jnp.minimum(code.below(magnitude), code.top - 1)
        lower, upper = code.value(level), code.value(level + 1)
        level = level + ((magnitude - lower) > uniform * (upper - lower)).astype(jnp.int32)
    if code.smallest_level or (uniform is not None and not code.bottom):
        level = jnp.where(magnitude >= TINY, jnp.maximum(level, 1), 0)
    if not code.bottom:
        return level.astype(code.dtype)
    below_zero = level if code.bottom == code.top else jnp.minimum(level, code.bottom)
    return jnp.where(negative, -below_zero, level).astype(code.dtype)


def decode(codes: Array, code: Code) -> Array:
    """Returns the float32 numbers in [-1, 1] or [0, 1] that `codes` stand for."""
    level = codes.astype(jnp.int32)
    if not code.bottom:
        return code.value(level)
    if code.dtype == np.uint8:
        level = jnp.where(level > code.top, level - 256, level)
    magnitude = code.value(lax.abs(level))
    return jnp.where(level < 0, -magnitude, magnitude)


def table(codec: str, signed: bool) -> np.ndarray:
    """Returns the numbers that codes 0..255 (or -128..127) stand for, float32, ordered by code."""
    code = CODECS[codec](signed)
    info = np.iinfo(code.dtype)
    codes = np.arange(info.min, info.max + 1).astype(code.dtype)
    return np.asarray(jax.jit(partial(decode, code=code))(codes))
