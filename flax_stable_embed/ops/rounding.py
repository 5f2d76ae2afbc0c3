"""Rounds float32 to half precision up or down at random, so that the mean of the results is the number itself.

    P(upper) = (|x| - lower) / (upper - lower),   lower <= |x| < upper neighbors in the half-precision dtype

It works on the bits of the magnitude. Random bits are added below the last bit that is kept, and their carry rounds up.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_MANTISSA, _BIAS = 23, 127  # of float32


def stochastic_round(x: Array, dtype, bits: Array) -> Array:
    """Returns `x` in `dtype`, rounded up or down at random.

    Numbers that `dtype` can represent are kept. NaN, infinities and numbers beyond the largest one of `dtype` are
    converted as by `astype`. Probabilities are exact, with one exception. For float16 below its smallest number, 2^-24,
    they are rounded up to the next multiple of 2^-24.

    Args:
        x: float32 of any shape.
        dtype: bfloat16 or float16.
        bits: Random uint32 of the shape of `x`.

    >>> x = jnp.full(4, 1 + 2**-9)  # a quarter of the way from 1 to the next number of bfloat16
    >>> bits = jnp.array([0, 2**14, 2**15, 3 * 2**14], jnp.uint32)
    >>> stochastic_round(x, jnp.bfloat16, bits).tolist()
    [1.0, 1.0, 1.0, 1.0078125]
    """
    info = jnp.finfo(dtype)
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude, sign = raw & np.uint32(0x7FFFFFFF), raw & np.uint32(0x80000000)
    dropped = np.uint32(_MANTISSA - info.nmant)
    if dtype == jnp.bfloat16:  # it has the exponents of float32, so subnormal numbers need no case of their own
        rounded = _add_and_truncate(magnitude, bits, dropped)
    else:
        exponent = magnitude >> _MANTISSA
        dropped = (
            dropped + jnp.maximum(exponent, np.uint32(info.minexp + _BIAS)) - exponent
        )  # subnormal numbers drop more
        rounded = _add_and_truncate(magnitude, bits, jnp.minimum(dropped, np.uint32(_MANTISSA)))
        # Below the smallest number no bit is kept. The choice is between the smallest number and zero.
        smallest = np.float32(info.smallest_subnormal)
        up = (bits >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24) < lax.abs(x) / smallest
        rounded = jnp.where(dropped > _MANTISSA, jnp.where(up, smallest.view(np.uint32), np.uint32(0)), rounded)
    value = lax.bitcast_convert_type(rounded | sign, jnp.float32)
    return jnp.where(lax.abs(x) <= np.float32(info.max), value, x).astype(dtype)


def _add_and_truncate(magnitude: Array, bits: Array, dropped) -> Array:
    below = (np.uint32(1) << dropped) - np.uint32(1)
    return (magnitude + (bits & below)) & ~below
