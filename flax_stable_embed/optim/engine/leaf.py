"""One step of one parameter."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ...ops.counter_random import random_bits
from ...ops.rounding import stochastic_round


def _narrowed(name: str, count: Array, new: Array, old: Array) -> Array:
    """A moment in the dtype that it is stored in. To nearest, a slow mean in bfloat16 would stay where it is."""
    if old.dtype != jnp.bfloat16:
        return new.astype(old.dtype)
    return stochastic_round(new.astype(jnp.float32), old.dtype, random_bits(name, count, old))


def _is_static(hyper: Any) -> bool:
    return hyper is None or isinstance(hyper, int | float) or callable(hyper)
