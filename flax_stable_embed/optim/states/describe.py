"""Reports what an optimizer stores: for every parameter the bits, the blocks, the reason and the bytes.

With shardings it also says how many bytes each device holds, and whether every block is on one device.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Literal, NamedTuple
from warnings import catch_warnings, simplefilter

import jax
import optax
from jax.sharding import NamedSharding

from ...ops.dtypes import at_least_float32
from ..engine.records import Record, Remainder, StayedField, trace_init
from ..placement import REPORTED, Placed, num_devices, placed_by_path
from ..storage.plan import TARGET, LeafPlan
from ..storage.straddling import straddling
from ..trees import Params, Specs
from .abstract_state import state_shapes

Platform = Literal["cpu", "gpu", "cuda", "tpu"]
WIDTH = 88  # columns of the table, where long paths can be shortened so far
SHORTEST_PATH = 20


class Row(NamedTuple):
    """One parameter in the report.

    Attributes:
        path: The parameter's path.
        shape: Its global shape.
        bits: How its moments are stored: 8, 32, "bf16" or "rowwise".
        block: The blocks and the codec of 8-bit moments, else "".
        reason: Why it has these bits.
        implementation: The code that runs its step, with the reason if it is not the platform's kernel.
        bytes: The bytes of its moments and scales.
        bytes_in_fp32: The bytes of the same moments in float32.
        overrides: The hyper-parameters, the memory and the stacked axes that a rule sets.
        rounding: The rounding of each 8-bit moment, "mu nearest, nu dither".
        shards: Into how many shards each axis is split; None where no sharding is known.
        straddles: Which blocks are on more than one device, and the way out; "" if none are.
    """

    path: str
    shape: tuple[int, ...]
    bits: int | str
    block: str
    reason: str
    implementation: str
    bytes: int
    bytes_in_fp32: int
    overrides: str = ""
    rounding: str = ""
    shards: tuple[int, ...] | None = None
    straddles: str = ""

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class StateReport:
    """What `describe` found.

    Prints as a table, in which layers that differ only in their number share a line, and "64@1 root" stands for blocks
    of 64 along axis 1 with the codec `root`.

    Attributes:
        rows: One row for every parameter of an 8-bit transform, with the fields `path`, `shape`, `bits`, `block`,
            `reason`, `implementation`, `bytes`, `bytes_in_fp32`, `overrides`, `rounding`, `shards` and `straddles`.
            `shards` is None where no sharding is known. `straddles` says which blocks are on more than one device, so
            that each step moves data between devices, and the way out; it is "" where none are.
        other_bytes: What else the state holds: counts, and the states of other transforms.
        remainders: The `(bits, bytes)` of every parameter that `fse.split_weights` splits, by path: the bits of the
            bfloat16 and its remainder in all, and the bytes of the remainder.
        stayed: One `(field, bytes, reason)` for every field of a wrapped transform (`fse.quantize_state`) that is not
            in `rows`. `other_bytes` includes these bytes.
        bytes_per_device: The bytes of the state that one device holds, without host memory; None where no sharding is
            known, or where there are several meshes.
        bytes_in_host_memory: The bytes of the state in host memory, on all hosts together; 0 where no sharding is
            known.
    """

    rows: tuple[Row, ...]
    other_bytes: int
    remainders: dict[str, Remainder] = field(default_factory=dict, hash=False)
    stayed: tuple[StayedField, ...] = ()
    bytes_per_device: int | None = None
    bytes_in_host_memory: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes of the state."""
        return sum(row.bytes for row in self.rows) + self.remainder_bytes + self.other_bytes

    @property
    def remainder_bytes(self) -> int:
        """The bytes of all remainders."""
        return sum(remainder.bytes for remainder in self.remainders.values())

    @property
    def total_bytes_in_fp32(self) -> int:
        """All bytes of the state if every moment were in float32."""
        return sum(row.bytes_in_fp32 for row in self.rows) + self.remainder_bytes + self.other_bytes

    def __str__(self) -> str:
        if not self.rows and not self.remainders:
            return f"No 8-bit transform of this library in it; the state has {self.other_bytes:,} bytes."
        lines = [*_table(_folded(self.rows)), ""] if self.rows else []
        for bits in (8, 32, *sorted({r.bits for r in self.rows} - {8, 32})):
            rows = [r for r in self.rows if r.bits == bits]
            size, name = sum(r.bytes for r in rows), f"{bits}-bit" if isinstance(bits, int) else bits
            elements = sum(r.elements for r in rows)
            if not rows and not self.rows:
                continue
            lines.append(f"{name}: {_parameters(rows)}, {elements:,} elements, {size:,} bytes{_each(size, rows)}")
        if any(row.rounding for row in self.rows):
            lines += _wrapped("rounding: ", _grouped(self.rows, "rounding"))
        if self.rows:
            lines += _wrapped("runs on: ", _grouped(self.rows, "implementation"))
        if self.remainders:
            lines += _wrapped("split weights: ", _bits_of(self.remainders.values()))
        lines += [f"stayed as it is: {s.field}, {s.bytes:,} bytes, {s.reason}" for s in self.stayed]
        lines += [f"straddles devices: {r.path}: {r.straddles}" for r in self.rows if r.straddles]
        lines.append(f"other state: {self.other_bytes:,} bytes")
        in_fp32 = f"{self.total_bytes_in_fp32:,} in fp32"
        lines.append(f"total: {self.total_bytes:,} bytes{_each(self.total_bytes, self.rows)}, {in_fp32}")
        if self.bytes_per_device is not None:
            host = f", and {self.bytes_in_host_memory:,} in host memory" if self.bytes_in_host_memory else ""
            lines.append(f"per device: {self.bytes_per_device:,} bytes{host}")
        return "\n".join(lines)


