"""How bitsandbytes stores a moment: one byte an element, one scale for each 256 elements of the flattened tensor.

    x[i] = qmap[codes[i]] * absmax[i // 256]

Its blocks cross rows. Ours lie in rows and are the same only where a row is a whole number of blocks, or the only row.
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


OLD_BLOCK = 2048  # before its version 0.44


SAME_ULPS = 4  # maps that differ by less are the same one, computed on another machine


@cache
def qmap(signed: bool) -> np.ndarray:
    """The 256 numbers that the codes stand for."""
    values = table("dynamic", signed)
    values.setflags(write=False)
    return values


def is_same_map(found: np.ndarray, signed: bool) -> bool:
    """Whether a map of a checkpoint is ours but for last digits, so that its codes mean the same."""
    ours = qmap(signed)
    return found.shape == ours.shape and bool((np.abs(found - ours) <= SAME_ULPS * np.spacing(np.abs(ours))).all())


def are_ours(shape: Sequence[int], blocks: Blocks, size: int = BLOCK) -> bool:
    """Whether blocks of `size` of the flattened tensor are our `blocks` of it."""
    row = shape[-1] if shape else 1
    last_axis = blocks.axis == max(len(shape) - 1, 0)
    return last_axis and blocks.size == min(size, row) and (row % size == 0 or prod(shape) == row)


def block_size(n: int, scales: int) -> int:
    """The block size of a flattened tensor of `n` elements with that many scales; 0 where there is none."""
    return next((size for size in (BLOCK, OLD_BLOCK) if -(-n // size) == scales), 0)


def decode(codes: np.ndarray, absmax: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """The float32 moment."""
    return values[codes] * spread(absmax, size, codes.shape)


def spread(absmax: np.ndarray, size: int, shape: Sequence[int]) -> np.ndarray:
    """The scale of every element."""
    return np.repeat(absmax.reshape(-1), size)[: prod(shape)].reshape(shape)


def encode(x: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the shape of `x`, and absmax of the flattened one."""
    codes, absmax = quantize(jnp.asarray(x.reshape(-1), jnp.float32), signed=signed, codec="dynamic", block_size=BLOCK)
    return np.asarray(codes).reshape(x.shape), np.asarray(absmax)
