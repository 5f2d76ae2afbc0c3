"""Numbers in [0, 1) from the array's path, the element's index and the step, for rounding.

Rounding that is right on average needs one such number per element and step. They are computed where they are needed:

    dither       bits = index * 0xC13FA9A9 + step * 0x9E3779B1 + crc32(path)
    stochastic   key = mix(crc32(path) + mix(step));    bits = mix(index * (key | 1) + key)

`index` is the row-major index of an element in the global array, and all integers are modulo 2^32. So the optimizer
state holds no PRNG key, an element gets the same bits on every mesh, and a kernel can compute the bits of its tile
without reading memory.

Dither is an additive recurrence (a Weyl sequence) over elements and over steps. 0x9E3779B1 / 2^32 is the golden ratio's
fraction, of all numbers the one that is worst approximated by fractions. So within a few steps an element gets numbers
that are spread evenly over [0, 1), and its errors of rounding cancel. It costs a kernel one sum and one shift per
element, and the hash several products. The upper 16 bits are enough: they resolve 2^-16 of the distance of two levels.
"""

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .sharding import placed_like


def mix(x: Array) -> Array:
    """Scrambles uint32 by the 32-bit finalizer with the constants of C. Wellons' hash-prospector (lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


DITHERED_ELEMENT, DITHERED_STEP = np.uint32(0xC13FA9A9), np.uint32(0x9E3779B1)
Rounding = Literal["nearest", "dither", "stochastic"]


def rounding_key(rounding: Rounding, path: str, count: Array) -> Array:
    """Returns the key of one array at one step for dithered or stochastic rounding, uint32."""
    if rounding == "stochastic":
        return array_key(path, count)
    return jnp.uint32(zlib.crc32(path.encode())) + count.astype(jnp.uint32) * DITHERED_STEP


def uniform(rounding: Rounding, index: Array, key: Array) -> Array:
    """Returns float32 in [0, 1) for the elements with these indices, uint32, the same on every device and mesh."""
    bits = hashed_bits(index, key) if rounding == "stochastic" else index * DITHERED_ELEMENT + key
    return as_fraction(rounding, bits)


def weight_bits(index: Array, key: Array) -> Array:
    """Returns uint32 whose last 8 bits round a weight of 24 bits, for elements with these indices, uint32.

    They are bits of the dither of `uniform`. Those above them decide how second moments are rounded.
    """
    return (index * DITHERED_ELEMENT + key) >> 16


def as_fraction(rounding: Rounding, bits: Array) -> Array:
    """Returns the upper bits of uint32 as float32 in [0, 1): 16 of them for dither, and 24 otherwise."""
    kept = 16 if rounding == "dither" else 24
    return (bits >> (32 - kept)).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-kept)


def array_key(path: str, count: Array) -> Array:
    """Returns the key of one array at one step, uint32, from the CRC-32 of its path and the number of the step."""
    return mix(jnp.uint32(zlib.crc32(path.encode())) + mix(count.astype(jnp.uint32)))


def hashed_bits(index: Array, key: Array) -> Array:
    """Returns random uint32 from a uint32 counter and a key, the same on every device and mesh."""
    return mix(index * (key | np.uint32(1)) + key)


def random_bits(path: str, count: Array, like: Array) -> Array:
    """Returns random uint32 for every element of the array `like` at this step, sharded like it."""
    return placed_like(hashed_bits(linear_index(like.shape), array_key(path, count)), like)


def linear_index_of_tile(
    at: Sequence[Any],
    lengths: Sequence[int | None],
    groups: Sequence[range],
    local: Sequence[int],
    origin,
    shape,
    factor: int = 1,
    plus: Any = 0,
) -> Array:
    """Returns the row-major index in the global array of each element of a tile, as `factor * index + plus`.

    The result is uint32, modulo 2^32.

    A tile is a box of elements of one shard. A kernel sees the shard with axes merged, and so does this function.

    Args:
        at: Where the tile starts along each merged axis.
        lengths: Lengths of the tile along each merged axis. None stands for a single element, which has no axis in the
            result.
        groups: The axes of the shard that each merged axis consists of.
        local: The shape of the shard.
        origin: Where the shard starts in the global array, along each axis; empty if it starts at zero.
        shape: The shape of the global array.
        factor: A constant. The product is computed for each axis and not for each element.
        plus: A scalar, int32.
    """
    strides = [int(n) * factor for n in np.cumprod((1, *shape[:0:-1]))[::-1]]
    kept = [n for n in lengths if n is not None]
    total, axis = jnp.full([1] * len(kept), plus, jnp.int32), 0  # sums and products of int32 wrap as those of uint32 do
    for start, length, dims in zip(at, lengths, groups):
        flat, share = jnp.asarray(start).astype(jnp.int32), jnp.int32(0)
        if length is not None:
            flat = flat + lax.broadcasted_iota(jnp.int32, [length if k == axis else 1 for k in range(len(kept))], axis)
            axis += 1
        for dim in reversed(dims):
            index = flat if dim == dims[0] else lax.rem(flat, np.int32(local[dim]))
            index = index + origin[dim].astype(jnp.int32) if len(origin) else index
            share = share + index * np.uint32(strides[dim] % 2**32).view(np.int32)
            flat = lax.div(flat, np.int32(local[dim]))
        total = total + share
    return lax.bitcast_convert_type(jnp.broadcast_to(total, kept), jnp.uint32)


def linear_index(shape: tuple[int, ...]) -> Array:
    """Returns the row-major index of every element of an array, uint32 (modulo 2^32)."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index
