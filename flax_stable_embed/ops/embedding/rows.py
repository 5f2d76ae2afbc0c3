"""Gradients and updates of some rows of a large table, those that a batch looked up.

A dense gradient of a table has the size of the table, even if a batch looks up a thousandth of its rows. `SparseRows`
holds distinct row numbers and one row of values for each. All other rows are zero. The number of rows is static, so it
works under jit.
"""

from typing import Any

import jax.extend.random
import jax.numpy as jnp
from jax import Array
from jax.tree_util import GetAttrKey

from ..dtypes import at_least_float32
from ..sealed import is_sealed, seal, sealed_type, words_of
from ..sharding import explicit_sharding, placed_like, replicated
from .gather import row_numbers_of, row_sharding, take

_ROW_NUMBERS = sealed_type(
    "fse_row_numbers",
    words=1,
    tag="row numbers of fse.SparseRows, for fse.row_sparse, fse.global_norm and fse.clip_by_global_norm",
    error="Row numbers of a SparseRows cannot be used as random keys. See flax_stable_embed.SparseRows.",
)


def sealed(row_numbers: Array) -> Array:
    """Returns row numbers in the sealed dtype. Row 0 is stored as 1, so that `jnp.zeros_like` means no rows."""
    return seal(row_numbers.astype(jnp.uint32)[..., None] + 1, _ROW_NUMBERS)


def unsealed(numbers: Array, num_rows: int) -> Array:
    """Returns sealed row numbers as int32, and padding as from `distinct` where the sealed number is zero."""
    if not is_sealed(numbers):
        raise TypeError(
            f"The row numbers of a SparseRows were cast to {numbers.dtype}. Cast its values alone: "
            "rows.with_values(rows.values.astype(dtype))."
        )
    found = words_of(numbers)[..., 0].astype(jnp.int32)
    return jnp.where(found == 0, num_rows + jnp.arange(found.shape[-1], dtype=jnp.int32), found - 1)


def distinct(row_numbers: Array, num_rows: int) -> Array:
    """Returns the distinct row numbers in ascending order, padded with distinct numbers from `num_rows` up.

    The size is static: that of `row_numbers`, or `num_rows` if that is less. It takes two sorts and no scatter.

    >>> distinct(jnp.array([[3, 1], [3, 5]]), num_rows=5)
    Array([1, 3, 7, 8], dtype=int32)
    """
    ordered = jnp.sort(replicated(row_numbers).ravel())
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])[: ordered.size]
    found = jnp.sort(jnp.where(first, ordered, num_rows))[:num_rows]
    return jnp.where(found < num_rows, found, num_rows + jnp.arange(found.size, dtype=jnp.int32))


def find_rows(indices: Array, row_numbers: Array, num_rows: int) -> Array:
    """Returns the place of each row number among `indices` (from `distinct`), or `len(indices)` if it is not there."""
    if indices.size == 0:
        return jnp.zeros_like(row_numbers)
    numbers = replicated(row_numbers)
    at = jnp.searchsorted(indices, numbers).astype(jnp.int32)
    found = indices.at[at].get(mode="fill", fill_value=-1) == numbers
    return placed_like(jnp.where(found & (numbers < num_rows), at, indices.size), row_numbers)


def take_rows(table: Array, indices: Array) -> Array:
    """Returns rows of a table, and zeros for padding."""
    return take(table, indices, row_sharding(table, indices, None), fill_value=0)


def placed_like_rows(table: Array, indices: Array, values: Array) -> Array:
    """Returns values for rows of a table. Under a mesh with Explicit axes they are sharded as the rows."""
    sharding = row_sharding(table, indices, None)
    return values if sharding is None else jax.sharding.reshard(values, sharding)


def set_rows(table: Array, indices: Array, values: Array) -> Array:
    """Returns the table with `values` in these distinct rows. A donated table changes in place."""
    return table.at[indices].set(values.astype(table.dtype), **_scatter_options(table))