def describe(
    tx: optax.GradientTransformation, params: Params, *, shardings: Specs = None, platform: Platform | None = None
) -> StateReport:
    """Reports what `tx.init(params)` would store, without storing it. Sees through optax's wrappers.

    Args:
        tx: An 8-bit transform, alone or inside chain, masked, partition, MultiSteps, inject_hyperparams, ...
        params: The parameters, or their shapes (`jax.eval_shape`).
        shardings: How the parameters are sharded: a pytree like them of PartitionSpec (for the mesh of `jax.set_mesh`)
            or NamedSharding. None for a parameter means that nothing is known. By default the shardings of the
            parameters themselves, where they are arrays or shapes with a NamedSharding. The report then has the bytes
            per device, and the blocks that are on more than one device. It does not count reductions over a parameter,
            such as the norms of LAMB or of clipping.
        platform: "cpu", "gpu" or "tpu": the platform whose implementations the report names. By default the platform of
            this process. So a CPU host can tell which kernels a TPU program will run.

    Raises:
        TypeError: `shardings` holds something else.
        ValueError: `shardings` is not a pytree like the parameters, has no mesh, or does not fit mesh and shapes; or
            `platform` is unknown.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"wte": {"embedding": jnp.ones((512, 64))}, "kernel": jnp.ones((64, 512))}
    >>> print(fse.describe(fse.adamw8bit(1e-3), params))
    parameter      shape      bits  block@axis  reason     bytes
    kernel         (64, 512)  8     64@1 root   default    69,632
    wte/embedding  (512, 64)  32                embedding  262,152
    <BLANKLINE>
    8-bit: 1 parameter, 32,768 elements, 69,632 bytes (2.125 per element)
    32-bit: 1 parameter, 32,768 elements, 262,152 bytes (8.000 per element)
    rounding: mu nearest, nu dither (1 parameter)
    runs on: xla (1 parameter), optax's formula (1 parameter)
    other state: 16 bytes
    total: 331,800 bytes (5.063 per element), 524,304 in fp32

    On a mesh, before there is an array (`AbstractMesh` needs no devices; with devices use `jax.make_mesh`):

    >>> mesh = jax.sharding.AbstractMesh((16,), ("fsdp",))
    >>> sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    >>> shapes = {name: jax.ShapeDtypeStruct((1024, 768), jnp.float32, sharding=sharded) for name in ("up", "down")}
    >>> tx = fse.adamw8bit(1e-3, rules=(("up", fse.Rule(state_format=fse.StateFormat(shards=16))),))
    >>> report = fse.describe(tx, shapes)
    >>> for row in report.rows:
    ...     print(row.path, row.block, row.shards, row.straddles or "complete blocks")
    down 128 on axis 0, root (16, 1) axis 0 of 1024 is sharded over 16 devices, 64 on each, and blocks have 128. Use
        StateFormat(shards=16), for all parameters or in a rule.
    up 64 on axis 0, root (16, 1) complete blocks
    >>> report.bytes_per_device
    251956
    """
    if platform not in (None, "cpu", "gpu", "cuda", "tpu"):
        raise ValueError(f"`platform` must be 'cpu', 'gpu', 'tpu' or None, got {platform!r}.")
    placed = placed_by_path(shardings, params)
    named = {path: x.sharding for path, x in placed.items() if isinstance(x.sharding, NamedSharding)}
    several = {path: sharding for path, sharding in named.items() if sharding.num_devices > 1}
    tokens = TARGET.set((platform, num_devices(placed, params))), REPORTED.set(several)
    try:
        state, records = trace_init(tx, params)
    finally:
        TARGET.reset(tokens[0])
        REPORTED.reset(tokens[1])
    rows = tuple(_row(record, plan, placed.get(plan.path)) for _, record in records for plan in record.plans.values())
    stayed = tuple(field for _, record in records for field in record.stayed)
    size = sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    meshes = {x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None for x in placed.values()}
    on_device = (None, 0) if None in meshes or len(meshes) != 1 else _bytes_per_device(tx, params, placed)
    remainders = {
        path: found for _, record in records if record.split for path, found in record.split.remainders.items()
    }
    others = size - sum(row.bytes for row in rows) - sum(found.bytes for found in remainders.values())
    return StateReport(rows, others, remainders, stayed, *on_device)


