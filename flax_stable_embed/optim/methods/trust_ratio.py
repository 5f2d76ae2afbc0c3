"""Scales the update of a parameter by norms: the trust ratio of LARS and LAMB, and the clipping of bitsandbytes.

    trust ratio  coefficient * |p| / (|u| + eps), or 1 if |p| or |u| is 0
    clipping     min(1, max_unorm * |p| / |u|), or 1 if |p| is 0, because such a parameter would never move

A norm is taken over the finite elements of the full parameter, so a NaN does not spread to other elements.
Trust ratio: You et al. 2017, eq. 6 (arXiv:1708.03888), as in `optax.scale_by_trust_ratio`. Clipping: `max_unorm` of
bitsandbytes, which never makes a step longer.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from ..arguments import check_numbers


def trust_ratio(u: Array, p: Array, coefficient: float = 1.0, eps: float = 0.0) -> Array:
    """Returns the trust ratio of `u`, a scalar, with the same operations in the same order as in optax."""
    p_norm, u_norm = optax.safe_norm(_finite(p), 0.0), optax.safe_norm(_finite(u), 0.0)
    ratio = coefficient * p_norm / (u_norm + eps)
    return jnp.where((p_norm == 0.0) | (u_norm == 0.0), jnp.ones((), p.dtype), ratio)


def clipping(u: Array, p: Array, max_unorm: float | Array) -> Array:
    """Returns the factor by which `u` is clipped, a scalar of at most 1."""
    p_norm, u_norm = optax.safe_norm(_finite(p), 0.0), optax.safe_norm(_finite(u), 0.0)
    limit = max_unorm * p_norm
    return jnp.where((u_norm > limit) & (limit > 0), limit / jnp.where(u_norm > 0, u_norm, 1.0), 1.0)


def clipped(max_unorm: Any) -> Callable[[Array, Array], Array] | None:
    """Returns a function `(u, p) -> u` that clips, or None if `max_unorm` is None.

    Raises:
        TypeError: `max_unorm` is not a number.
    """
    if max_unorm is None:
        return None
    check_numbers(max_unorm=max_unorm)
    return lambda u, p: u * clipping(u, p, max_unorm)


def _finite(u: Array) -> Array:
    return jnp.where(jnp.isfinite(u), u, jnp.zeros_like(u))
