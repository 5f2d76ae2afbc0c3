"""A report of what an optimizer stores: for every parameter the bits, the blocks, the reason and the bytes."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import optax

from ._report import Row, Stayed, aligned, trace_init


@dataclass(frozen=True)
class StateReport:
    """What `describe` found; prints as a table.

    Attributes:
        rows: one `(path, shape, bits, block, reason, implementation, bytes, overrides)` for every parameter of an 8-bit
            transform; `overrides` are the hyper-parameters that a rule sets.
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
        header = ("parameter", "shape", "bits", "blocks", "reason", "implementation", "bytes", "per element", "sets")
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
                r.overrides,
            )
            for r in self.rows
        ]
        if not any(r.overrides for r in self.rows):
            table = [line[:-1] for line in table]
        lines = aligned(table)
        for bits in (8, 32, *sorted({r.bits for r in self.rows} - {8, 32})):
            rows = [r for r in self.rows if r.bits == bits]
            size = sum(r.bytes for r in rows)
            elements = sum(prod(r.shape) for r in rows)
            name = f"{bits}-bit" if isinstance(bits, int) else bits
            lines.append(f"{name}: {len(rows)} parameters, {elements:,} elements, {size:,} bytes{_each(size, rows)}")
        lines += [f"stayed as it is: {s.field}, {s.bytes:,} bytes, {s.reason}" for s in self.stayed]
        lines.append(f"other state: {self.other_bytes:,} bytes")
        lines.append(f"total: {self.total_bytes:,} bytes{_each(self.total_bytes, self.rows)}")
        return "\n".join(lines)


def _per_element(size: int, rows) -> str:
    elements = sum(prod(r.shape) for r in rows)
    return f"{size / elements:.3f}" if elements else ""


def _each(size: int, rows) -> str:
    each = _per_element(size, rows)
    return f" ({each} per element)" if each else ""


def describe(tx: optax.GradientTransformation, params: Any) -> StateReport:
    """What `tx.init(params)` would store, without storing it; sees through optax's wrappers.

    Args:
        tx: an 8-bit transform, alone or inside chain, masked, partition, MultiSteps, inject_hyperparams, ...
        params: the parameters, or their shapes (`jax.eval_shape`).

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
    """
    state, records = trace_init(tx, params)
    rows = tuple(row for _, record in records for row in record.rows)
    stayed = tuple(field for _, record in records for field in record.stayed)
    size = sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return StateReport(rows, size - sum(row.bytes for row in rows), stayed)
