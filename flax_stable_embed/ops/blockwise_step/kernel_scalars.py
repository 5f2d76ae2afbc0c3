"""Scalar arguments of the kernels.

They are two vectors: float32 hyper-parameters, and int32 with the key for dithered or stochastic rounding and the place
of the shard in the global array. A kernel computes the numbers for rounding a tile from the second one.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..counter_random import Rounding, linear_index_of_tile, uniform
from .step import Operands


def scalars_of(operands: Operands, origin: tuple) -> tuple[Array, Array]:
    """Returns hyper-parameters in the order of their names, float32, and the bits of the key and `origin`, int32."""
    hyper = [jnp.asarray(operands.hyper[name], jnp.float32) for name in sorted(operands.hyper)]
    place = [jnp.asarray(x).astype(jnp.int32) for x in origin or (0,) * operands.g.ndim]
    key = jnp.uint32(0) if operands.key is None else operands.key
    return jnp.stack(hyper or [jnp.float32(0)]), jnp.stack([lax.bitcast_convert_type(key, jnp.int32), *place])


def uniform_of(
    rounding: Rounding,
    integers: Any,
    at: Sequence,
    lengths: Sequence[int | None],
    groups: Sequence[range],
    local: Sequence[int],
    shape,
) -> Array:
    """Returns the numbers of `uniform` for a tile.

    `integers` are from `scalars_of`. The arguments after it are those of `linear_index_of_tile`.
    """
    origin = [integers[1 + k] for k in range(len(local))]
    index = linear_index_of_tile(at, lengths, groups, local, origin, shape)
    return uniform(rounding, index, lax.bitcast_convert_type(integers[0], jnp.uint32))