def _row(record: Record, plan: LeafPlan, known: Placed | None) -> Row:
    moments = [x for x in record.moments if x.path == plan.path]
    itemsize = at_least_float32(plan.dtype).itemsize if moments else 0
    row = Row(
        plan.path,
        plan.shape,
        plan.bits,
        plan.blocks_text,
        plan.reason,
        plan.implementation,
        record.bytes[plan.path],
        sum(prod(x.shape) for x in moments) * itemsize,
        plan.rule.settings_text,
        ", ".join(f"{x.name} {x.moment.rounding}" for x in moments if x.moment is not None),
    )
    if known is None or len(known.shape) != len(plan.shape):  # a wrapper that reshapes
        return row
    return row._replace(shards=known.shards, straddles=straddling(plan, known.shards))


def _bytes_per_device(tx: optax.GradientTransformation, params: Params, placed: dict[str, Placed]) -> tuple[int, int]:
    """Counts the bytes of the state on one device, and those in host memory."""
    on_device = in_host = 0
    with catch_warnings():
        simplefilter("ignore")  # this is the second trace of `init`, and the first has warned
        state = state_shapes(tx, params, placed)
    for x in jax.tree.leaves(state):
        if x.sharding.memory_kind == "pinned_host":
            in_host += prod(x.shape) * x.dtype.itemsize
        else:
            on_device += prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return on_device, in_host


class _Line(NamedTuple):
    """A line of the table: rows that differ only in the numbers on their paths."""

    path: str
    rows: list[Row]


