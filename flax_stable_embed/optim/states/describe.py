"""A report of what an optimizer stores: for every parameter the bits, the blocks, the reason and the bytes.

With shardings, also whether every block lies on one device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import optax

from ..engine.records import Record, Row, Stayed, trace_init
from ..placement import Placed, placed_by_path
from .straddling import straddling


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns are as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]


@dataclass(frozen=True)
class StateReport:
    """What `describe` found; prints as a table.

    Attributes:
        rows: one `(path, shape, bits, block, reason, implementation, bytes, overrides, cut, straddles)` for every
            parameter of an 8-bit transform; `overrides` are the hyper-parameters that a rule sets. `cut` are the pieces
            along each axis, None where no sharding is known; `straddles` says which blocks lie on more than one device,
            so that each step moves data between devices, and the way out, "" where none do.
        other_bytes: what else the state holds: counts, states of other transforms.
        stayed: one `(field, bytes, reason)` for every field of a wrapped transform (`fse.quantize_state`) that is not
            in `rows`; these bytes are among the others.
    """

    rows: tuple[Row, ...]
    other_bytes: int
    stayed: tuple[Stayed, ...] = ()

    @property
    def total_bytes(self) -> int:
        """All bytes of the state."""
        return sum(row.bytes for row in self.rows) + self.other_bytes

    def __str__(self) -> str:
        if not self.rows:
            return f"No 8-bit transform of this library in it; the state has {self.other_bytes:,} bytes."
        optional = {"sets": [r.overrides for r in self.rows], "cut": [_pieces(r) for r in self.rows]}
        optional = {name: cells for name, cells in optional.items() if any(cells)}
        header = ("parameter", "shape", "bits", "blocks", "reason", "implementation", "bytes", "per element", *optional)
        table = [header] + [
            (
                r.path,
                str(r.shape),
                str(r.bits),
                r.block,
                r.reason,
                r.implementation,
                f"{r.bytes:,}",
                _per_element(r.bytes, [r]),
                *more,
            )
            for r, *more in zip(self.rows, *optional.values())
        ]
        lines = aligned(table)
        for bits in (8, 32, *sorted({r.bits for r in self.rows} - {8, 32})):
            rows = [r for r in self.rows if r.bits == bits]
            size = sum(r.bytes for r in rows)
            elements = sum(prod(r.shape) for r in rows)
            name = f"{bits}-bit" if isinstance(bits, int) else bits
            lines.append(f"{name}: {len(rows)} parameters, {elements:,} elements, {size:,} bytes{_each(size, rows)}")
        lines += [f"stayed as it is: {s.field}, {s.bytes:,} bytes, {s.reason}" for s in self.stayed]
        lines += [f"straddles devices: {r.path}: {r.straddles}" for r in self.rows if r.straddles]
        lines.append(f"other state: {self.other_bytes:,} bytes")
        lines.append(f"total: {self.total_bytes:,} bytes{_each(self.total_bytes, self.rows)}")
        return "\n".join(lines)


def _pieces(row: Row) -> str:
    """How a parameter is cut, and what its blocks say to it."""
    if row.cut is None:
        return ""
    ways = " x ".join(map(str, row.cut)) or "1"
    return f"{ways}, straddles" if row.straddles else f"{ways}, whole blocks" if row.block else ways


def _per_element(size: int, rows) -> str:
    elements = sum(prod(r.shape) for r in rows)
    return f"{size / elements:.3f}" if elements else ""


def _each(size: int, rows) -> str:
    each = _per_element(size, rows)
    return f" ({each} per element)" if each else ""


def describe(tx: optax.GradientTransformation, params: Any, *, shardings: Any = None) -> StateReport:
    """What `tx.init(params)` would store, without storing it; sees through optax's wrappers.

    Args:
        tx: an 8-bit transform, alone or inside chain, masked, partition, MultiSteps, inject_hyperparams, ...
        params: the parameters, or their shapes (`jax.eval_shape`).
        shardings: how the parameters are cut, a tree like them of PartitionSpec (of the mesh in `jax.set_mesh`) or
            NamedSharding, None for one of which nothing is known. By default as they lie, where they are arrays or
            shapes with a NamedSharding. The report then says which blocks lie on more than one device. What a whole
            parameter's norm or a clipping sums over devices is not in it.

    Raises:
        TypeError: `shardings` holds something else.
        ValueError: it is no tree like the parameters, has no mesh, or does not fit mesh and shapes.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"wte": {"embedding": jnp.ones((512, 64))}, "kernel": jnp.ones((64, 512))}
    >>> print(fse.describe(fse.adamw8bit(1e-3), params))
    parameter      shape      bits  blocks                 reason     implementation   bytes    per element
    kernel         (64, 512)  8     64 on axis 1, root     default    xla              69,632   2.125
    wte/embedding  (512, 64)  32                           embedding  optax's formula  262,152  8.000
    8-bit: 1 parameters, 32,768 elements, 69,632 bytes (2.125 per element)
    32-bit: 1 parameters, 32,768 elements, 262,152 bytes (8.000 per element)
    other state: 16 bytes
    total: 331,800 bytes (5.063 per element)

    On a mesh, before there is an array (16 devices that nobody has; with devices, `jax.make_mesh`):

    >>> mesh = jax.sharding.AbstractMesh((16,), ("fsdp",))
    >>> cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    >>> shapes = {name: jax.ShapeDtypeStruct((1024, 768), jnp.float32, sharding=cut) for name in ("up", "down")}
    >>> tx = fse.adamw8bit(1e-3, rules=(("up", fse.Rule(state_format=fse.StateFormat(shards=16))),))
    >>> for row in fse.describe(tx, shapes).rows:
    ...     print(row.path, row.block, row.cut, row.straddles or "whole blocks")
    down 128 on axis 0, root (16, 1) axis 0 of 1024 is cut 16 ways, 64 on a device, and blocks are of 128. Take
        StateFormat(shards=16), for all or by a rule.
    up 64 on axis 0, root (16, 1) whole blocks
    """
    placed = placed_by_path(shardings, params)
    state, records = trace_init(tx, params)
    rows = tuple(_with_cut(row, record, placed.get(row.path)) for _, record in records for row in record.rows)
    stayed = tuple(field for _, record in records for field in record.stayed)
    size = sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return StateReport(rows, size - sum(row.bytes for row in rows), stayed)


def _with_cut(row: Row, record: Record, known: Placed | None) -> Row:
    shape, decision = record.parameters[row.path]
    if known is None or len(known.shape) != len(shape):  # a wrapper that reshapes
        return row
    return row._replace(cut=known.pieces, straddles=straddling(row.path, shape, decision, known.pieces))
