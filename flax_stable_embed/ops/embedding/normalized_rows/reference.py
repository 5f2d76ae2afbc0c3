"""Defines normalized rows in plain operations: a lookup, then a LayerNorm in float32.

    y_i = (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias,    x = table[ids_i]

The kernels compute the same. Where none can run, this runs.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ...dtypes import at_least_float32
from ..gather import GatherOptions, gather
from ..layer_norm import normalize


class Options(NamedTuple):
    """Static options of the operation; hashable.

    epsilon: Added to the variance.
    padding_idx: The row that gets no gradient; None if every row gets one.
    in_bounds: True if the caller promises that every row number is in the table.
    dtype: Dtype of the output.
    kernels: The platforms whose kernels can take the arrays, by JAX's names.
    in_float32: True if the table is float32, so that gradients of parts of the tokens can be added.
    is_part: True if the table has a part of the rows, and other devices have the others. The row number
        `num_embeddings + 1` stands for theirs: the output is -0.0, which changes no sum, and nothing gets a gradient.
    """

    epsilon: float
    padding_idx: int | None
    in_bounds: bool
    dtype: np.dtype
    kernels: tuple[str, ...] = ()
    in_float32: bool = False
    is_part: bool = False


def reference(options: Options, table: Array, scale: Array, bias: Array, row_numbers: Array) -> Array:
    """Returns the normalized rows, (*batch, features)."""
    wide = at_least_float32(table.dtype)
    how = GatherOptions(options.padding_idx, by_frequency=False, sharding=None, dtype=wide, in_bounds=options.in_bounds)
    rows = gather(how, table, row_numbers)
    if not options.is_part:
        return normalize(rows, scale, bias, options.epsilon).astype(options.dtype)
    elsewhere = (row_numbers == table.shape[0] + 1)[..., None]
    y = normalize(jnp.where(elsewhere, 0.0, rows), scale, bias, options.epsilon).astype(options.dtype)
    return jnp.where(elsewhere, jnp.array(-0.0, y.dtype), y)
