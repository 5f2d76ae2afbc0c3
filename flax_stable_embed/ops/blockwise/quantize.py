"""Quantizes numbers to codes and scales, and back.

    absmax[block] = max |x| over the finite elements of the block;   codes = encode(x / absmax)
    x' = decode(codes) * absmax

Non-finite values do not affect the rest of their block: NaN and infinities are stored as zero and ignored by the scale.
Magnitudes below 2^-126 (float32's smallest normal number) count as zero.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from ..counter_random import DITHERED_STEP, Rounding, linear_index, uniform
from .blocks import Blocks
from .codecs import CODECS, TINY, Code, Codec, decode, encode


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
    """Quantizes an array to one byte per element and one float32 scale per block.

    A block is `block_size` neighbors along `axis`. Its scale is the largest magnitude in it. Byte 0 stands for zero in
    every codec. Signed `dynamic` codes are those of bitsandbytes minus 127, modulo 256.

    Args:
        x: Array of floating point numbers, of any shape. The arithmetic is in float32.
        signed: True if numbers can be negative. False for numbers that never are (second moments): they get a finer
            code, and a negative element counts as zero.
        codec: How a number in [-1, 1] is encoded as a byte: "root", "dynamic" (bitsandbytes' map) or "linear".
        block_size: Number of elements per block. The last block of the axis may be short.
        axis: The axis that blocks are along.
        rounding: "nearest" rounds to the nearest code. "dither" and "stochastic" round magnitudes up or down, so that
            the mean of the decoded values over many seeds is `x`. They compare the distance to the lower code with a
            number that depends on element index and `seed`, the same on every device and mesh. For "stochastic" it is
            a hash. For "dither" it is an additive recurrence, so that errors cancel within a few consecutive seeds.
        seed: Integer that these numbers depend on, required unless `rounding` is "nearest". The number of the step.

    Returns:
        codes: One byte per element, in the shape of `x`. int8 for signed `root` and `linear`, else uint8.
        absmax: The scales, float32, in the shape of `x` with the number of blocks along `axis`; () for a scalar.

    Raises:
        ValueError: The codec or rounding is unknown, the block size is below 1, the axis is out of range, or
            dithered or stochastic rounding has no seed.
        TypeError: `x` is not real floating point.

    >>> codes, absmax = quantize(jnp.array([0.0, 1.0, -4.0]), signed=True)
    >>> codes.tolist(), absmax.tolist()
    ([0, 64, -127], [4.0])
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be real floating point, got {x.dtype}. Cast it first: x.astype(jnp.float32).")
    blocks = _check(x.shape, codec, block_size, axis)
    if rounding not in ("nearest", "dither", "stochastic"):
        raise ValueError(f"`rounding` must be 'nearest', 'dither' or 'stochastic', got {rounding!r}.")
    key = None
    if rounding != "nearest":
        if seed is None:
            raise ValueError(f"`rounding={rounding!r}` needs an integer `seed`, got None. Pass the number of the step.")
        key = jnp.asarray(seed).astype(jnp.uint32)
        key = key * DITHERED_STEP if rounding == "dither" else key
    return quantize_by_key(x, key, blocks=blocks, codec=codec, signed=signed, rounding=rounding)


def dequantize(
    codes: Array,
    absmax: Array,
    *,
    signed: bool,
    codec: Codec = "root",
    block_size: int = 256,
    axis: int = -1,
) -> Array:
    """Returns the float32 numbers that `codes` and `absmax` stand for.

    The other arguments must be those that `quantize` was called with.

    Args:
        codes: Codes from `quantize`.
        absmax: Scales from `quantize`.
        signed: As in `quantize`.
        codec: As in `quantize`.
        block_size: As in `quantize`.
        axis: As in `quantize`.

    Returns:
        Array of float32 in the shape of `codes`.

    Raises:
        ValueError: As in `quantize`, or if the shapes or dtypes of `codes` and `absmax` do not match the other
            arguments.

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
    """Checks that `codec` is the name of a codec."""
    if codec not in CODECS:
        raise ValueError(f"`codec` must be one of {', '.join(map(repr, CODECS))}, got {codec!r}.")


def check_block_size(block_size: int) -> None:
    """Checks that `block_size` is an integer of at least 1."""
    if not isinstance(block_size, int | np.integer) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"`block_size` must be an integer of at least 1, got {block_size!r}. Try 256.")


def _check(shape: tuple[int, ...], codec: str, block_size: int, axis: int) -> Blocks:
    check_codec(codec)
    check_block_size(block_size)
    ndim = max(len(shape), 1)
    if not -ndim <= axis < ndim:
        raise ValueError(f"`axis` must be in [{-ndim}, {ndim - 1}] for an array of shape {shape}, got {axis}.")
    return Blocks(axis % ndim, int(block_size))


@partial(jax.jit, static_argnames=("blocks", "codec", "signed", "rounding"))
def quantize_by_key(x, key, *, blocks: Blocks, codec: str, signed: bool, rounding: Rounding):
    """Returns codes and scales. `key` is from `rounding_key`; None for rounding to nearest."""
    shape, code = x.shape, CODECS[codec](signed)
    view = split(x.astype(jnp.float32).reshape(shape or (1,)), blocks)
    numbers = None
    if rounding != "nearest":
        numbers = uniform(rounding, split(linear_index(shape or (1,)), blocks), key)
    codes, absmax = quantize_view(view, blocks.axis, code, numbers)
    codes = merge(codes, blocks, shape or (1,))
    return codes.reshape(shape), absmax.reshape(blocks.absmax_shape(shape))


@partial(jax.jit, static_argnames=("blocks", "codec", "signed"))
def _dequantize(codes, absmax, *, blocks: Blocks, codec: str, signed: bool):
    shape, code = codes.shape, CODECS[codec](signed)
    view = split(codes.reshape(shape or (1,)), blocks)
    scales = absmax.reshape(blocks.absmax_shape(shape or (1,)))
    return merge(dequantize_view(view, scales, blocks.axis, code), blocks, shape or (1,)).reshape(shape)


def quantize_view(x: Array, axis: int, code: Code, numbers: Array | None = None) -> tuple[Array, Array]:
    """Returns codes and scales of float32 blocks. `x` is split, so that axis `axis + 1` is the inside of a block."""
    magnitude = _magnitude(x, code)
    absmax = jnp.max(jnp.where(magnitude < jnp.inf, magnitude, 0.0), axis=axis + 1, initial=0.0)  # NaN compares false
    absmax = jnp.where(absmax >= TINY, absmax, 0.0)
    return codes_of(x, jnp.expand_dims(absmax, axis + 1), code, numbers), absmax


def codes_of(x: Array, absmax: Array, code: Code, numbers: Array | None = None) -> Array:
    """Returns the codes of float32 numbers whose scale is known."""
    magnitude = _magnitude(x, code)
    live = (magnitude >= TINY) & (magnitude < jnp.inf)
    # The select makes XLA divide. It would multiply a plain broadcast by the reciprocal, which rounds differently.
    scale = jnp.where(live, absmax, 1.0)
    within = jnp.minimum(jnp.maximum(magnitude / scale, TINY), 1.0)  # the quotient may underflow where x does not
    n = jnp.where(live, within, 0.0)
    return encode(n, x < 0, code, numbers)


def _magnitude(x: Array, code: Code) -> Array:
    return lax.abs(x) if code.bottom else jnp.maximum(x, 0.0)  # maximum keeps NaN


def dequantize_view(codes: Array, absmax: Array, axis: int, code: Code) -> Array:
    """Returns the float32 numbers of split `codes`."""
    return decode(codes, code) * jnp.expand_dims(absmax, axis + 1)


def split(x: Array, blocks: Blocks, fill: int = 0) -> Array:
    """Splits the blocked axis of `x` into (number of blocks, block size); a short last block is filled with `fill`."""
    axis, size = blocks
    count = blocks.count(x.shape)
    if _straddles(x, blocks):
        mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])))
    if count * size != x.shape[axis]:
        widths = [(0, 0, 0)] * x.ndim
        widths[axis] = (0, count * size - x.shape[axis], 0)
        x = lax.pad(x, jnp.full((), fill, x.dtype), widths)
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def _straddles(x: Array, blocks: Blocks) -> bool:
    """Returns whether the type of `x` says that blocks straddle shards. Only types of an Explicit mesh do."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[blocks.axis]
    shards = prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
    return shards > 1 and x.shape[blocks.axis] % (shards * blocks.size) != 0


def merge(x: Array, blocks: Blocks, shape: tuple[int, ...]) -> Array:
    """Undoes `split`."""
    axis = blocks.axis
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return x if x.shape == shape else lax.slice_in_dim(x, 0, shape[axis], axis=axis)
