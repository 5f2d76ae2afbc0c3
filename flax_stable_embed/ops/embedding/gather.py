"""Gathers rows of a table by number, with the derivative as one forward-mode rule.

    rows_i = table[ids_i];      d rows_i = s_i * d table[ids_i]

It is a rule of our own for three reasons. The factor s_i implements torch's options for the gradient. The gradient
terms of a token that repeats are summed in float32 whatever the dtype of the table. Inference pays for none of it.

It is a forward-mode rule and not a custom_vjp, because forward mode, vmap and explicit sharding then work as for any
JAX function.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..dtypes import INT32_MAX, at_least_float32

Sharding = NamedSharding | PartitionSpec | None
Mode = Literal["fill", "clip", "promise_in_bounds"]


class GatherOptions(NamedTuple):
    """Static options of one gather; hashable, because the derivative rule gets them too.

    padding_idx: The row that gets no gradient; None if every row gets one.
    by_frequency: True to divide the gradient of a row by the number of times that it is looked up.
    sharding: The sharding of the rows; None if no mesh axis is Explicit.
    dtype: The dtype of the rows. The terms of the gradient have it too.
    in_bounds: True if the caller promises that every row number is in the table.
    one_hot: True to multiply with a one-hot matrix instead of gathering.
    """

    padding_idx: int | None
    by_frequency: bool
    sharding: NamedSharding | None
    dtype: np.dtype
    in_bounds: bool = False
    one_hot: bool = False


def gather(options: GatherOptions, table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """Returns rows of `table`, with the gradient that `options` define. The number `len(table)` gives a row of NaN."""
    no_option = options.padding_idx is None and not options.by_frequency and not options.one_hot
    by_chain_rule = no_option and not _sorts(options, table) and table.dtype == at_least_float32(table.dtype)
    if by_chain_rule or not jnp.issubdtype(table.dtype, jnp.inexact):
        return plain_gather(options, table, row_numbers)
    return _gather(options, table, row_numbers)


def plain_gather(options: GatherOptions, table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """Returns the rows in `options.dtype`, with the gradient of plain operations."""
    if options.one_hot:
        return _product(options, table, row_numbers, table.dtype).astype(options.dtype)
    return take(table, row_numbers, options.sharding, in_bounds=options.in_bounds).astype(options.dtype)


_gather = jax.custom_jvp(plain_gather, nondiff_argnums=(0,))


@_gather.defjvp
def _gather_jvp(options: GatherOptions, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    table, row_numbers = primals
    return _gather(options, table, row_numbers), rows_of_tangent(options, tangents[0], row_numbers)


def rows_of_tangent(options: GatherOptions, d_table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """Returns the tangent of the rows.

    It is linear in the tangent of the table. Its transpose is the scatter-add of the gradient, in float32 and rounded
    once. The cast of the full tangent costs nothing, because XLA fuses it into the gather.
    """
    num_rows = d_table.shape[0]
    d_table = d_table.astype(at_least_float32(d_table.dtype))
    live = row_numbers
    if options.padding_idx is not None:  # a row outside the table has no gradient, even for an infinite cotangent
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
    """Returns rows by number. Those outside the table are `fill_value` (None: NaN), or undefined if `in_bounds`."""
    if table.shape[0] == 0:  # XLA cannot gather from an empty array: add a row, and move every number past it
        table, row_numbers = jnp.pad(table, [(0, 1)] + [(0, 0)] * (table.ndim - 1)), row_numbers + 1
    at = table.at[row_numbers]
    if in_bounds:
        return at.get(mode="promise_in_bounds", wrap_negative_indices=False, out_sharding=sharding)
    return at.get(mode="fill", fill_value=fill_value, wrap_negative_indices=False, out_sharding=sharding)


def _sorts(options: GatherOptions, table: jax.Array) -> bool:
    """Returns whether the terms of the gradient are sorted before they are added to the table.

    On TPU, XLA sorts them itself for tables of up to 2^15 rows. For larger ones, sorted terms take half of the
    estimated time (compiled for v5e, 2^16 rows) to 0.7 of it (2^18). On several chips they are not sorted, because
    sorting the terms of a sharded batch would gather them.
    """
    alone = jax.default_backend() == "tpu" and jax.device_count() == 1 and options.sharding is None
    return alone and not options.one_hot and table.shape[0] > 2**15


def _take_sorted(table: jax.Array, row_numbers: jax.Array) -> jax.Array:
    """Does what `take` does, with zeros outside. Its transpose sorts the terms by row before it adds them."""
    flat = row_numbers.ravel()
    order = jnp.argsort(flat)
    at = table.at[flat[order]]
    rows = at.get(mode="fill", fill_value=0, wrap_negative_indices=False, indices_are_sorted=True)
    rows = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True, mode="promise_in_bounds")
    return rows.reshape(*row_numbers.shape, table.shape[1])


def _product(
    options: GatherOptions, table: jax.Array, row_numbers: jax.Array, factor: Any, fill_value: Any = None
) -> Any:
    """Returns the rows as a product with a one-hot matrix. The gradient is a product too, and not a scatter.

    The rows are exact, because each element is one product with 1. A bfloat16 factor needs one pass through the matrix
    unit for that. A wider one (of the rows, or of the terms of the gradient) needs the highest precision.
    """
    one_hot = jax.nn.one_hot(row_numbers, table.shape[0], dtype=table.dtype)
    precision = None if factor == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    rows = jnp.dot(one_hot, table, precision=precision, out_sharding=options.sharding)
    if options.in_bounds or fill_value == 0:
        return rows
    outside = (row_numbers >= table.shape[0])[..., None]
    return jnp.where(outside, _filler(table.dtype), rows)


def _filler(dtype: Any) -> Any:
    """Returns the value of `jnp.take` for rows outside of the table."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    info = jnp.iinfo(dtype)
    return jnp.asarray(info.min if info.min < 0 else info.max, dtype)


