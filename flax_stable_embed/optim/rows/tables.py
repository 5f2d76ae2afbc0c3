"""Finds the embedding tables among the parameters, and the rows of them that a batch looks up.

A table is a parameter with two axes, (num_embeddings, features), for which `mask` is True. Without a `mask` it is one
with the name of an embedding, as in the default rules of `adamw8bit`. The looked-up rows are given by `token_ids`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ops.embedding.gather import row_numbers_of
from ..arguments import broadcast_mask
from ..boxes import unbox
from ..storage.defaults import EMBEDDING
from ..trees import Mask


def is_table(path: str, leaf: Any) -> bool:
    """Returns whether a parameter is a table by default: it has two axes and the name of an embedding.

    A bare array in the place of a tree has no name. It is a table if it has two axes.
    """
    return len(getattr(unbox(leaf), "shape", ())) == 2 and bool(not path or EMBEDDING.search(path))


def are_tables(mask: Mask, tree: Any, paths: list[str], leaves: list[Any]) -> list[bool]:
    """Returns for each parameter (or its gradient) whether it is a table.

    Args:
        mask: Pytree of booleans with the structure of the parameters (or a prefix of it), a function that takes `tree`
            and returns one, or None for the default of `is_table`.
        tree: The parameters or their gradients.
        paths: The path of each leaf of `tree`.
        leaves: The leaves of `tree`.

    Raises:
        ValueError: `mask` has another structure, or is True for a parameter that does not have two axes.
    """
    # The placeholders of optax.tree.map_params have no shape, and a mask may have been made for arrays.
    if mask is None or not any(hasattr(unbox(x), "shape") for x in leaves):
        return [is_table(path, x) for path, x in zip(paths, leaves)]
    chosen = broadcast_mask("mask", mask, tree)
    for is_chosen, path, x in zip(chosen, paths, leaves):
        shape = getattr(unbox(x), "shape", (0, 0))
        if is_chosen and len(shape) != 2:
            raise ValueError(
                f"`mask` is True for {path!r}, which has shape {shape}. A table has two axes; set `mask` to False "
                "there."
            )
    return chosen


def row_numbers_by_path(token_ids: Any, tables: Mapping[str, int], known: Mapping[str, int]) -> dict[str, jax.Array]:
    """Returns the row numbers that a batch looks up in each table, as one flat array per path.

    Args:
        token_ids: As the user gives them: an array of any shape if there is one table, or a mapping from paths to
            arrays or sequences of arrays.
        tables: The number of rows of each table, by path.
        known: The number of rows of every parameter that `token_ids` may name, by path.

    Raises:
        ValueError: One array for several tables or none, an unknown path, or ids that are not integers.
        TypeError: The ids are not arrays.
    """
    if not isinstance(token_ids, Mapping):
        if len(tables) != 1:
            raise ValueError(
                f"`token_ids` is one array, but there are {len(tables)} tables: {_listed(tables)}. Name the table: "
                f"token_ids={{'path/of/embedding': ids}}. The parameters with two axes are: {_listed(known)}."
            )
        token_ids = {next(iter(tables)): token_ids}
    if unknown := [path for path in token_ids if path not in known]:
        raise ValueError(f"`token_ids` names {unknown[0]!r}, which is not a table. It may name: {_listed(known)}.")
    return {path: _row_numbers(path, ids, known[path]) for path, ids in token_ids.items()}


def _row_numbers(path: str, ids: Any, num_rows: int) -> jax.Array:
    """Returns the row numbers of one table as a flat array; ids outside the table become `num_rows`."""
    several = ids if isinstance(ids, list | tuple) else [ids]
    flat = []
    for one in several:
        if not hasattr(one, "dtype"):
            raise TypeError(f"`token_ids` of {path!r} must be an array of integers, got {one!r:.80}.")
        if not jnp.issubdtype(one.dtype, np.integer):
            raise ValueError(f"`token_ids` of {path!r} must be integers, got {one.dtype}.")
        # As in Flax, every id looks up row 0 of a table with one row.
        numbers = jnp.zeros(one.shape, jnp.int32) if num_rows == 1 else row_numbers_of(one, num_rows)
        flat.append(numbers.ravel())
    return jnp.concatenate(flat) if flat else jnp.zeros(0, jnp.int32)


def _listed(paths: Mapping[str, int]) -> str:
    """Returns the first eight paths as text, for an error message."""
    names = list(paths)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "-"
