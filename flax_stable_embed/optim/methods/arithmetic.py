"""Functions that update rules share, with the same operations in the same order as in optax."""

from functools import partial

import jax
import jax.numpy as jnp


def over(x, correction, rounded):
    """Divides `x` by a scalar, bit for bit as in optax. Where moments are rounded anyway, multiplies by the reciprocal.

    The scalar is broadcast first, because an eager division by a scalar would also multiply by the reciprocal.
    """
    if rounded:
        return x * (1 / correction.astype(x.dtype))
    return x / jnp.broadcast_to(correction.astype(x.dtype), x.shape)


def inverse_root(x, rounded):
    """Returns 1 / sqrt(x), as `rsqrt` like in optax. Where moments are rounded anyway, as a division.

    The division has the same bits on every mesh. On CPU, the last bit of XLA's `rsqrt` depends on whether an element is
    computed in a vector or as one of the elements that do not fill a vector.
    """
    return 1 / jnp.sqrt(x) if rounded else jax.lax.rsqrt(x)


@partial(jax.jit, inline=True)
def correction(b, count):
    """Returns the bias correction 1 - b^t, the sum of the weights of t gradients in a moving average, as in optax."""
    return 1 - b ** count.astype(jnp.result_type(float))


def sign(x):
    """Returns `jnp.sign(x)`, in operations that a TPU kernel has even where it is compiled on a host without a TPU."""
    if jnp.iscomplexobj(x):  # kernels do not run on complex arrays
        return jnp.sign(x)
    return jnp.where(x > 0, 1.0, jnp.where(x < 0, -1.0, x)).astype(x.dtype)
