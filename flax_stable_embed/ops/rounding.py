"""Float32 to half precision, up or down at random, so that the mean of the results is the number itself.

    P(upper) = (|x| - lower) / (upper - lower),   lower <= |x| < upper neighbors in the half-precision dtype

On the bits of the magnitude: random bits are added below the last bit that is kept, and their carry rounds up.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_MANTISSA, _BIAS = 23, 127  # of float32


def stochastic_round(x: Array, dtype, bits: Array) -> Array:
    """`x`, float32, in `dtype`, bfloat16 or float16, rounded by `bits`, random uint32 of the same shape.

    Numbers that `dtype` has are kept. NaN, infinities and what lies beyond the largest number of `dtype` become what
    `astype` makes of them. Probabilities are exact, but for float16 below its smallest number, 2^-24, where they are
    rounded up to the next multiple of 2^-24.

    >>> x = jnp.full(4, 1 + 2**-9)  # a quarter of the way from 1 to the next number of bfloat16
    >>> bits = jnp.array([0, 2**14, 2**15, 3 * 2**14], jnp.uint32)
    >>> stochastic_round(x, jnp.bfloat16, bits).tolist()
    [1.0, 1.0, 1.0, 1.0078125]
    """
    info = jnp.finfo(dtype)
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude, sign = raw & np.uint32(0x7FFFFFFF), raw & np.uint32(0x80000000)
    dropped = np.uint32(_MANTISSA - info.nmant)
    if dtype == jnp.bfloat16:  # its exponents are float32's, so that subnormal numbers are no case of their own
        rounded = _add_and_cut(magnitude, bits, dropped)
    else:
        exponent = magnitude >> _MANTISSA
        dropped = dropped + jnp.maximum(exponent, np.uint32(info.minexp + _BIAS)) - exponent  # more of subnormal ones
        rounded = _add_and_cut(magnitude, bits, jnp.minimum(dropped, np.uint32(_MANTISSA)))
        # Below the smallest number no bit is kept, and the choice is between that and zero.
        smallest = np.float32(info.smallest_subnormal)
        up = (bits >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24) < lax.abs(x) / smallest
        rounded = jnp.where(dropped > _MANTISSA, jnp.where(up, smallest.view(np.uint32), np.uint32(0)), rounded)
    value = lax.bitcast_convert_type(rounded | sign, jnp.float32)
    return jnp.where(lax.abs(x) <= np.float32(info.max), value, x).astype(dtype)


def _add_and_cut(magnitude: Array, bits: Array, dropped) -> Array:
    below = (np.uint32(1) << dropped) - np.uint32(1)
    return (magnitude + (bits & below)) & ~below
