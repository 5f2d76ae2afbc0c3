"""Scalar arguments of the kernels.

They are two vectors: float32 hyper-parameters, and int32 with the key for dithered or stochastic rounding, the place of
the shard in the global array, and the key for rounding weights. A kernel computes the numbers for rounding a tile from
the second one.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..counter_random import DITHERED_ELEMENT, Rounding, hashed_bits, linear_index_of_tile
from .step import Operands


def scalars_of(operands: Operands, origin: tuple) -> tuple[Array, Array]:
    """Returns hyper-parameters in the order of their names, float32, and key, `origin` and weight key, int32."""
    hyper = [jnp.asarray(operands.hyper[name], jnp.float32) for name in sorted(operands.hyper)]
    place = [jnp.asarray(x).astype(jnp.int32) for x in origin or (0,) * operands.g.ndim]
    keys = [jnp.uint32(0) if key is None else key for key in (operands.key, operands.weight_key)]
    key, weight_key = (lax.bitcast_convert_type(key, jnp.int32) for key in keys)
    last = [] if operands.weight_key is None else [weight_key]
    return jnp.stack(hyper or [jnp.float32(0)]), jnp.stack([key, *place, *last])


def bits_of_tile(
    rounding: Rounding,
    integers: Any,
    at: Sequence,
    lengths: Sequence[int | None],
    groups: Sequence[range],
    local: Sequence[int],
    shape,
) -> Array:
    """Returns the bits, uint32, that `as_fraction` makes the numbers of `uniform` of, for a tile.

    `integers` are from `scalars_of`. The arguments after it are those of `linear_index_of_tile`.
    """
    origin = [integers[1 + k] for k in range(len(local))]
    if rounding == "dither":
        return linear_index_of_tile(at, lengths, groups, local, origin, shape, int(DITHERED_ELEMENT), integers[0])
    key = integers[0].astype(jnp.uint32)  # Mosaic of JAX 0.8 does not bitcast scalars
    return hashed_bits(linear_index_of_tile(at, lengths, groups, local, origin, shape), key)


def weight_bits_of_tile(integers: Any, at: Sequence, lengths: Sequence, groups: Sequence[range], local, shape) -> Array:
    """Returns the `weight_bits` of a tile. The arguments are those of `bits_of_tile`."""
    origin, key = [integers[1 + k] for k in range(len(local))], integers[1 + len(local)]
    return linear_index_of_tile(at, lengths, groups, local, origin, shape, int(DITHERED_ELEMENT), key) >> 16
