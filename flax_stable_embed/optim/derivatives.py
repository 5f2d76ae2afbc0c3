"""Refuses or replaces the derivatives of arrays whose bits are rounded or sealed.

JAX takes such a derivative for zero and says nothing. `refuse_derivative` raises instead, and `straight_through` gives
the derivative of the array before it was rounded.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def refuse_derivative(x: Any, error: str) -> Any:
    """Returns `x`, through which no derivative can flow. One that reaches it raises a TypeError that says `error`."""
    return _refused(x, error) if jnp.issubdtype(x.dtype, jnp.inexact) else x


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _refused(x: Array, error: str) -> Array:
    del error
    return x


def _raise_if_differentiated(error: str, primals: tuple, tangents: tuple) -> tuple:
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        raise TypeError(error)
    return primals[0], tangents[0]


_refused.defjvp(_raise_if_differentiated, symbolic_zeros=True)


@jax.custom_jvp
def straight_through(x: Array, unrounded: Array) -> Array:
    """Returns `x` with the derivative of `unrounded`, an array of the same shape and dtype."""
    del unrounded
    return x


straight_through.defjvps(None, lambda tangent, *_: tangent)
