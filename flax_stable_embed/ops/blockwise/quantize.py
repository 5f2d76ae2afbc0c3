"""Quantize and dequantize: codes and scales from numbers, and back.

    absmax[block] = max |x| over the finite elements of the block;   codes = encode(x / absmax)
    x' = decode(codes) * absmax

What is not finite stays its own affair: NaN and infinities get the code of zero and do not touch the scale.
Magnitudes below 2^-126 (float32's smallest normal number) count as zero.
"""

from functools import partial
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from ..counter_random import hashed_uniform, linear_index
from .blocks import Blocks
from .codecs import CODECS, TINY, Code, Codec, decode, encode

Rounding = Literal["nearest", "stochastic"]


def quantize(
    x: Array,
    *,
    signed: bool,
    codec: Codec = "root",
    block_size: int = 256,
    axis: int = -1,
    rounding: Rounding = "nearest",
    seed: int | Array | None = None,
) -> tuple[Array, Array]:
    """One byte per element and one float32 scale per block of `block_size` neighbors along `axis`.

    Args:
        x: floating point of any shape. Computed in float32.
        signed: False for numbers that are never negative (second moments), which get the finer code; there a negative
            element counts as zero.
        codec: how a number of [-1, 1] becomes a byte, see `codecs.py`.
        block_size: the last block of the axis may be short.
        axis: the axis that the blocks lie in.
        rounding: "stochastic" rounds magnitudes up or down so that the mean of decoded values is `x`, by a hash of
            element index and `seed`: the same bits on every device and mesh.
        seed: an integer, required with stochastic rounding.

    Returns:
        codes: the shape of `x`; int8 for signed `root` and `linear`, else uint8.
        absmax: float32, the shape of `x` with the number of blocks along `axis`; () for a scalar.

    Raises:
        ValueError: an unknown codec or rounding, a block size below 1, an axis out of range, stochastic without a seed.
        TypeError: `x` is not real floating point.

    >>> codes, absmax = quantize(jnp.array([0.0, 1.0, -4.0]), signed=True)
    >>> codes.tolist(), absmax.tolist()
    ([0, 64, -127], [4.0])
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be real floating point, got {x.dtype}. Cast it first: x.astype(jnp.float32).")
    blocks = _check(x.shape, codec, block_size, axis)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {rounding!r}.")
    key = None
    if rounding == "stochastic":
        if seed is None:
            raise ValueError("`rounding='stochastic'` needs `seed`, an integer; got None.")
        key = jnp.asarray(seed).astype(jnp.uint32)
    return _quantize(x, key, blocks=blocks, codec=codec, signed=signed)


def dequantize(
    codes: Array,
    absmax: Array,
    *,
    signed: bool,
    codec: Codec = "root",
    block_size: int = 256,
    axis: int = -1,
) -> Array:
    """The float32 numbers that `quantize` stored; the arguments are those it was called with.

    Raises:
        ValueError: as `quantize`, and where `codes` or `absmax` do not have the shape and dtype that belong together.

    >>> codes, absmax = quantize(jnp.array([0.0, 1.0, -4.0]), signed=True)
    >>> dequantize(codes, absmax, signed=True).tolist()
    [0.0, 1.0158..., -4.0]
    """
    codes, absmax = jnp.asarray(codes), jnp.asarray(absmax)
    blocks = _check(codes.shape, codec, block_size, axis)
    dtype, shape = CODECS[codec](signed).dtype, blocks.absmax_shape(codes.shape)
    if codes.dtype != dtype:
        raise ValueError(
            f"`codes` of codec {codec!r} with signed={signed} are {dtype}, got {codes.dtype}. "
            "Were they made with other settings?"
        )
    if absmax.shape != shape:
        raise ValueError(
            f"`absmax` must have shape {shape} for codes of shape {codes.shape} in blocks of {block_size} along axis "
            f"{axis}, got {absmax.shape}. Were they made with another `block_size` or `axis`?"
        )
    return _dequantize(codes, absmax, blocks=blocks, codec=codec, signed=signed)


def check_codec(codec: str) -> None:
    """Raises a ValueError unless `codec` is the name of a codec."""
    if codec not in CODECS:
        raise ValueError(f"`codec` must be one of {', '.join(map(repr, CODECS))}, got {codec!r}.")


def check_block_size(block_size: int) -> None:
    """Raises a ValueError unless `block_size` can be the size of a block."""
    if not isinstance(block_size, int | np.integer) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"`block_size` must be an integer of at least 1, got {block_size!r}; try 256.")


def _check(shape: tuple[int, ...], codec: str, block_size: int, axis: int) -> Blocks:
    check_codec(codec)
    check_block_size(block_size)
    ndim = max(len(shape), 1)
    if not -ndim <= axis < ndim:
        raise ValueError(f"`axis` must be in [{-ndim}, {ndim - 1}] for an array of shape {shape}, got {axis}.")
    return Blocks(axis % ndim, int(block_size))


@partial(jax.jit, static_argnames=("blocks", "codec", "signed"))
def _quantize(x, key, *, blocks: Blocks, codec: str, signed: bool):
    shape, code = x.shape, CODECS[codec](signed)
    view = split(x.astype(jnp.float32).reshape(shape or (1,)), blocks)
    uniform = None
    if key is not None:
        index = split(linear_index(shape or (1,)), blocks)
        uniform = hashed_uniform(index, key)
    codes, absmax = quantize_view(view, blocks.axis, code, uniform)
    codes = merge(codes, blocks, shape or (1,))
    return codes.reshape(shape), absmax.reshape(blocks.absmax_shape(shape))


@partial(jax.jit, static_argnames=("blocks", "codec", "signed"))
def _dequantize(codes, absmax, *, blocks: Blocks, codec: str, signed: bool):
    shape, code = codes.shape, CODECS[codec](signed)
    view = split(codes.reshape(shape or (1,)), blocks)
    scales = absmax.reshape(blocks.absmax_shape(shape or (1,)))
    return merge(dequantize_view(view, scales, blocks.axis, code), blocks, shape or (1,)).reshape(shape)


def quantize_view(x: Array, axis: int, code: Code, uniform: Array | None = None) -> tuple[Array, Array]:
    """Codes and scales of float32 blocks: `x` is split, so that axis `axis + 1` is the inside of a block."""
    magnitude = _magnitude(x, code)
    absmax = jnp.max(jnp.where(magnitude < jnp.inf, magnitude, 0.0), axis=axis + 1, initial=0.0)  # NaN compares false
    absmax = jnp.where(absmax >= TINY, absmax, 0.0)
    return codes_of(x, jnp.expand_dims(absmax, axis + 1), code, uniform), absmax


def codes_of(x: Array, absmax: Array, code: Code, uniform: Array | None = None) -> Array:
    """Codes of float32 numbers whose scale is known."""
    magnitude = _magnitude(x, code)
    live = (magnitude >= TINY) & (magnitude < jnp.inf)
    # A true division: by a plain broadcast XLA would multiply with the reciprocal, which rounds differently.
    scale = jnp.where(live, absmax, 1.0)
    n = jnp.where(live, jnp.clip(magnitude / scale, TINY, 1.0), 0.0)  # the quotient may underflow where x does not
    if code.bottom:
        n = jnp.where(x < 0, -n, n)
    return encode(n, code, uniform)


def _magnitude(x: Array, code: Code) -> Array:
    return lax.abs(x) if code.bottom else jnp.maximum(x, 0.0)  # maximum keeps NaN


def dequantize_view(codes: Array, absmax: Array, axis: int, code: Code) -> Array:
    """The numbers of split `codes`, float32."""
    return decode(codes, code) * jnp.expand_dims(absmax, axis + 1)


def split(x: Array, blocks: Blocks, zero: int = 0) -> Array:
    """`x` with its blocked axis cut into (number of blocks, block size); a short last block is padded with `zero`."""
    axis, size = blocks
    count = blocks.count(x.shape)
    if _straddles(x, blocks):
        mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])))
    if count * size != x.shape[axis]:
        widths = [(0, 0, 0)] * x.ndim
        widths[axis] = (0, count * size - x.shape[axis], 0)
        x = lax.pad(x, jnp.full((), zero, x.dtype), widths)
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def _straddles(x: Array, blocks: Blocks) -> bool:
    """Whether the type of `x` says that shards cut through blocks; only under an Explicit mesh does it say."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[blocks.axis]
    ways = prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
    return ways > 1 and x.shape[blocks.axis] % (ways * blocks.size) != 0


def merge(x: Array, blocks: Blocks, shape: tuple[int, ...]) -> Array:
    """The inverse of `split`."""
    axis = blocks.axis
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return x if x.shape == shape else lax.slice_in_dim(x, 0, shape[axis], axis=axis)
