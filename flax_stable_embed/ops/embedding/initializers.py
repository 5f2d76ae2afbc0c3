"""How a table begins: Xavier, pretrained, a zero padding row."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., Any]


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The initial table of torch's and bitsandbytes' reset_parameters; an empty one is allowed, as there.

        U(-a, a),  a = sqrt(6 / (num_embeddings + features))

    >>> xavier_uniform(jax.random.key(0), (0, 4)).shape
    (0, 4)
    """
    if 0 in shape:
        return jnp.zeros(shape, dtype)
    return jax.nn.initializers.xavier_uniform()(key, shape, dtype)


def pretrained(table: Any) -> Initializer:
    """An initializer that returns `table`: torch's `_weight` and `from_pretrained`.

    The table is used as given: cast to `param_dtype`, its padding row not zeroed, also inside a wrapper such
    as `nn.with_partitioning`. It stays trainable: mask it out of the optimizer to freeze it. Under `jax.jit`
    the table becomes a constant of the compiled initialization, so initialize outside of it with a large one.

    Args:
      table: (num_embeddings, features), a jax or numpy array or nested lists.

    Raises:
      ValueError: the table is not 2-D, or (when a module initializes its parameter) not of the module's
        shape.

    >>> pretrained([[1.0, 2.0]])(jax.random.key(0), (1, 2), jnp.float32)
    Array([[1., 2.]], dtype=float32)
    """
    return _Pretrained(table if hasattr(table, "shape") else np.asarray(table))


class _Pretrained:
    """A class and not a closure: it can be recognised, and pickled together with the module that holds it."""

    def __init__(self, table: Any):
        if len(table.shape) != 2:
            raise ValueError(f"`table` must be of shape (num_embeddings, features), got {tuple(table.shape)}.")
        self.table = table

    def __call__(self, key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        if tuple(self.table.shape) != tuple(shape):
            raise ValueError(
                f"`table` has shape {tuple(self.table.shape)}, but the module wants {tuple(shape)}. "
                "Give it the table's own num_embeddings and features."
            )
        return jnp.array(self.table, dtype)  # a copy: a training step may donate it

    def __repr__(self) -> str:
        return f"pretrained(<table of shape {tuple(self.table.shape)}>)"


def is_pretrained(initializer: Initializer) -> bool:
    """Whether an initializer is `pretrained(...)`, looking through Flax's wrappers that add metadata."""
    return isinstance(inspect.unwrap(initializer), _Pretrained)


def zero_padding_row(table: jax.Array, padding_idx: int) -> jax.Array:
    """The table with row `padding_idx` set to zero (a scatter would refuse a sharded table)."""
    is_padding = jnp.arange(table.shape[0]) == padding_idx
    return jnp.where(is_padding[:, None], jnp.zeros((), table.dtype), table)
