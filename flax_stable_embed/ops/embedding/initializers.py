"""Initializes an embedding table: Xavier uniform, a pretrained table, a padding row of zeros.

These are initializers as in Flax, `init(key, shape, dtype) -> table`, so `jax.nn.initializers` fit as well. The default
is that of torch and bitsandbytes. Flax's default has the variance 1 / features instead.

A module has to recognize `pretrained`, because its padding row stays as given, while the padding row of any other table
is set to zero.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., Any]


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns a random table, as in `reset_parameters` of torch and bitsandbytes. An empty table is allowed, as there.

        U(-a, a),  a = sqrt(6 / (num_embeddings + features))

    >>> xavier_uniform(jax.random.key(0), (0, 4)).shape
    (0, 4)
    """
    if 0 in shape:
        return jnp.zeros(shape, dtype)
    return jax.nn.initializers.xavier_uniform()(key, shape, dtype)


def pretrained(table: Any) -> "Pretrained":
    """Returns an initializer that starts from a given table, as torch's `_weight` and `from_pretrained` do.

    The table is cast to `param_dtype` and otherwise used as given. Its padding row is not set to zero. This also holds
    inside a wrapper such as `nn.with_partitioning`. The table is trainable; mask it out of the optimizer to freeze it.
    Under `jax.jit` the table becomes a constant of the compiled initialization, so initialize outside of `jax.jit` if
    it is large.

    Args:
      table: (num_embeddings, features), a JAX or NumPy array, or nested lists.

    Raises:
      ValueError: The table is not 2-D, or does not have the shape of the parameter that a module initializes.

    >>> pretrained([[1.0, 2.0]])(jax.random.key(0), (1, 2), jnp.float32)
    Array([[1., 2.]], dtype=float32)
    """
    return Pretrained(table if hasattr(table, "shape") else np.asarray(table))


class Pretrained:
    """The initializer of `pretrained`: a class, so that it can be recognized, and pickled with the module."""

    def __init__(self, table: Any):
        if len(table.shape) != 2:
            raise ValueError(f"`table` must have shape (num_embeddings, features), got {tuple(table.shape)}.")
        self.table = table

    def __call__(self, key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        if tuple(self.table.shape) != tuple(shape):
            raise ValueError(
                f"`table` has shape {tuple(self.table.shape)}, but the module needs {tuple(shape)}. Build the module "
                "with the num_embeddings and features of the table."
            )
        return jnp.array(self.table, dtype)  # a copy, because a training step may donate it

    def __repr__(self) -> str:
        return f"pretrained(<table of shape {tuple(self.table.shape)}>)"


def is_pretrained(initializer: Initializer) -> bool:
    """Returns whether an initializer is `pretrained(...)`, also inside of Flax's wrappers that add metadata."""
    return isinstance(inspect.unwrap(initializer), Pretrained)


def zero_padding_row(table: jax.Array, padding_idx: int) -> jax.Array:
    """Returns the table with row `padding_idx` set to zero, without a scatter, which refuses a sharded table."""
    is_padding = jnp.arange(table.shape[0]) == padding_idx
    return jnp.where(is_padding[:, None], jnp.zeros((), table.dtype), table)
