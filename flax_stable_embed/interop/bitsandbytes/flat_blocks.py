"""Decodes and encodes a moment as bitsandbytes stores it, in blocks of 256 elements of the flattened tensor.

    x[i] = qmap[codes[i]] * absmax[i // 256]

There is one byte per element and one float32 scale per block. These blocks cross rows, our blocks do not. The two are
the same only where the length of a row is a multiple of the block size, or where the tensor has a single row.

Our bytes of the signed map are theirs minus 127, modulo 256, so that byte 0 is zero. All bytes here are theirs.
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import jax.numpy as jnp
import numpy as np

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise.codecs import table
from ...ops.blockwise.quantize import quantize

BLOCK = 256
OLD_BLOCK = 2048  # before version 0.44 of bitsandbytes
SAME_ULPS = 4  # maps that differ by no more were computed by the same formula on another machine


@cache
def qmap(signed: bool) -> np.ndarray:
    """Returns the 256 numbers that the codes stand for."""
    values = np.roll(table("dynamic", signed), _zero(signed))
    values.setflags(write=False)
    return values


def to_theirs(codes: np.ndarray, signed: bool) -> np.ndarray:
    """Returns the bytes of bitsandbytes for ours."""
    return codes + np.uint8(_zero(signed))


def to_ours(codes: np.ndarray, signed: bool) -> np.ndarray:
    """Returns our bytes for those of bitsandbytes."""
    return codes - np.uint8(_zero(signed))


def _zero(signed: bool) -> int:
    """Returns the byte that stands for zero in a map of bitsandbytes."""
    return 127 if signed else 0


def is_same_map(found: np.ndarray, signed: bool) -> bool:
    """Returns whether a checkpoint's map equals ours up to `SAME_ULPS`, so that its codes mean the same numbers."""
    ours = qmap(signed)
    return found.shape == ours.shape and bool((np.abs(found - ours) <= SAME_ULPS * np.spacing(np.abs(ours))).all())


def are_ours(shape: Sequence[int], blocks: Blocks, size: int = BLOCK) -> bool:
    """Returns whether blocks of `size` elements of the flattened tensor are the same as our `blocks`."""
    row = shape[-1] if shape else 1
    last_axis = blocks.axis == max(len(shape) - 1, 0)
    return last_axis and blocks.size == min(size, row) and (row % size == 0 or prod(shape) == row)


def block_size(n: int, scales: int) -> int:
    """Returns the block size of a flattened tensor of `n` elements with `scales` scales, or 0 if none fits."""
    return next((size for size in (BLOCK, OLD_BLOCK) if -(-n // size) == scales), 0)


def decode(codes: np.ndarray, absmax: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Returns the float32 moment."""
    return values[codes] * spread(absmax, size, codes.shape)


def spread(absmax: np.ndarray, size: int, shape: Sequence[int]) -> np.ndarray:
    """Returns the scale of every element."""
    return np.repeat(absmax.reshape(-1), size)[: prod(shape)].reshape(shape)


def encode(x: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes, in the shape of `x`, and one scale per block of the flattened `x`."""
    codes, absmax = quantize(jnp.asarray(x.reshape(-1), jnp.float32), signed=signed, codec="dynamic", block_size=BLOCK)
    return to_theirs(np.asarray(codes).reshape(x.shape), signed), np.asarray(absmax)
