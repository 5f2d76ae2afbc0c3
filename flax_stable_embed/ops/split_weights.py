"""Splits a float32 number into a bfloat16 and an integer remainder of 8 or 16 bits, and joins them again.

With M the magnitude of the number as an integer of 31 bits (its bits without the sign), and d = 16 - (bits of the
remainder):

    shorten   M' = M                                                 16 bits: nothing is lost
              M' = M rounded to a multiple of 2^8                     8 bits: to nearest even, or by random bits
    split     T = (M' + 2^15) >> 16;   r = (M' - (T << 16)) >> d      T with the sign is the bfloat16
    join      M' = max((T << 16) + (r << d), 0)

The bfloat16 is the nearest one, with ties away from zero. With 16 bits, `join` gives the very bits of every float32
that is not NaN. With 8 bits it gives 15 bits of mantissa. `split` of what `join` gives is the same pair, so a weight
that does not change stays bit for bit. A bfloat16 that somebody set to zero stays zero, whatever its remainder. It
joins to zero, or to a subnormal number that splits into zero again.

Everything is arithmetic of integers. So the bits are the same on every platform, and no flag that lets a compiler keep
excess precision or flush subnormal numbers changes them. The idea of an integer remainder is that of NVIDIA's
TransformerEngine (`store_param_remainders`); 8 bits are FlashOptim's (arXiv:2602.23349), in floating point there.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

INFINITY = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_QUIET_NAN = np.int32(0x7FC00000)
REMAINDERS = {24: np.dtype(np.int8), 32: np.dtype(np.int16)}  # by the bits of a weight in all


def split_weight(x: Array, bits: int, noise: Array | None = None) -> tuple[Array, Array]:
    """Returns a float32 array as bfloat16 and a remainder. The derivative is that of `x.astype(bfloat16)`.

    Args:
        x: float32.
        bits: 24 or 32, those of the bfloat16 and of the remainder.
        noise: uint32 of the shape of `x`. With 24 bits, the magnitude is rounded up with the probability of the bits
            that are lost, by the last 8 bits of the noise. If None, it is rounded to nearest even. Not for 32 bits.

    Returns:
        The bfloat16, and the remainder, int8 or int16. NaN becomes the quiet NaN.

    >>> p, remainder = split_weight(jnp.float32([1.0, 1.0 + 2**-10, -3.0]), bits=32)
    >>> p.tolist(), remainder.tolist()
    ([1.0, 1.0, -3.0], [0, 8192, 0])
    >>> join_weight(p, remainder).tolist()
    [1.0, 1.0009765625, -3.0]
    """
    return _split(bits, x, noise)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _split(bits: int, x: Array, noise: Array | None) -> tuple[Array, Array]:
    word = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = word & _MAGNITUDE
    if bits == 24:
        last = noise & np.uint32(255) if noise is not None else None
        added = (127 + ((magnitude >> 8) & 1)) if last is None else lax.bitcast_convert_type(last, jnp.int32)
        magnitude = jnp.where(magnitude < INFINITY, (magnitude + added) & np.int32(~255), magnitude)
    magnitude = jnp.where(magnitude > INFINITY, _QUIET_NAN, magnitude)
    top = (magnitude + np.int32(1 << 15)) >> 16
    remainder = (magnitude - (top << 16)) >> (32 - bits)
    half = (lax.shift_right_logical(word, np.int32(16)) & np.int32(0x8000)) | top
    p = lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.bfloat16)
    return p, remainder.astype(REMAINDERS[bits])


@_split.defjvp
def _split_jvp(bits: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    p, remainder = _split(bits, *primals)
    return (p, remainder), (tangents[0].astype(p.dtype), np.zeros(remainder.shape, jax.dtypes.float0))


def convert_remainder(remainder: Array, dtype: Any) -> Array:
    """Returns the remainder of the same bfloat16 in another dtype of `REMAINDERS`, rounded to nearest."""
    if remainder.dtype == dtype:
        return remainder
    wide = remainder.astype(jnp.int32)
    changed = wide << 8 if dtype == jnp.int16 else jnp.minimum((wide + 128) >> 8, 127)
    return changed.astype(dtype)


def split_in_kernel(x: Array, bits: int, noise: Array | None) -> tuple[Array, Array]:
    """Does what `split_weight` does, in fewer instructions and without 16-bit integers.

    It takes results of arithmetic, which are no signaling NaN. The sign stays in the word, because no sum of a finite
    number carries into it.
    """
    word = lax.bitcast_convert_type(x, jnp.int32)
    finite = word
    if bits == 24:
        added = (127 + ((word >> 8) & 1)) if noise is None else lax.bitcast_convert_type(noise, jnp.int32) & 255
        finite = (word + added) & np.int32(~255)
    word = jnp.where((word & _MAGNITUDE) < INFINITY, finite, word & (_QUIET_NAN | np.int32(~_MAGNITUDE)))
    top = (word + np.int32(1 << 15)) & np.int32(~0xFFFF)
    remainder = (word - top) >> (32 - bits)
    return lax.bitcast_convert_type(top, jnp.float32).astype(jnp.bfloat16), remainder.astype(REMAINDERS[bits])


def join_in_kernel(p: Array, remainder: Array) -> Array:
    """Does what `join_weight` does, without 16-bit integers. If the sum changes the sign, the magnitude was zero."""
    shift = 16 - 8 * remainder.dtype.itemsize
    word = lax.bitcast_convert_type(p.astype(jnp.float32), jnp.int32)
    joined = word + (remainder.astype(jnp.int32) << shift)
    return lax.bitcast_convert_type(jnp.where((joined ^ word) < 0, word, joined), jnp.float32)


@jax.custom_jvp
def join_weight(p: Array, remainder: Array) -> Array:
    """Returns the float32 numbers that `split_weight` has split. The dtype of the remainder says their bits.

    The derivative is that of `p.astype(float32)`.
    """
    shift = 16 - 8 * remainder.dtype.itemsize
    half = lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.int32)
    magnitude = ((half & np.int32(0x7FFF)) << 16) + (remainder.astype(jnp.int32) << shift)
    sign = (half & np.int32(0x8000)) << 16
    return lax.bitcast_convert_type(jnp.maximum(magnitude, 0) | sign, jnp.float32)


@join_weight.defjvp
def _join_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x = join_weight(*primals)
    return x, tangents[0].astype(x.dtype)
