"""Normalized rows and their gradient on a mesh with Auto axes, with a kernel on every device.

The row numbers are sharded over some mesh axes (the batch). The work of a device depends on the sharding of the table:

    replicated            it looks its own tokens up; gradients are summed over the batch
    over rows, reduced    it looks up the rows that it has for all tokens, and gives -0.0 for the others; the outputs
                          are summed over the devices that share the table
    over rows, gathered   it gathers the table and looks its own tokens up (FSDP); gradients are summed and scattered

Of the last two, that one runs which moves fewer bytes: outputs of all tokens, or the table. If the table is sharded
over features, XLA partitions the reference.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ...lowering import Program
from ...sharding import on_every_device
from ..gather import mesh_axes
from .packing import can_be_packed, packed
from .reference import Options

REPLICATED = PartitionSpec()


class Placement(NamedTuple):
    """How the table and the row numbers are sharded, and the work of a device.

    mesh: The mesh of both.
    rows: The mesh axes that shard the rows of the table; none if it is replicated.
    ids: The partition spec of the row numbers.
    gathers: Whether a device gathers the table.
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    ids: PartitionSpec
    gathers: bool

    @property
    def batch(self) -> tuple[str, ...]:
        """Returns the mesh axes that shard the row numbers."""
        return tuple(name for entry in self.ids for name in mesh_axes(entry))

    @property
    def both(self) -> tuple[str, ...]:
        """Returns the mesh axes that shard row numbers and rows."""
        return tuple(name for name in self.rows if name in self.batch)

    @property
    def of_table(self) -> PartitionSpec:
        """Returns the partition spec of the table."""
        return PartitionSpec(self.rows) if self.rows else REPLICATED

    @property
    def of_tokens(self) -> PartitionSpec:
        """Returns the partition spec of the outputs."""
        return PartitionSpec(*self.ids, None)


def placement(program: Program, index: int, table: Array, ids: Array, options: Options) -> Placement | None:
    """Returns the work of every device; None where the reference runs, which XLA partitions.

    Args:
        program: The program, which knows the shardings of its arguments.
        index: The index of the table among the operands. The row numbers are the last.
        table: The table.
        ids: The row numbers.
        options: Static options.
    """
    of_table, of_ids = program.shardings[index], program.shardings[-1]
    platforms = set(program.platforms) & set(options.kernels)
    if not (options.in_float32 and platforms) or of_table is None or of_ids is None:
        return None
    context = jax.sharding.get_abstract_mesh()
    if not (context.empty or context.shape_tuple == of_ids.mesh.shape_tuple == of_table.mesh.shape_tuple):
        return None
    if of_table.is_fully_replicated:
        return None if of_ids.is_fully_replicated else Placement(of_ids.mesh, (), of_ids.spec, gathers=False)
    return _over_rows(of_table, of_ids, table, ids, options) if platforms - {"cuda"} else None


def _over_rows(
    of_table: NamedSharding, of_ids: NamedSharding, table: Array, ids: Array, options: Options
) -> Placement | None:
    """Returns the work of a device if one axis of the table is sharded, the rows, and only the first of the ids."""
    rows, *features = (_used(of_table.mesh, entry) for entry in of_table.spec)
    batch, *others = [_used(of_ids.mesh, entry) for entry in of_ids.spec] or [()]
    sharded_otherwise = any(features) or any(others) or of_table.mesh.shape_tuple != of_ids.mesh.shape_tuple
    if not rows or sharded_otherwise or table.shape[0] % _size(of_table.mesh, rows):
        return None
    tokens = ids.size // _size(of_ids.mesh, set(batch) - set(rows))  # whose outputs a device computes and sends
    moves_more = tokens * options.dtype.itemsize > table.shape[0] * table.dtype.itemsize
    gathers = moves_more and set(rows) <= set(batch)
    return Placement(of_table.mesh, rows, PartitionSpec(*([batch] if batch else [])), gathers)


def forward_on(how: Placement, forward: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Returns the function of all arrays, from the one of a device's arrays."""

    def of_device(table: Array, scale: Array, bias: Array, ids: Array) -> Any:
        if not how.rows or how.gathers:
            return tuple(forward(_gathered(table, how.rows), scale, bias, ids, options=options))
        numbers = _own(how, table, _gathered(ids, how.both))
        (y,) = forward(table, scale, bias, numbers, options=_of_part(options))
        return (_scattered(_summed(y, _without(how.rows, how.both)), how.both),)

    specs = how.of_table, REPLICATED, REPLICATED, how.ids
    return on_every_device(of_device, how.mesh, specs, (how.of_tokens,))


def gradient_on(how: Placement, gradient: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Returns the gradients of table, scale and bias for all arrays, from the function of a device's arrays."""

    def of_device(dy: Array, table: Array, scale: Array, ids: Array) -> Any:
        if not how.rows or how.gathers:
            found = gradient(dy, _gathered(table, how.rows), scale, ids, options=options)
            d_table = _summed(_scattered(found[0], how.rows), _without(how.batch, how.rows))
            return d_table, *(_summed(x, how.batch) for x in found[1:])
        numbers = _own(how, table, _gathered(ids, how.both))
        dy = _gathered(packed(dy) if can_be_packed(dy) else dy, how.both)
        found = gradient(dy, table, scale, numbers, options=_of_part(options))
        d_table = _summed(_without_padding(how, found[0], options), _without(how.batch, how.both))
        everywhere = (*how.batch, *_without(how.rows, how.both))
        return d_table, *(_summed(x, everywhere) for x in found[1:])

    specs = how.of_tokens, how.of_table, REPLICATED, how.ids
    return on_every_device(of_device, how.mesh, specs, (how.of_table, REPLICATED, REPLICATED))


def _of_part(options: Options) -> Options:
    """Returns the options for a part of the rows, whose numbers are not those of `padding_idx`."""
    return options._replace(padding_idx=None, in_bounds=False, is_part=True)


def _own(how: Placement, table: Array, ids: Array) -> Array:
    """Returns the numbers of rows in this device's part of the table.

    The first device takes the tokens that are outside of the table, so that they count once.
    """
    device, n = lax.axis_index(how.rows), table.shape[0]
    total = n * _size(how.mesh, how.rows)
    first, is_row = device * n, (ids >= 0) & (ids < total)
    outside = jnp.where(device == 0, n, n + 1)
    mine = (ids >= first) & (ids < first + n)
    return jnp.where(is_row, jnp.where(mine, ids - first, n + 1), outside).astype(jnp.int32)


def _without_padding(how: Placement, d_table: Array, options: Options) -> Array:
    """Sets the gradient of the row `padding_idx` to zero on the device that has it."""
    if options.padding_idx is None:
        return d_table
    device, row = divmod(options.padding_idx, d_table.shape[0])
    own = jnp.where(lax.axis_index(how.rows) == device, 0.0, d_table[row])
    return d_table.at[row].set(own)


def _gathered(x: Array, axes: Sequence[str]) -> Array:
    return lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def _scattered(x: Array, axes: Sequence[str]) -> Array:
    return lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True) if axes else x


def _summed(x: Array, axes: Sequence[str]) -> Array:
    return lax.psum(x, axes) if axes else x


def _without(axes: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in axes if name not in others)


def _used(mesh: Mesh | AbstractMesh, entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of an entry of a partition spec that shard an array: those of more than one device."""
    return tuple(name for name in mesh_axes(entry) if mesh.shape[name] > 1)


def _size(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    return prod(mesh.shape[name] for name in axes)
