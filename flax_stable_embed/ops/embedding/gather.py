"""Rows of a table by number, with the gradient of that written down as one forward-mode rule.

    rows_i = table[ids_i];      d rows_i = s_i * d table[ids_i]

A rule instead of the bare chain rule, because s_i gives the torch options their meaning, the sum of a
repeated token's terms can be float32 whatever the table's dtype, and inference pays for none of it. A
forward-mode rule instead of a custom_vjp, because forward mode, vmap and explicit sharding then work as for
any jax function.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..dtypes import INT32_MAX, at_least_float32

Sharding = NamedSharding | PartitionSpec | None
Mode = Literal["fill", "clip", "promise_in_bounds"]


class GatherOptions(NamedTuple):
    """What one gather was asked for: static and hashable, since the rule gets it as well.

    padding_idx gets no gradient; by_frequency divides a row's gradient by how often it appears; sharding is that of
    the rows, None where no mesh axis is Explicit; dtype is theirs too, and the terms of the gradient arrive in it.
    in_bounds promises that every row number is in the table; one_hot multiplies with a one-hot matrix.
    """

    padding_idx: int | None
    by_frequency: bool
    sharding: NamedSharding | None
    dtype: np.dtype
    in_bounds: bool = False
    one_hot: bool = False


def gather(options: GatherOptions, table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """Rows of `table` (NaN for the number one past its end), with the gradient that `options` name."""
    no_option = options.padding_idx is None and not options.by_frequency and not options.one_hot
    by_chain_rule = no_option and not _sorts(options, table) and table.dtype == at_least_float32(table.dtype)
    if by_chain_rule or not jnp.issubdtype(table.dtype, jnp.inexact):
        return plain_gather(options, table, row_numbers)
    return _gather(options, table, row_numbers)


def plain_gather(options: GatherOptions, table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """The rows alone, in the dtype that was asked for."""
    if options.one_hot:
        return _product(options, table, row_numbers, table.dtype).astype(options.dtype)
    return take(table, row_numbers, options.sharding, in_bounds=options.in_bounds).astype(options.dtype)


_gather = jax.custom_jvp(plain_gather, nondiff_argnums=(0,))


@_gather.defjvp
def _gather_jvp(options: GatherOptions, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    table, row_numbers = primals
    return _gather(options, table, row_numbers), rows_of_tangent(options, tangents[0], row_numbers)


def rows_of_tangent(options: GatherOptions, d_table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """Linear in d table, so that its transpose is the scatter-add of the gradient: float32, rounded once.

    Casting all of d table costs nothing compiled: XLA fuses the cast into the gather (the same bytes
    accessed).
    """
    num_rows = d_table.shape[0]
    d_table = d_table.astype(at_least_float32(d_table.dtype))
    live = row_numbers
    if options.padding_idx is not None:  # a row outside the table has no gradient, were its cotangent infinite
        live = jnp.where(row_numbers == options.padding_idx, num_rows, row_numbers)
    if options.one_hot:
        d_rows = _product(options, d_table, live, options.dtype, fill_value=0)
    elif _sorts(options, d_table):
        d_rows = _take_sorted(d_table, live)
    else:
        in_bounds = options.in_bounds and options.padding_idx is None
        d_rows = take(d_table, live, options.sharding, fill_value=0, in_bounds=in_bounds)
    if options.by_frequency:
        d_rows = d_rows / _counts(options, row_numbers, num_rows)[..., None].astype(d_rows.dtype)
    return d_rows.astype(options.dtype)


def take(
    table: jax.Array,
    row_numbers: jax.Array,
    sharding: NamedSharding | None,
    fill_value: Any = None,
    in_bounds: bool = False,
) -> jax.Array:
    """Rows by number; `fill_value` (None: NaN) for those outside the table unless `in_bounds`."""
    if table.shape[0] == 0:  # XLA cannot gather from nothing: one row more, and every number past it
        table, row_numbers = jnp.pad(table, [(0, 1)] + [(0, 0)] * (table.ndim - 1)), row_numbers + 1
    at = table.at[row_numbers]
    if in_bounds:
        return at.get(mode="promise_in_bounds", wrap_negative_indices=False, out_sharding=sharding)
    return at.get(mode="fill", fill_value=fill_value, wrap_negative_indices=False, out_sharding=sharding)


def _sorts(options: GatherOptions, table: jax.Array) -> bool:
    """Whether the terms of the gradient are sorted before they are added to the table.

    On TPU, XLA does that itself up to 2^15 rows; beyond, sorted terms have half the estimated time (compiled for v5e,
    2^16 rows) to 0.7 of it (2^18). Not on several chips, where sorting terms of a cut batch would gather them.
    """
    alone = jax.default_backend() == "tpu" and jax.device_count() == 1 and options.sharding is None
    return alone and not options.one_hot and table.shape[0] > 2**15


def _take_sorted(table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """`take` with zeros outside, whose transpose gathers the terms into the order of the rows and adds them in it."""
    flat = row_numbers.ravel()
    order = jnp.argsort(flat)
    at = table.at[flat[order]]
    rows = at.get(mode="fill", fill_value=0, wrap_negative_indices=False, indices_are_sorted=True)
    rows = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True, mode="promise_in_bounds")
    return rows.reshape(*row_numbers.shape, table.shape[1])


def _product(
    options: GatherOptions, table: jax.Array, row_numbers: jax.Array, factor: Any, fill_value: Any = None
) -> Any:
    """The rows as a product with a one-hot matrix: no gather, and in the gradient no scatter but a product as well.

    Exact: each element is one product with 1, for which bfloat16 needs one pass through the matrix unit, and wider
    factors (of the rows, or of the gradient's terms) all of them.
    """
    one_hot = jax.nn.one_hot(row_numbers, table.shape[0], dtype=table.dtype)
    precision = None if factor == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    rows = jnp.dot(one_hot, table, precision=precision, out_sharding=options.sharding)
    if options.in_bounds or fill_value == 0:
        return rows
    outside = (row_numbers >= table.shape[0])[..., None]
    return jnp.where(outside, _filler(table.dtype), rows)


def _filler(dtype: Any) -> Any:
    """What `jnp.take` has for rows outside of the table."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    info = jnp.iinfo(dtype)
    return jnp.asarray(info.min if info.min < 0 else info.max, dtype)


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


def row_numbers_of(ids: Any, num_rows: int, mode: Mode = "fill") -> jax.Array:
    """Ids of any integer type as int32 row numbers; `num_rows` stands for every id outside the table.

    With "clip" the first or last row does, also for negative ids; "promise_in_bounds" takes ids as they are.

    Narrow types widen before the sum that wraps negative ids, and wide ones are clipped (by numpy where the
    ids are its own) before they narrow, so that no id turns into another one.
    """
    if mode == "promise_in_bounds":
        return jnp.asarray(ids).astype(jnp.int32)
    if jnp.iinfo(ids.dtype).max > INT32_MAX:
        lowest = max(int(jnp.iinfo(ids.dtype).min), -num_rows - 1)
        clip: Any = np.clip if isinstance(ids, (np.ndarray, np.generic)) else jnp.clip
        ids = clip(ids, lowest, num_rows)
    ids = jnp.asarray(ids).astype(jnp.int32)
    if mode == "clip":
        return jnp.clip(ids, 0, max(num_rows - 1, 0))
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
    of_features = (tuple(axis for axis in _mesh_axes(entry) if axis not in by_ids) for entry in of_table.spec[1:])
    return NamedSharding(mesh, PartitionSpec(*of_ids.spec, *(axes or None for axes in of_features)))


def _mesh_axes(entry: Any) -> tuple:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
