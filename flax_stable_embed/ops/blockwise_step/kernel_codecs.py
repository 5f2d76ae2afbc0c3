"""Fast versions of the codecs for use inside kernels, where the reference versions would dominate the run time.

Codes follow the formats of `codecs.py`. Only the arithmetic differs: products with the reciprocal of a scale instead of
divisions, a fourth root by logarithm, straight lines for the decades of `dynamic`. So a code can differ by one from the
reference if a number is within a few ulp of the boundary between two codes.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..blockwise.codecs import TINY, Code
from ..blockwise.quantize import codes_of
from ..counter_random import Rounding, as_fraction
from .step import Moment


class KernelCodec(NamedTuple):
    """A codec in few instructions.

    dequantize: Called as `dequantize(codes, absmax)`, returns numbers.
    factor: Called as `factor(absmax)`, returns the factor that `quantize` multiplies by. It is computed once per block.
    quantize: Called as `quantize(x, factor, bits)`, returns codes. `bits` are random bits, uint32, for a moment with
        dithered or stochastic rounding, else None.
    """

    dequantize: Callable[[Array, Array], Any]
    factor: Callable[[Array], Array]
    quantize: Callable[..., Array]


FourthRoot = Callable[[Array, float], Array]  # (x, times) -> times * x^(1/4); of 0, any finite number


def by_logarithm(x: Array, times: float) -> Array:
    """Returns a fourth root. One ulp of the logarithm is 1e-6 levels."""
    return lax.exp2(lax.log(x) * np.float32(0.25 / np.log(2)) + np.float32(np.log2(times)))


def by_square_roots(x: Array, times: float) -> Array:
    """Returns a fourth root as 1 / sqrt(1 / sqrt(x))."""
    return lax.rsqrt(lax.rsqrt(x)) * np.float32(times)


def kernel_codec(moment: Moment, fourth_root: FourthRoot) -> KernelCodec:
    """Builds the codec of one moment, with the fourth root that is cheapest on the device.

    Dithered and stochastic rounding need both neighbors of a number, which the reference computes, except for `root`.
    """
    code = moment.code
    if moment.codec == "root":
        return _root(code, fourth_root, moment.rounding)
    found = _dynamic(code) if moment.codec == "dynamic" else _linear(code)
    if moment.rounding == "nearest":
        return found

    def quantize(x: Array, absmax: Array, bits: Array) -> Array:
        return codes_of(x, absmax, code, as_fraction(moment.rounding, bits))

    return found._replace(factor=lambda absmax: absmax, quantize=quantize)


def _root(code: Code, fourth_root: FourthRoot, rounding: Rounding) -> KernelCodec:
    """Builds the codec of square roots (signed) or fourth roots.

    Dithered and stochastic rounding round a number up if it is above `lower + u * (upper - lower)`, from both neighbors
    of its level k in units of the last one: k^2 + u (2k + 1), or k^4 + u ((k + 1)^4 - k^4).
    """
    top = float(code.top)
    to_nearest = rounding == "nearest"

    def dequantize_signed(codes, absmax):
        level = _float32(codes)
        return level * lax.abs(level) * (absmax * np.float32(1 / top**2))  # zero if the scale is below 2e-34

    def quantize_signed(x, factor, bits):  # factor = 127 / sqrt(absmax)
        level = x * lax.rsqrt(jnp.maximum(lax.abs(x), TINY)) * factor
        if not to_nearest:
            u, magnitude = as_fraction(rounding, bits), lax.abs(level)
            k = lax.floor(jnp.minimum(magnitude, np.float32(top - 1)))
            k = jnp.where(jnp.square(magnitude) > jnp.square(k) + u * (2 * k + 1), k + 1, k)
            level = jnp.where(x < 0, -k, k)
        return _low_byte(level, code)

    def dequantize_unsigned(codes, absmax):
        square = jnp.square(_float32(codes) * np.float32(1 / top))  # two factors, so that none underflows
        return square * square * absmax

    def quantize_unsigned(x, factor, bits):  # factor = 4 / absmax
        n = x * factor
        level = fourth_root(n, top / 2**0.5)
        if to_nearest:
            return _low_byte(jnp.where(x >= TINY, jnp.maximum(level, 1.0), 0.0), code)
        # With y = k + 1/2 the distance of the neighbors is y (4 y^2 + 1), and halfway between them is y^4 + 3/2 y^2 +
        # 1/16. The last term is left out, because it is at most 1/240 of the distance. Bits whose first one is flipped
        # are 2^32 (u - 1/2) if they are read as signed integers.
        k = lax.floor(jnp.minimum(level, np.float32(top - 1)))
        y = k + 0.5
        square = y * y
        offset = lax.bitcast_convert_type(bits ^ np.uint32(2**31), jnp.int32).astype(jnp.float32)
        threshold = offset * (y * (square * np.float32(2.0**-30) + np.float32(2.0**-32))) + square * (square + 1.5)
        level = jnp.where(n * np.float32(top**4 / 4) > threshold, k + 1, k)
        return _low_byte(jnp.where(x >= TINY, jnp.maximum(level, 1.0), 0.0), code)

    if code.bottom:
        return KernelCodec(
            dequantize_signed, lambda absmax: _live(absmax, lambda s: top * lax.rsqrt(s)), quantize_signed
        )
    return KernelCodec(dequantize_unsigned, _reciprocal, quantize_unsigned)


def _linear(code: Code) -> KernelCodec:
    top = np.float32(code.top)

    def dequantize(codes, absmax):
        return _float32(codes) * np.float32(1 / top) * absmax

    def quantize(x, factor, _):
        x = x if code.bottom else jnp.maximum(x, 0.0)
        return _low_byte(x * factor * np.float32(top / 4), code)

    return KernelCodec(dequantize, _reciprocal, quantize)


def _dynamic(code: Code) -> KernelCodec:
    """Builds the codec of bitsandbytes' map from straight lines.

    Levels are evenly spaced inside of a decade, and denser from decade to decade. So the level of a number is the
    smallest of seven straight lines, and the number of a level is the largest of the inverse lines.

    The boundary between two levels is halfway, an integer on these lines. There are two exceptions: the first level of
    a decade, whose lower neighbor is closer, and the level that stands for 1.
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
        level = _float32(codes)
        level = jnp.where(level > code.top, level - 256, level) if code.bottom else level
        magnitude = lax.abs(level)
        n = _best(jnp.maximum, magnitude, to_number)
        n = jnp.where(magnitude == 0, 0.0, jnp.where(magnitude == code.top, 1.0, n)) * absmax
        return jnp.where(level < 0, -n, n) if code.bottom else n

    def quantize(x, factor, _):  # factor = 4 / absmax
        n = (lax.abs(x) if code.bottom else jnp.maximum(x, 0.0)) * factor
        line = _best(jnp.minimum, n, to_level)
        shifted = line + np.float32(shift)
        power = lax.bitcast_convert_type(shifted, jnp.int32) & np.int32(-(2**23))
        start = shifted - lax.bitcast_convert_type(power, jnp.float32) < 0.2
        level = _rounded(line - jnp.where(start, 1.5, 0.5))
        level = jnp.where(line < 2, (line > first).astype(jnp.int32), level)
        level = jnp.where(line > last, code.top, level)
        if code.bottom:
            level = jnp.where(x < 0, -jnp.minimum(level, code.bottom), level)
        return level.astype(code.dtype)

    return KernelCodec(dequantize, _reciprocal, quantize)


