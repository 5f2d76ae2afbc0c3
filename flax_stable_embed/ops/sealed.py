"""Dtypes that nothing can compute with by accident.

Code that scales, adds, casts or compares such an array gets an error, and the text of the error has a tag that says
what the array holds. `jnp.zeros_like`, `jnp.where`, `jax.lax.cond` and everything that only moves arrays work. JAX has
such dtypes for random keys, so the arrays here are keys that cannot make random numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax import Array

from .jax_compat import register_key_type


class _Refusal(NamedTuple):
    """A function that raises. Pickle finds it, unlike one that is defined in a function."""

    error: str

    def __call__(self, *args: Any) -> Any:
        raise TypeError(self.error)


def sealed_type(name: str, *, words: int, tag: str, error: str) -> Any:
    """Defines a dtype whose elements are 32-bit words.

    Args:
        name: The name by which a checkpoint loader finds the dtype.
        words: The number of words of an element.
        tag: What the arrays hold, for JAX's own errors.
        error: The error for code that takes the arrays for random keys.
    """
    functions = dict.fromkeys(("seed", "split", "random_bits", "fold_in"), _Refusal(error))
    found = jax.extend.random.define_prng_impl(key_shape=(words,), name=name, tag=tag, **functions)
    register_key_type(found)
    return found


def seal(words: Array, sealed: Any) -> Array:
    """Returns uint32 words, whose last axis is that of an element, in a dtype of `sealed_type`."""
    return jax.random.wrap_key_data(words, impl=sealed)


def is_sealed(x: Any) -> bool:
    """Returns whether `x` is an array of such a dtype."""
    return jnp.issubdtype(getattr(x, "dtype", np.object_), jax.dtypes.prng_key)


def words_of(x: Array) -> Array:
    """Returns the words that were sealed."""
    return jax.random.key_data(x)