def add_to_rows(table: Array, indices: Array, values: Array) -> Array:
    """Returns the table with `values` added to these distinct rows, rounded once. A donated table changes in place."""
    if jnp.promote_types(table.dtype, values.dtype) != table.dtype:
        return set_rows(table, indices, take_rows(table, indices) + values)
    return table.at[indices].add(values.astype(table.dtype), **_scatter_options(table))


def _scatter_options(table: Array) -> dict[str, Any]:
    options = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
    return {**options, "out_sharding": explicit_sharding(table)}


@jax.tree_util.register_pytree_with_keys_class
class SparseRows:
    r"""Holds some rows of a (num_rows, features) array whose other rows are zero: a row gradient, or a row update.

    $$x = \sum_k e_{i_k} v_k^T, \quad i_k \text{ distinct}$$

    Always: `indices` (n,) int32 is distinct and ascending. Indices of `num_rows` and more are padding and have zeros as
    values. `values` (n, features) holds one row for each index. n is static; under jit it is the number of ids that
    were looked up.

    It is a pytree with `values` and sealed row numbers as leaves. optax's transforms cannot compute with the sealed
    numbers, so they raise an error instead of scaling or adding row numbers. Zeros of both mean no rows, as
    `jax.tree.map(jnp.zeros_like, grads)` makes them. `fse.row_sparse`, `fse.global_norm`,
    `fse.clip_by_global_norm` and `fse.sum_microbatches` support it. `table + rows` adds the values to the rows of a
    table, so that `optax.apply_updates` works with a row update.

    The names are those of torch's and TensorFlow's sparse gradients. `rows * number`, `rows / number`, `-rows`, `rows +
    rows` (with n1 + n2 rows) and `rows - rows` mean the same as for dense arrays. Inside of `jax.shard_map`, sum over
    devices by `SparseRows.of_lookups(all_gather(rows.indices, axis), all_gather(rows.values, axis), rows.num_rows)`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> gradient = fse.SparseRows.of_lookups(jnp.array([3, 1, 3]), jnp.ones((3, 2)), num_rows=5)
    >>> gradient.indices, gradient.values[:2].tolist()
    (Array([1, 3, 7], dtype=int32), [[1.0, 1.0], [2.0, 2.0]])
    >>> (jnp.zeros((5, 2)) - 0.5 * gradient)[:, 0]
    Array([ 0. , -0.5,  0. , -1. ,  0. ], dtype=float32)
    """

    __array_ufunc__ = None  # NumPy's arrays and numbers leave arithmetic to the methods below

    def __init__(self, indices: Array, values: Array, num_rows: int):
        self._sealed, self.values, self.num_rows = sealed(indices), values, num_rows

    @classmethod
    def of_lookups(cls, ids: Any, terms: Any, num_rows: int) -> "SparseRows":
        """Sums `terms` (*batch, features) over equal `ids` (*batch), in at least float32.

        Negative ids count from the end. Ids outside the table are dropped.

        Raises:
            ValueError: The terms do not fit the ids, or the ids are not integers.
        """
        ids, terms = jnp.asarray(ids), jnp.asarray(terms)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"`ids` must be integers, got {ids.dtype}. Try ids.astype(jnp.int32).")
        if terms.shape[:-1] != ids.shape or terms.ndim == 0:
            raise ValueError(
                f"`terms` must have the shape of `ids`, {ids.shape}, and an axis of features, got {terms.shape}."
            )
        row_numbers = row_numbers_of(ids, num_rows).ravel()
        indices = distinct(row_numbers, num_rows)
        return cls(indices, _summed(indices, row_numbers, terms.reshape(-1, terms.shape[-1]), num_rows), num_rows)

    @property
    def indices(self) -> Array:
        """Returns the row numbers, (n,) int32, distinct and ascending. Those of `num_rows` and more are padding."""
        return unsealed(self._sealed, self.num_rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the shape of the dense array."""
        return self.num_rows, self.values.shape[-1]

    @property
    def dtype(self) -> Any:
        """Returns the dtype of the values."""
        return self.values.dtype

    def with_values(self, values: Array) -> "SparseRows":
        """Returns the same rows with other values."""
        return self.tree_unflatten(self.num_rows, (values, self._sealed))

    def summed_over_first_axis(self) -> "SparseRows":
        """Sums rows that `jax.lax.scan` or `jax.vmap` stacked: indices (k, n), values (k, n, features)."""
        return _merged(self.indices, self.values, self.num_rows)

    def to_dense(self) -> Array:
        """Returns the dense array, (num_rows, features)."""
        return set_rows(jnp.zeros(self.shape, self.dtype), self.indices, self.values)

    def tree_flatten(self):
        return (self.values, self._sealed), self.num_rows

    def tree_flatten_with_keys(self):
        return ((GetAttrKey("values"), self.values), (GetAttrKey("indices"), self._sealed)), self.num_rows

    @classmethod
    def tree_unflatten(cls, num_rows, children):
        new = object.__new__(cls)
        (new.values, new._sealed), new.num_rows = children, num_rows
        return new

    def __repr__(self) -> str:
        return (
            f"SparseRows(indices={getattr(self._sealed, 'shape', '?')}, values={self.values!r}, {self.num_rows} rows)"
        )

    def __radd__(self, table: Any) -> Any:
        if isinstance(table, int) and table == 0:  # the start of `sum`
            return self
        table = jnp.asarray(table)
        if table.shape != self.shape:
            raise ValueError(f"Rows of a table of shape {self.shape} cannot be added to an array of {table.shape}.")
        return add_to_rows(table, self.indices, self.values)

    def __rsub__(self, table: Any) -> Array:
        return (-self).__radd__(table)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, SparseRows):
            return self.__radd__(other)
        if other.shape != self.shape:
            raise ValueError(f"Rows of tables of the shapes {self.shape} and {other.shape} cannot be added.")
        indices = jnp.concatenate([self.indices, other.indices])
        return _merged(indices, jnp.concatenate([self.values, other.values]), self.num_rows)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __neg__(self) -> "SparseRows":
        return self.with_values(-self.values)

    def __mul__(self, factor: Any) -> "SparseRows":
        return self.with_values(self.values * _scalar(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "SparseRows":
        return self.with_values(self.values / _scalar(divisor))


def _scalar(x: Any) -> Any:
    if jnp.ndim(x) != 0:
        raise ValueError(f"SparseRows can only be multiplied by numbers, got an array of shape {jnp.shape(x)}.")
    return x


def _merged(indices: Array, values: Array, num_rows: int) -> SparseRows:
    """Returns one SparseRows of concatenated rows, with rows of equal number summed."""
    row_numbers = jnp.minimum(indices.ravel(), num_rows)
    kept = distinct(row_numbers, num_rows)
    return SparseRows(kept, _summed(kept, row_numbers, values.reshape(-1, values.shape[-1]), num_rows), num_rows)


def _summed(indices: Array, row_numbers: Array, terms: Array, num_rows: int) -> Array:
    wide = jnp.zeros((indices.size, terms.shape[-1]), at_least_float32(terms.dtype))
    at = find_rows(indices, row_numbers, num_rows)
    return wide.at[at].add(terms.astype(wide.dtype), mode="drop").astype(terms.dtype)


def is_sparse_rows(x: Any) -> bool:
    """Returns whether `x` is a SparseRows, for the `is_leaf` of tree functions."""
    return isinstance(x, SparseRows)


def is_none_or_rows(x: Any) -> bool:
    """Returns whether `x` is None or a SparseRows, for the `is_leaf` of functions over trees of gradients."""
    return x is None or is_sparse_rows(x)
