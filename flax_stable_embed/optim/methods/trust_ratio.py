"""How far one step moves a whole parameter: the trust ratio of LARS and LAMB, and the clipping of bitsandbytes.

    trust ratio  coefficient * |p| / (|u| + eps); 1 where |p| or |u| is 0
    clipping     min(1, max_unorm * |p| / |u|); 1 where |p| is 0, or such a parameter would never move

Norms are of whole parameters, over elements that are finite: one NaN stays one NaN.
Trust ratio: You et al. 2017, eq. 6 (arXiv:1708.03888), as `optax.scale_by_trust_ratio` has it. Clipping: bitsandbytes'
`max_unorm`, which never makes a step longer.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from ..arguments import check_numbers


def trust_ratio(u: Array, p: Array, coefficient: float = 1.0, eps: float = 0.0) -> Array:
    """The factor for `u`, a scalar, operation by operation as optax computes it."""
    p_norm, u_norm = optax.safe_norm(_finite(p), 0.0), optax.safe_norm(_finite(u), 0.0)
    ratio = coefficient * p_norm / (u_norm + eps)
    return jnp.where((p_norm == 0.0) | (u_norm == 0.0), jnp.ones((), p.dtype), ratio)


def clipping(u: Array, p: Array, max_unorm: float | Array) -> Array:
    """The factor for `u`, a scalar of at most 1."""
    p_norm, u_norm = optax.safe_norm(_finite(p), 0.0), optax.safe_norm(_finite(u), 0.0)
    limit = max_unorm * p_norm
    return jnp.where((u_norm > limit) & (limit > 0), limit / jnp.where(u_norm > 0, u_norm, 1.0), 1.0)


def clipped(max_unorm: Any) -> Callable[[Array, Array], Array] | None:
    """`(u, p) -> u`, clipped; None where `max_unorm` is.

    Raises:
        TypeError: it is no number.
    """
    if max_unorm is None:
        return None
    check_numbers(max_unorm=max_unorm)
    return lambda u, p: u * clipping(u, p, max_unorm)


def _finite(u: Array) -> Array:
    return jnp.where(jnp.isfinite(u), u, jnp.zeros_like(u))