def _counts(options: GatherOptions, row_numbers: jax.Array, num_rows: int) -> jax.Array:
    """Returns how often each row number appears among `row_numbers`."""
    everywhere = per_id = None
    if options.sharding is not None:
        mesh, spec = options.sharding.mesh, options.sharding.spec
        everywhere = NamedSharding(mesh, PartitionSpec(None))
        per_id = NamedSharding(mesh, PartitionSpec(*spec[: row_numbers.ndim]))
    counts = jnp.zeros(num_rows + 1, jnp.int32)  # the last one is for ids outside the table
    counts = counts.at[row_numbers].add(1, out_sharding=everywhere)
    return counts.at[row_numbers].get(out_sharding=per_id)


def row_numbers_of(ids: Any, num_rows: int, mode: Mode = "fill") -> jax.Array:
    """Returns ids of any integer type as int32 row numbers.

    With "fill", negative ids count from the end, and `num_rows` stands for every id outside the table. "clip" takes the
    first or last row for ids outside (the first for negative ids). "promise_in_bounds" takes ids as they are.

    Narrow types are widened before negative ids are wrapped. Wide types are clipped before they are narrowed (by NumPy
    if the ids are its arrays). So no id turns into another one.
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
    # `select` keeps the ids second, by which `argument_sharding` finds out how they are sharded.
    ids = lax.select(ids >= 0, ids, ids + num_rows)
    return lax.select((ids >= 0) & (ids < num_rows), ids, jnp.full_like(ids, num_rows))


def row_sharding(table: jax.Array, row_numbers: jax.Array, wanted: Sharding) -> NamedSharding | None:
    """Returns the sharding of the rows; None if no mesh axis is Explicit.

    If `wanted` is None, the batch axes are sharded as the ids, and the features as those of the table, without the mesh
    axes that the ids use already.
    """
    of_table, of_ids = jax.typeof(table).sharding, jax.typeof(row_numbers).sharding
    context = jax.sharding.get_abstract_mesh()
    meshes = (getattr(wanted, "mesh", None), of_table.mesh, of_ids.mesh, context)
    mesh = next((m for m in meshes if m is not None and AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return None
    if wanted is not None:
        return NamedSharding(mesh, wanted.spec if isinstance(wanted, NamedSharding) else wanted)
    by_ids = {axis for entry in of_ids.spec for axis in mesh_axes(entry)}
    of_features = (tuple(axis for axis in mesh_axes(entry) if axis not in by_ids) for entry in of_table.spec[1:])
    return NamedSharding(mesh, PartitionSpec(*of_ids.spec, *(axes or None for axes in of_features)))


def mesh_axes(entry: Any) -> tuple:
    """Returns the mesh axes of an entry of a partition spec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
