"""A parameter that is stored as a bfloat16 and a remainder, in the place of its float32 array.

An optimizer with kernels for such parameters gets it as it is. Everything else gets the float32 array, by `joined`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..ops.counter_random import linear_index, weight_bits
from ..ops.embedding.rows import set_rows, take_rows
from ..ops.sharding import placed_like
from ..ops.split_weights import join_weight, split_weight


class SplitParameter:
    """A float32 parameter in two arrays. To JAX it is a leaf of a pytree.

    Attributes:
        p: bfloat16.
        remainder: int8 or int16, of the same shape.
        key: The key of the bits that round it in this step, uint32; None if all 32 bits are kept.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, p: Array, remainder: Array, key: Array | None):
        self.p, self.remainder, self.key = p, remainder, key

    @property
    def bits(self) -> int:
        return 16 + 8 * self.remainder.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return self.p.shape

    @property
    def ndim(self) -> int:
        return self.p.ndim

    @property
    def size(self) -> int:
        return self.p.size

    def __jax_array__(self) -> Array:
        return join_weight(self.p, self.remainder)

    def astype(self, dtype: Any) -> Array:
        """Returns the float32 array in another dtype."""
        return joined(self).astype(dtype)

    def with_value(self, x: Any) -> "SplitParameter":
        """Returns the parameter with another value: a float32 array, or the pair of arrays that a kernel returns."""
        if isinstance(x, SplitParameter):
            return x
        if not isinstance(x, tuple):
            noise = None
            if self.key is not None:
                noise = placed_like(weight_bits(linear_index(self.shape), self.key), self.p)
            x = split_weight(x.astype(jnp.float32), self.bits, noise)
        p, remainder = x
        return SplitParameter(p, remainder, self.key)

    def rows(self, indices: Array) -> Array:
        """Returns rows of a table, in float32."""
        return join_weight(take_rows(self.p, indices), take_rows(self.remainder, indices))

    def with_rows(self, indices: Array, rows: Array) -> "SplitParameter":
        """Returns the table with other float32 values in some rows."""
        noise = None
        if self.key is not None:
            columns = jnp.arange(self.shape[1], dtype=jnp.uint32)[None]
            index = indices.astype(jnp.uint32)[:, None] * np.uint32(self.shape[1]) + columns
            noise = placed_like(weight_bits(index, self.key), rows)
        p, remainder = split_weight(rows.astype(jnp.float32), self.bits, noise)
        return SplitParameter(set_rows(self.p, indices, p), set_rows(self.remainder, indices, remainder), self.key)


def joined(x: Any) -> Any:
    """Returns a split parameter as its float32 array, and anything else as it is."""
    return join_weight(x.p, x.remainder) if isinstance(x, SplitParameter) else x


def as_parameter(x: Any) -> Any:
    """Returns a JAX array, or a split parameter as it is."""
    return x if isinstance(x, SplitParameter) else jnp.asarray(x)