def _reciprocal(absmax: Array) -> Array:
    """Returns 4 / absmax, because 1 / absmax of the largest floats is subnormal. It is at most 2^127."""
    return _live(absmax, lambda scale: jnp.minimum(4 / scale, np.float32(2.0**127)))


def _best(choose: Callable, x: Array, lines: list[tuple[float, float]]) -> Array:
    """Returns the largest or the smallest of straight lines (slope, intercept) at x."""
    values = [x * np.float32(slope) + np.float32(intercept) for slope, intercept in lines]
    return reduce(choose, values)


def _live(absmax: Array, f: Callable[[Array], Array]) -> Array:
    """Returns `f` of the scales above zero, and zero for the others."""
    return jnp.where(absmax > 0, f(jnp.maximum(absmax, TINY)), 0.0)


def _float32(codes: Array) -> Array:
    """Returns codes as floats, by way of int32 because Mosaic of JAX 0.9 does not cast uint8 to float32."""
    return codes.astype(jnp.int32).astype(jnp.float32)


ROUNDER = np.float32(1.5 * 2**23)  # its last byte is zero


def _low_byte(level: Array, code: Code) -> Array:
    """Returns a level as a code."""
    return lax.bitcast_convert_type(level + ROUNDER, jnp.int32).astype(code.dtype)


def _rounded(level: Array) -> Array:
    """Rounds a level to int32, half to even, by adding a large float whose last bits it becomes."""
    return lax.bitcast_convert_type(level + ROUNDER, jnp.int32) - ROUNDER.view(np.int32)


def without_overflow(new: tuple[Array, ...]) -> list[Array]:
    """Does what `step.without_overflow` does with one test for all moments, that of the sum of their magnitudes."""
    finite = sum(map(lax.abs, new)) < jnp.inf
    return [jnp.where(finite, x, 0.0) for x in new]


def magnitude_of(x: Array, moment: Moment) -> Array:
    """Returns the numbers whose maximum is the scale."""
    return lax.abs(x) if moment.code.bottom else x
