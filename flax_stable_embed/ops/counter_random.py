"""Random numbers from a hash of path, element index and step."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .sharding import placed_like


def mix(x: Array) -> Array:
    """Scrambles uint32: the 32-bit finalizer with the constants of C. Wellons' hash-prospector (lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def array_key(path: str, count: Array) -> Array:
    """The key of one array at one step, uint32: the CRC-32 of its path and the step's number."""
    return mix(jnp.uint32(zlib.crc32(path.encode())) + mix(count.astype(jnp.uint32)))


def hashed_bits(index: Array, key: Array) -> Array:
    """Random uint32 from a uint32 counter and key, the same on every device and mesh."""
    return mix(index * (key | np.uint32(1)) + key)


def hashed_uniform(index: Array, key: Array) -> Array:
    """Uniform float32 of [0, 1) from the top 24 of `hashed_bits`."""
    return (hashed_bits(index, key) >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24)


def random_bits(path: str, count: Array, like: Array) -> Array:
    """Random uint32 for every element of the array `like` at this step, which lie on devices as it does."""
    return placed_like(hashed_bits(linear_index(like.shape), array_key(path, count)), like)


def linear_index_of_tile(
    at: Sequence[Any], lengths: Sequence[int | None], groups: Sequence[range], local: Sequence[int], origin, shape
) -> Array:
    """Row-major positions, uint32 (modulo 2^32), in an array of `shape` of the elements of a piece of it.

    The array of extents `local` lies at `origin` in it (empty: at its beginning). Of its axes, those in one of `groups`
    count as one; along each of these the piece starts at `at` and has a length, or is a single element and has no axis
    (None).
    """
    strides = np.cumprod((1, *shape[:0:-1]))[::-1]
    kept = [n for n in lengths if n is not None]
    total, axis = jnp.zeros(kept, jnp.int32), 0  # sums and products of int32 wrap like those of uint32
    for start, length, dims in zip(at, lengths, groups):
        flat, share = jnp.asarray(start).astype(jnp.int32), jnp.int32(0)
        if length is not None:
            flat = flat + lax.broadcasted_iota(jnp.int32, [length if k == axis else 1 for k in range(len(kept))], axis)
            axis += 1
        for dim in reversed(dims):
            index = flat if dim == dims[0] else lax.rem(flat, np.int32(local[dim]))
            index = index + origin[dim].astype(jnp.int32) if len(origin) else index
            share, flat = (
                share + index * np.uint32(strides[dim] % 2**32).view(np.int32),
                lax.div(flat, np.int32(local[dim])),
            )
        total = total + share
    return lax.bitcast_convert_type(total, jnp.uint32)


def linear_index(shape: tuple[int, ...]) -> Array:
    """The row-major position of every element, uint32 (modulo 2^32)."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index
