"""Which parameters are embedding tables, and which of their rows a batch looks up."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ops.embedding.gather import row_numbers_of
from ..arguments import broadcast_mask
from ..boxes import unbox
from ..storage.defaults import EMBEDDING


def is_table(path: str, leaf: Any) -> bool:
    """Whether a parameter is a table by default: it has rows, and the name of an embedding or, alone, none."""
    return len(getattr(unbox(leaf), "shape", ())) == 2 and bool(not path or EMBEDDING.search(path))


def are_tables(mask: Any, tree: Any, paths: list[str], leaves: list[Any]) -> list[bool]:
    """Which parameters, or their gradients, are tables: what `mask` says, or by default."""
    if mask is None or not any(hasattr(unbox(x), "shape") for x in leaves):  # optax's placeholder has none
        return [is_table(path, x) for path, x in zip(paths, leaves)]
    chosen = broadcast_mask("mask", mask(tree) if callable(mask) else mask, tree)
    for is_chosen, path, x in zip(chosen, paths, leaves):
        shape = getattr(unbox(x), "shape", (0, 0))
        if is_chosen and len(shape) != 2:
            raise ValueError(f"`mask` names {path!r} as a table, but it has the shape {shape}: tables have two axes.")
    return chosen


def row_numbers_by_path(token_ids: Any, tables: Mapping[str, int], known: Mapping[str, int]) -> dict[str, jax.Array]:
    """The row numbers that a batch looks up in each table, flat.

    Args:
        token_ids: as the user gives them: an array of any shape, for the one table that there is; or by path, arrays or
            sequences of arrays.
        tables: the number of rows of each table by its path.
        known: the same of everything that may be named.

    Raises:
        ValueError: one array for several tables, a path that is none, ids that are no integers.
        TypeError: something else than arrays.
    """
    if not isinstance(token_ids, Mapping):
        if len(tables) != 1:
            raise ValueError(
                f"`token_ids` is one array, but there are {len(tables)} tables: {', '.join(tables) or '-'}. Name the "
                "table: token_ids={'path/of/embedding': ids}. Other parameters: " + _listed(known)
            )
        token_ids = {next(iter(tables)): token_ids}
    if unknown := [path for path in token_ids if path not in known]:
        raise ValueError(f"`token_ids` names {unknown[0]!r}, which is no table. There are: {_listed(known)}.")
    return {path: _row_numbers(path, ids, known[path]) for path, ids in token_ids.items()}


def _row_numbers(path: str, ids: Any, num_rows: int) -> jax.Array:
    several = ids if isinstance(ids, list | tuple) else [ids]
    flat = []
    for one in several:
        if not hasattr(one, "dtype"):
            raise TypeError(f"`token_ids` of {path!r} must be an array of integers, got {one!r:.80}.")
        if not jnp.issubdtype(one.dtype, np.integer):
            raise ValueError(f"`token_ids` of {path!r} must be integers, got {one.dtype}.")
        # The one row of a table stands for every id, as in Flax.
        numbers = jnp.zeros(one.shape, jnp.int32) if num_rows == 1 else row_numbers_of(one, num_rows)
        flat.append(numbers.ravel())
    return jnp.concatenate(flat) if flat else jnp.zeros(0, jnp.int32)


def _listed(paths: Mapping[str, int]) -> str:
    names = list(paths)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "-"