def _folded(rows: Sequence[Row]) -> list[_Line]:
    """Puts layers that differ only in their number on one line, "layers/0..31/kernel"."""
    alike: dict[tuple, list[Row]] = {}
    for row in rows:
        alike.setdefault((re.sub(r"\d+", "#", row.path), *row[1:]), []).append(row)
    lines = []
    for group in alike.values():
        numbers = [tuple(map(int, re.findall(r"\d+", row.path))) for row in group]
        by_place = [sorted(set(column)) for column in zip(*numbers)]
        if len(group) > 1 and set(numbers) == set(product(*by_place)) and all(map(_is_range, by_place)):
            texts = (str(ns[0]) if len(ns) == 1 else f"{ns[0]}..{ns[-1]}" for ns in by_place)
            path = re.sub(r"\d+", lambda _: next(texts), group[0].path)  # noqa: B023  (called at once)
            lines.append(_Line(path, group))
        else:
            lines += [_Line(row.path, [row]) for row in group]
    return lines


def _is_range(numbers: Sequence[int]) -> bool:
    return list(numbers) == list(range(numbers[0], numbers[-1] + 1))


def _table(lines: Sequence[_Line]) -> list[str]:
    firsts = [line.rows[0] for line in lines]
    optional = {"sets": [r.overrides for r in firsts], "shards": [_shards(r) for r in firsts]}
    optional = {name: cells for name, cells in optional.items() if any(cells)}
    table = [("shape", "bits", "block@axis", "reason", "bytes", *optional)]
    for line, r, *more in zip(lines, firsts, *optional.values()):
        shape = str(r.shape) if len(line.rows) == 1 else f"{len(line.rows)} x {r.shape}"
        size = sum(row.bytes for row in line.rows)
        block = r.block.replace(" on axis ", "@").replace(",", "")
        table.append((shape, str(r.bits), block, r.reason, f"{size:,}", *more))
    taken = sum(2 + max(map(len, column)) for column in zip(*table))
    paths = ["parameter", *(_shortened(line.path, max(SHORTEST_PATH, WIDTH - taken)) for line in lines)]
    return aligned([(path, *cells) for path, cells in zip(paths, table)])


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table whose columns are as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]


def _shortened(path: str, width: int) -> str:
    """Leaves out the middle of a long path."""
    if len(path) <= width:
        return path
    head = (width - 3) // 2
    return f"{path[:head]}...{path[head + 3 - width :]}"


def _shards(row: Row) -> str:
    """Writes how a parameter is sharded, and whether its blocks fit."""
    if row.shards is None:
        return ""
    text = " x ".join(map(str, row.shards)) or "1"
    return f"{text}, straddles" if row.straddles else text


def _grouped(rows: Iterable[Row], field: str) -> list[str]:
    """Lists the values of a field, each with the number of its parameters."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(getattr(row, field), []).append(row)
    by_name.pop("", None)
    return [f"{name} ({_parameters(found)})" for name, found in by_name.items()]


def _bits_of(remainders: Iterable[Remainder]) -> list[str]:
    """Lists the bits of split weights, each with the number of its parameters and the bytes of their remainders."""
    by_bits: dict[int, list[int]] = {}
    for bits, size in remainders:
        by_bits.setdefault(bits, []).append(size)
    return [
        f"{bits} bits ({len(sizes)} parameter{'s' * (len(sizes) > 1)}, {sum(sizes):,} bytes)"
        for bits, sizes in sorted(by_bits.items())
    ]


def _wrapped(head: str, parts: list[str]) -> list[str]:
    """Joins parts with commas, in lines that fit `WIDTH` where a part does."""
    lines = [head + parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 2 <= WIDTH:
            lines[-1] += f", {part}"
        else:
            lines[-1] += ","
            lines.append(" " * len(head) + part)
    return lines


def _parameters(rows: Sequence[Row]) -> str:
    return f"{len(rows)} parameter{'s' if len(rows) != 1 else ''}"


def _per_element(size: int, rows: Sequence[Row]) -> str:
    elements = sum(r.elements for r in rows)
    return f"{size / elements:.3f}" if elements else ""


def _each(size: int, rows: Sequence[Row]) -> str:
    each = _per_element(size, rows)
    return f" ({each} per element)" if each else ""
