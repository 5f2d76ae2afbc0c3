"""The codecs with few instructions, for kernels, whose time they would otherwise take.

Codes follow the formats of `codecs.py`. What differs is arithmetic: products with a scale's reciprocal in the place of
divisions, a fourth root by logarithm, straight lines for the decades of `dynamic`. So a code can differ by one where a
number lies within a few ulp of the boundary of two.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..blockwise.codecs import TINY, Code
from ..blockwise.quantize import codes_of
from .step import Moment


class KernelCodec(NamedTuple):
    """A codec in few instructions.

    decode: codes and scales to numbers; prepare: the scale of a block to what `encode` needs of it; encode: numbers and
    that to codes, with random numbers where the moment is rounded by them.
    """

    dequantize: Callable[[Array, Array], Array]
    factor: Callable[[Array], Array]
    quantize: Callable[[Array, Array, Array | None], Array]


FourthRoot = Callable[[Array, float], Array]  # x and a factor to x^(1/4) times the factor; 0 is anything finite


def by_logarithm(x: Array, times: float) -> Array:
    """A fourth root, of which 1 ulp of the logarithm is 1e-6 levels."""
    return lax.exp2(lax.log(x) * np.float32(0.25 / np.log(2)) + np.float32(np.log2(times)))


def by_square_roots(x: Array, times: float) -> Array:
    """A fourth root as 1 / sqrt(1 / sqrt(x))."""
    return lax.rsqrt(lax.rsqrt(x)) * np.float32(times)


def kernel_codec(moment: Moment, fourth_root: FourthRoot) -> KernelCodec:
    """That of one moment, with the fourth root that costs least where it runs.

    Stochastic rounding needs both neighbors of a number, for which the reference serves.
    """
    code = moment.code
    if moment.codec == "root":
        found = _root(code, fourth_root)
    else:
        found = _dynamic(code) if moment.codec == "dynamic" else _linear(code)
    if not moment.stochastic:
        return found
    return found._replace(factor=lambda absmax: absmax, quantize=lambda x, absmax, u: codes_of(x, absmax, code, u))


def _root(code: Code, fourth_root: FourthRoot) -> KernelCodec:
    top = float(code.top)

    def dequantize_signed(codes, absmax):
        level = codes.astype(jnp.float32)
        return level * lax.abs(level) * (absmax * np.float32(1 / top**2))  # zero in blocks below 2e-34

    def quantize_signed(x, factor, _):  # factor = 127 / sqrt(absmax)
        return _low_byte(x * lax.rsqrt(jnp.maximum(lax.abs(x), TINY)) * factor, code)

    def dequantize_unsigned(codes, absmax):
        square = jnp.square(codes.astype(jnp.float32) * np.float32(1 / top))  # so that no small block underflows
        return square * square * absmax

    def quantize_unsigned(x, factor, _):  # factor = 4 / absmax
        level = fourth_root(x * factor, top / 2**0.5)
        return _low_byte(jnp.where(x >= TINY, jnp.maximum(level, 1.0), 0.0), code)

    if code.bottom:
        return KernelCodec(
            dequantize_signed, lambda absmax: _live(absmax, lambda s: top * lax.rsqrt(s)), quantize_signed
        )
    return KernelCodec(dequantize_unsigned, _reciprocal, quantize_unsigned)


def _linear(code: Code) -> KernelCodec:
    top = np.float32(code.top)

    def dequantize(codes, absmax):
        return codes.astype(jnp.float32) * np.float32(1 / top) * absmax

    def quantize(x, factor, _):
        x = x if code.bottom else jnp.maximum(x, 0.0)
        return _low_byte(x * factor * np.float32(top / 4), code)

    return KernelCodec(dequantize, _reciprocal, quantize)


def _dynamic(code: Code) -> KernelCodec:
    """Inside of a decade levels are evenly spaced, and denser from decade to decade: the level of a number is the least
    of seven straight lines, and the number of a level the largest of the lines that invert them.

    Between two levels the boundary is halfway, a whole number on these lines, but to the first level of a decade, whose
    neighbor lies closer below, and to the level that stands for 1.
    """
    shift = 0 if code.bottom else 1
    decades = range(shift, shift + 7)
    unit = {d: 10.0 ** (d - shift - 6) for d in decades}  # the upper end of decade d
    to_level = [(2**d / 0.9 / unit[d] / 4, 2**d * (1 - 1 / 9) - shift) for d in decades]
    to_number = [(0.9 * unit[d] / 2**d, unit[d] * (0.1 + 0.9 * ((0.5 + shift) / 2**d - 1))) for d in decades]
    lowest = 0.5 * unit[shift] * (0.1 + 0.45 / 2**shift)  # halfway from zero to the first level
    first = 4 * to_level[0][0] * lowest + to_level[0][1]
    last = code.top - 0.25

    def dequantize(codes, absmax):
        level = codes.astype(jnp.int32).astype(jnp.float32) - np.float32(code.zero)
        magnitude = lax.abs(level)
        n = _best(jnp.maximum, magnitude, to_number)
        n = jnp.where(magnitude == 0, 0.0, jnp.where(magnitude == code.top, 1.0, n)) * absmax
        return jnp.where(level < 0, -n, n) if code.bottom else n

    def quantize(x, factor, _):  # factor = 4 / absmax
        n = (lax.abs(x) if code.bottom else jnp.maximum(x, 0.0)) * factor
        line = _best(jnp.minimum, n, to_level)
        whole = line + np.float32(shift)
        power = lax.bitcast_convert_type(whole, jnp.int32) & np.int32(-(2**23))
        start = whole - lax.bitcast_convert_type(power, jnp.float32) < 0.2
        level = _rounded(line - jnp.where(start, 1.5, 0.5))
        level = jnp.where(line < 2, (line > first).astype(jnp.int32), level)
        level = jnp.where(line > last, code.top, level)
        if code.bottom:
            level = jnp.where(x < 0, -jnp.minimum(level, code.bottom), level)
        return (level + code.zero).astype(code.dtype)

    return KernelCodec(dequantize, _reciprocal, quantize)


def _reciprocal(absmax: Array) -> Array:
    """4 / absmax: of the largest floats, 1 / absmax would be too small for one. (Below 2^-125 it is cut at 2^127.)"""
    return _live(absmax, lambda scale: jnp.minimum(4 / scale, np.float32(2.0**127)))


def _best(choose: Callable, x: Array, lines: list[tuple[float, float]]) -> Array:
    """The largest or the least of straight lines (slope, intercept) at x."""
    values = [x * np.float32(slope) + np.float32(intercept) for slope, intercept in lines]
    return reduce(choose, values)


def _live(absmax: Array, f: Callable[[Array], Array]) -> Array:
    """`f` of the scales above zero, and zero for the others."""
    return jnp.where(absmax > 0, f(jnp.maximum(absmax, TINY)), 0.0)


def _low_byte(level: Array, code: Code) -> Array:
    """A level as a byte."""
    return lax.bitcast_convert_type(level + ROUNDER, jnp.int32).astype(code.dtype)


def _rounded(level: Array) -> Array:
    """A level as int32, rounded half to even: the last bits of a larger float."""
    return lax.bitcast_convert_type(level + ROUNDER, jnp.int32) - ROUNDER.view(np.int32)


ROUNDER = np.float32(1.5 * 2**23)  # of which the last byte is zero


def without_overflow(new: tuple[Array, ...]) -> list[Array]:
    """`step.without_overflow` with one test for all moments: of the sum of their magnitudes."""
    finite = sum(map(lax.abs, new)) < jnp.inf
    return [jnp.where(finite, x, 0.0) for x in new]


def magnitude_of(x: Array, moment: Moment) -> Array:
    """What counts for the scale."""
    return lax.abs(x) if moment.code.bottom else x
