"""Arithmetic that rules share, operation by operation as optax has it."""

from functools import partial

import jax
import jax.numpy as jnp


def over(x, correction, rounded):
    """`x` by a scalar, to the bit as optax has it, or where moments are rounded anyway, times its reciprocal.

    (Broadcast first: an eager division by a scalar would be that product.)
    """
    if rounded:
        return x * (1 / correction.astype(x.dtype))
    return x / jnp.broadcast_to(correction.astype(x.dtype), x.shape)


def inverse_root(x, rounded):
    """1 / sqrt(x): optax's instruction for it, or where moments are rounded anyway, one that is the same everywhere.

    (XLA's `rsqrt` on CPU differs in its last bit between vectors and what is left over of them.)
    """
    return 1 / jnp.sqrt(x) if rounded else jax.lax.rsqrt(x)


@partial(jax.jit, inline=True)
def correction(b, count):
    """1 - b^t, the share of the first t gradients in a moving average, as optax computes it."""
    return 1 - b ** count.astype(jnp.result_type(float))


def sign(x):
    """`jnp.sign`, which a kernel for TPU cannot have where it is compiled without one."""
    if jnp.iscomplexobj(x):  # of no kernel
        return jnp.sign(x)
    return jnp.where(x > 0, 1.0, jnp.where(x < 0, -1.0, x)).astype(x.dtype)
