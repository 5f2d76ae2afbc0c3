"""Packs the halves of bfloat16 rows into uint32, because single rows of bfloat16 cannot be copied on TPU."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def can_be_packed(rows: Array) -> bool:
    """Returns whether rows are bfloat16, and their halves fill the lanes of a register."""
    return rows.dtype == jnp.bfloat16 and rows.shape[-1] % 256 == 0


def packed(rows: Array) -> Array:
    """Returns uint32 rows, (..., features / 2), with the first half of a row in the lower bits."""
    halves = jnp.split(rows, 2, axis=-1)
    first, second = (lax.bitcast_convert_type(half.astype(jnp.float32), jnp.uint32) for half in halves)
    return (first >> 16) | second


def unpacked(rows: Array, axis: int = -1) -> Array:
    """Returns packed rows in float32, with the halves joined along an axis. Others are returned as they are."""
    if rows.dtype != jnp.uint32:
        return rows
    halves = rows << 16, rows & np.uint32(0xFFFF0000)
    return jnp.concatenate([lax.bitcast_convert_type(half, jnp.float32) for half in halves], axis=axis)
