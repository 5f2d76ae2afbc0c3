"""Rows of a table by number, with the gradient of that written down as one forward-mode rule.

    rows_i = table[ids_i];      d rows_i = s_i * d table[ids_i]

A rule instead of the bare chain rule, because s_i gives the torch options their meaning, the sum of a
repeated token's terms can be float32 whatever the table's dtype, and inference pays for none of it. A
forward-mode rule instead of a custom_vjp, because forward mode, vmap and explicit sharding then work as for
any jax function.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

INT32_MAX = np.iinfo(np.int32).max

Sharding = NamedSharding | PartitionSpec | None


class GatherOptions(NamedTuple):
    """What one gather was asked for: static and hashable, since the rule gets it as well.

    padding_idx gets no gradient; by_frequency divides a row's gradient by how often it appears; sharding is that of
    the rows, None where no mesh axis is Explicit; dtype is theirs too, and the terms of the gradient arrive in it.
    """

    padding_idx: int | None
    by_frequency: bool
    sharding: NamedSharding | None
    dtype: np.dtype


def at_least_float32(dtype: Any) -> np.dtype:
    """The dtype to compute in: float32 for integers and narrow floats, else the dtype itself.

    >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)


def gather(options: GatherOptions, table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """Rows of `table` (NaN for the number one past its end), with the gradient that `options` name."""
    no_option = options.padding_idx is None and not options.by_frequency
    by_chain_rule = no_option and table.dtype == at_least_float32(table.dtype)
    if by_chain_rule or not jnp.issubdtype(table.dtype, jnp.inexact):
        return _gather_primal(options, table, row_numbers)
    return _gather(options, table, row_numbers)


def _gather_primal(options: GatherOptions, table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    return _take(table, row_numbers, options.sharding).astype(options.dtype)


_gather = jax.custom_jvp(_gather_primal, nondiff_argnums=(0,))


@_gather.defjvp
def _gather_jvp(options: GatherOptions, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Linear in d table, so that its transpose is the scatter-add of the gradient: float32, rounded once.

    Casting all of d table costs nothing compiled: XLA fuses the cast into the gather (the same bytes
    accessed).
    """
    table, row_numbers = primals
    d_table = tangents[0].astype(at_least_float32(table.dtype))
    live = row_numbers
    if options.padding_idx is not None:  # a row outside the table has no gradient, were its cotangent infinite
        live = jnp.where(row_numbers == options.padding_idx, table.shape[0], row_numbers)
    d_rows = _take(d_table, live, options.sharding, fill_value=0)
    if options.by_frequency:
        d_rows = d_rows / _counts(options, row_numbers, table.shape[0])[..., None].astype(d_rows.dtype)
    return _gather(options, table, row_numbers), d_rows.astype(options.dtype)


def _take(table, row_numbers, sharding, fill_value=None):
    if table.shape[0] == 0:  # XLA cannot gather from nothing: one row more, and every number past it
        table, row_numbers = jnp.pad(table, ((0, 1), (0, 0))), row_numbers + 1
    at = table.at[row_numbers]
    return at.get(mode="fill", fill_value=fill_value, wrap_negative_indices=False, out_sharding=sharding)


def _counts(options: GatherOptions, row_numbers: jax.Array, num_rows: int) -> jax.Array:
    """How often each of the row numbers appears among them."""
    everywhere = per_id = None
    if options.sharding is not None:
        mesh, spec = options.sharding.mesh, options.sharding.spec
        everywhere = NamedSharding(mesh, PartitionSpec(None))
        per_id = NamedSharding(mesh, PartitionSpec(*spec[: row_numbers.ndim]))
    counts = jnp.zeros(num_rows + 1, jnp.int32)  # the last one counts the ids outside the table
    counts = counts.at[row_numbers].add(1, out_sharding=everywhere)
    return counts.at[row_numbers].get(out_sharding=per_id)


def row_numbers_of(ids: Any, num_rows: int) -> jax.Array:
    """Ids of any integer type as int32 row numbers; `num_rows` stands for every id outside the table.

    Narrow types widen before the sum that wraps negative ids, and wide ones are clipped (by numpy where the
    ids are its own) before they narrow, so that no id turns into another one.
    """
    if jnp.iinfo(ids.dtype).max > INT32_MAX:
        lowest = max(int(jnp.iinfo(ids.dtype).min), -num_rows - 1)
        clip: Any = np.clip if isinstance(ids, (np.ndarray, np.generic)) else jnp.clip
        ids = clip(ids, lowest, num_rows)
    ids = jnp.asarray(ids).astype(jnp.int32)
    ids = jnp.where(ids < 0, ids + num_rows, ids)
    return jnp.where((ids >= 0) & (ids < num_rows), ids, num_rows)


def row_sharding(table: jax.Array, row_numbers: jax.Array, wanted: Sharding) -> NamedSharding | None:
    """The sharding of the rows; None where no mesh axis is Explicit.

    Unless it is given: the ids' own, then that of the features less the mesh axes that the ids use already.
    """
    of_table, of_ids = jax.typeof(table).sharding, jax.typeof(row_numbers).sharding
    context = jax.sharding.get_abstract_mesh()
    meshes = (getattr(wanted, "mesh", None), of_table.mesh, of_ids.mesh, context)
    mesh = next((m for m in meshes if m is not None and AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return None
    if wanted is not None:
        return NamedSharding(mesh, wanted.spec if isinstance(wanted, NamedSharding) else wanted)
    by_ids = {axis for entry in of_ids.spec for axis in _mesh_axes(entry)}
    by_features = tuple(axis for axis in _mesh_axes(of_table.spec[1]) if axis not in by_ids)
    return NamedSharding(mesh, PartitionSpec(*of_ids.spec, by_features or None))


def _mesh_axes(entry: Any) -> tuple:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
