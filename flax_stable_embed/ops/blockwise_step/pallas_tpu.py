"""The step as one Mosaic kernel for TPU: every array is read once and written once, in place.

Blocks across rows (any axis except the last): a tile holds full blocks of some columns. A first loop over its rows
dequantizes, applies the rule, writes the output, keeps the new moments in scratch memory and collects their largest
magnitudes. A second loop quantizes. Scales come in groups of eight blocks, the height of a register. A group stays in
VMEM while the kernel visits the tiles of its blocks.

Blocks along the last axis: a tile holds full blocks of some rows, and the numbers of a block stay in registers.

What limits it: memory, 16.06 bytes per parameter for Adam. Codes follow the formats of `codecs.py`, computed with
instructions that are cheap on TPU (`kernel_codecs.py`). So a code can differ by one from the reference if a number is
within a few ulp of a boundary. The kernel has been compiled for v5e, v5p and v6e, and has not run on hardware yet.
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..blockwise.blocks import Blocks
from ..blockwise.codecs import TINY
from ..split_weights import join_in_kernel, split_in_kernel
from .capabilities import LANES, ROWS
from .kernel_codecs import by_logarithm, kernel_codec, magnitude_of, without_overflow
from .kernel_scalars import bits_of_tile, scalars_of, weight_bits_of_tile
from .step import Operands, Output, Step, apply_rule

SUBLANES = 8  # of a float32 register; a register of 8-bit numbers has ROWS, and a loop takes as many at a time
TILE_ROWS, TILE_COLUMNS = 512, 512
TURN = ROWS * TILE_COLUMNS  # elements that one turn of a loop takes
VMEM_BYTES = 64 << 20  # of 128 MB on v5e and v6e, 95 on v5p; tiles of the common shapes need 12


class Tiling(NamedTuple):
    """How the grid divides an array into tiles.

    view: The shape of the array with axes merged.
    groups: The axes of the array that each axis of the view consists of.
    tile: The lengths of a tile along the view. None is an axis that the tile has one element of, and no axis for.
    blocked: The axis of the view that blocks are along.
    count: The number of blocks in a tile.
    """

    view: tuple[int, ...]
    groups: tuple[range, ...]
    tile: tuple[int | None, ...]
    blocked: int
    count: int

    @property
    def inner(self) -> tuple[int, ...]:
        return tuple(n for n in self.tile if n is not None)

    @property
    def order(self) -> list[int]:
        """Returns the axes of the view from the slowest in the grid to the fastest, which is the blocked one."""
        return [k for k in range(len(self.view)) if k != self.blocked] + [self.blocked]


def tiling(shape: tuple[int, ...], axis: int, size: int) -> Tiling:
    """Returns the tiles of an array of this shape with blocks of `size` along `axis`."""
    ndim, blocks = len(shape), -(-shape[axis] // size)
    if axis == ndim - 1:
        view = prod(shape[:-1]), shape[-1]
        height = next((n for n in (2 * ROWS, ROWS) if n <= view[0]), view[0])
        count = max(1, min(2 * TILE_COLUMNS // size, shape[-1] // size))
        return Tiling(view, (range(axis), range(axis, ndim)), (height, min(count * size, shape[-1])), 1, count)
    last = max(axis + 1, ndim - 2)  # the last axes are tiled; those between them and the blocked axis have no tile
    between = (range(axis + 1, last),) if last > axis + 1 else ()
    groups = (range(axis), range(axis, axis + 1), *between, *(range(k, k + 1) for k in range(last, ndim)))
    per_group = min(blocks, SUBLANES)
    if last == ndim - 1:
        count = max(k for k in (1, 2, 4, 8) if per_group % k == 0 and (k == 1 or k * size <= TILE_ROWS))
        inner: tuple[int, ...] = (min(shape[-1], TILE_COLUMNS if size <= TILE_ROWS else LANES),)
    else:
        count, high = 1, size <= TILE_ROWS // 2 and (shape[-2] % ROWS == 0 or shape[-2] < ROWS)
        inner = (min(shape[-2], ROWS if high else SUBLANES), min(shape[-1], LANES))
    tile = (None, count * size, *[None for _ in between], *inner)
    return Tiling(tuple(prod(shape[k] for k in group) for group in groups), groups, tile, 1, count)


def run(
    step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = (), *, interpret: bool = False
) -> tuple[Output, tuple[Array, ...], tuple[Array, ...]]:
    """Runs the kernel on the array of one device, or its shard at `origin` of a global array of `shape`."""
    local = operands.g.shape
    if len(local) == 1:
        return _as_rows(step, operands, origin, shape or local, interpret)
    plan = tiling(local, *step.blocks)
    blocks = step.blocks.count(local)
    of_scales = tuple(blocks if k == plan.blocked else n for k, n in enumerate(plan.view))
    read = (operands.g, operands.p, operands.remainder, *operands.codes)
    arrays = [x.reshape(plan.view) for x in read if x is not None]
    scales = [x.reshape(of_scales) for x in operands.absmax]
    names = sorted(operands.hyper)
    numbers, integers = scalars_of(operands, origin)

    order = plan.order
    grid = tuple(pl.cdiv(plan.view[k], plan.tile[k] or 1) for k in order)
    in_grid = [order.index(k) for k in range(len(plan.view))]
    across_rows = plan.blocked < len(plan.view) - 1
    group = min(blocks, SUBLANES) if across_rows else blocks

    def at(*ids):
        return tuple(ids[j] for j in in_grid)

    def scales_at(*ids):
        ids = list(at(*ids))
        ids[plan.blocked] = lax.div(ids[plan.blocked] * np.int32(plan.count), np.int32(group)) if across_rows else 0
        return tuple(ids)

    tiles = pl.BlockSpec(plan.tile, at)
    groups = pl.BlockSpec(tuple(group if k == plan.blocked else n for k, n in enumerate(plan.tile)), scales_at)
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    inputs = [numbers, integers, *arrays, *scales]
    codes = arrays[-len(operands.codes) :]
    outputs = [jax.ShapeDtypeStruct(plan.view, dtype) for dtype in step.outputs]
    outputs += [_like(x) for x in (*codes, *scales)]
    n, of_step = len(outputs) - len(codes) - len(scales), len(arrays) - len(codes)
    aliases = {2 + of_step + k: n + k for k in range(len(codes) + len(scales))}  # two vectors of scalars come first
    aliases |= {3 + k: k for k in range(n)} if step.fused else {}
    block = (step.blocks.size, *plan.inner[1:]) if across_rows else None
    results = pl.pallas_call(
        partial(_kernel, step, plan, names, (local, shape or local), of_step),
        grid=grid,
        in_specs=[scalars, scalars, *[tiles for _ in arrays], *[groups for _ in scales]],
        out_specs=[*[tiles for _ in range(n + len(codes))], *[groups for _ in scales]],
        out_shape=outputs,
        input_output_aliases=aliases,
        scratch_shapes=[pltpu.VMEM(block, jnp.float32) for _ in operands.codes] if block else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",), vmem_limit_bytes=VMEM_BYTES
        ),
        name=f"{step.rule.name}_8bit",
        interpret=interpret,
    )(*inputs)
    *of_shape, absmax = *(x.reshape(local) for x in results[: n + len(codes)]), results[n + len(codes) :]
    return (
        of_shape[0] if n == 1 else tuple(of_shape[:n]),
        tuple(of_shape[n:]),
        tuple(x.reshape(like.shape) for x, like in zip(absmax, operands.absmax)),
    )


def _as_rows(step: Step, operands: Operands, origin: tuple, shape: tuple[int, ...], interpret: bool):
    """Runs the step of a vector, as an array with one block per row."""
    size = step.blocks.size
    fields = {name: getattr(operands, name) for name in ("g", "p", "codes", "remainder")}
    fields = jax.tree.map(lambda x: x.reshape(-1, size), fields)
    operands = operands._replace(**fields, absmax=tuple(a[:, None] for a in operands.absmax))
    origin = (origin[0] // size, jnp.int32(0)) if origin else ()
    by_rows = replace(step, blocks=Blocks(1, size))
    out, codes, absmax = run(by_rows, operands, origin, (shape[0] // size, size), interpret=interpret)
    out, codes = jax.tree.map(lambda x: x.reshape(-1), (out, codes))
    return out, codes, tuple(a[:, 0] for a in absmax)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class _Refs(NamedTuple):
    """References to the tiles of each operand and result, in the memory of the kernel."""

    g: Any
    p: tuple  # nothing, the parameter, or a bfloat16 and its remainder
    codes: tuple
    absmax: tuple
    out: tuple
    new_codes: tuple
    new_absmax: tuple
    scratch: tuple


def _kernel(step: Step, plan: Tiling, names, shapes, of_step: int, numbers, integers, *references):
    given, n = iter(references), len(step.moments)

    def take(count: int) -> tuple:
        return tuple(next(given) for _ in range(count))

    g, *p = take(of_step)
    refs = _Refs(g, tuple(p), take(n), take(n), take(len(step.outputs)), take(n), take(n), tuple(given))
    hyper = {name: numbers[k] for k, name in enumerate(names)}
    ids = {k: pl.program_id(j) for j, k in enumerate(plan.order)}
    body = _blocks_across_rows if plan.blocked < len(plan.view) - 1 else _blocks_along_rows
    starts = [ids[k] * np.int32(plan.tile[k] or 1) for k in range(len(plan.view))]

    def place(offset, lengths):
        """Returns where the elements at `offset` of the tile start in the shard, and how many they are."""
        offset, lengths = list(offset), list(lengths)
        at = [s if n is None else s + offset.pop(0) for s, n in zip(starts, plan.tile)]
        return at, [n and lengths.pop(0) for n in plan.tile], plan.groups, *shapes

    def uniform(offset, lengths):
        """Returns random numbers for the elements at `offset` of the tile."""
        return None if step.rounding == "nearest" else bits_of_tile(step.rounding, integers, *place(offset, lengths))

    def store(out: Array, at: Any, offset, lengths) -> None:
        """Stores the output, split if the parameter is."""
        parts: tuple[Array, ...] = (out,)
        if step.split and step.fused:
            noise = weight_bits_of_tile(integers, *place(offset, lengths)) if step.rounds_weights else None
            parts = split_in_kernel(out, step.split, noise)
        for ref, part in zip(refs.out, parts):
            ref[at] = part

    body(step, plan, refs, hyper, starts[plan.blocked], shapes[0], uniform, store)


def _blocks_across_rows(step: Step, plan: Tiling, refs: _Refs, hyper, start, local, uniform, store):
    size, columns = step.blocks.size, plan.inner[1:]
    turn = ROWS if len(columns) == 1 else max(1, TURN // prod(columns))
    turn = next(n for n in range(min(turn, size), 0, -1) if size % n == 0)
    turns = size // turn
    loop = partial(lax.fori_loop, np.int32(0), np.int32(turns), unroll=min(turns, 8))
    short = local[step.blocks.axis] % size != 0
    codecs = [kernel_codec(moment, by_logarithm) for moment in step.moments]
    group, first_block = refs.absmax[0].shape[0], lax.div(start, np.int32(size))

    def one_block(k, _):
        row = lax.rem(first_block + k, np.int32(group))
        scale = [absmax[pl.ds(row, 1)] for absmax in refs.absmax]

        def at(i):
            """Returns the rows of a turn, in the tile and in scratch memory."""
            return pl.ds(pl.multiple_of(k * size + i * turn, turn), turn), pl.ds(pl.multiple_of(i * turn, turn), turn)

        def place(i):
            """Returns where the elements of a turn start in the tile, and how many they are."""
            return [k * size + i * turn, *[0 for _ in columns]], (turn, *columns)

        def first(i, largest):
            rows, kept = at(i)
            old = [codec.dequantize(c[rows], s) for codec, c, s in zip(codecs, refs.codes, scale)]
            out, new = apply_rule(step, refs.g[rows], _parameter(refs.p, rows), tuple(old), hyper)
            store(out, rows, *place(i))
            new = without_overflow(new)
            if short:
                row = start + k * size + i * turn + lax.broadcasted_iota(jnp.int32, new[0].shape, 0)
                new = [jnp.where(row < local[step.blocks.axis], x, 0.0) for x in new]
            for x, scratch in zip(new, refs.scratch):
                scratch[kept] = x
            return tuple(jnp.maximum(a, _fold(magnitude_of(x, m))) for a, x, m in zip(largest, new, step.moments))

        height = SUBLANES if len(columns) == 1 else 1
        zeros = tuple(jnp.zeros((height, *columns), jnp.float32) for _ in step.moments)
        largest = [jnp.max(a, axis=0, keepdims=True) for a in loop(first, zeros)]
        absmax = [jnp.where(a >= TINY, a, 0.0) for a in largest]
        for ref, a in zip(refs.new_absmax, absmax):
            ref[pl.ds(row, 1)] = a
        factors = [codec.factor(a) for codec, a in zip(codecs, absmax)]

        def second(i, _):
            rows, kept = at(i)
            random = uniform(*place(i))
            for codec, scratch, factor, ref in zip(codecs, refs.scratch, factors, refs.new_codes):
                ref[rows] = codec.quantize(scratch[kept], factor, random)

        loop(second, None)

    lax.fori_loop(np.int32(0), np.int32(plan.count), one_block, None)


def _blocks_along_rows(step: Step, plan: Tiling, refs: _Refs, hyper, start, local, uniform, store):
    height, width = plan.inner
    size = min(step.blocks.size, width)
    turn, first_block = min(ROWS, height), lax.div(start, np.int32(size))
    codecs = [kernel_codec(moment, by_logarithm) for moment in step.moments]

    def rows_at(i, _):
        rows = pl.ds(i * turn, turn)
        scales = [absmax[rows] for absmax in refs.absmax]
        block = lax.broadcasted_iota(jnp.int32, scales[0].shape, 1)
        for k in range(plan.count):
            lanes = pl.ds(k * size, size)
            own = block == first_block + k
            scale = [jnp.sum(jnp.where(own, s, 0.0), axis=1, keepdims=True) for s in scales]
            old = [codec.dequantize(c[rows, lanes], s) for codec, c, s in zip(codecs, refs.codes, scale)]
            p, place = _parameter(refs.p, (rows, lanes)), ([i * turn, k * size], (turn, size))
            out, new = apply_rule(step, refs.g[rows, lanes], p, tuple(old), hyper)
            store(out, (rows, lanes), *place)
            new = without_overflow(new)
            if local[-1] % size:
                lane = start + k * size + lax.broadcasted_iota(jnp.int32, new[0].shape, 1)
                new = [jnp.where(lane < local[-1], x, 0.0) for x in new]
            largest = [jnp.max(magnitude_of(x, m), axis=1, keepdims=True) for x, m in zip(new, step.moments)]
            absmax = [jnp.where(a >= TINY, a, 0.0) for a in largest]
            scales = [jnp.where(own, a, s) for a, s in zip(absmax, scales)]
            random = uniform(*place)
            for codec, x, a, ref in zip(codecs, new, absmax, refs.new_codes):
                ref[rows, lanes] = codec.quantize(x, codec.factor(a), random)
        for ref, s in zip(refs.new_absmax, scales):
            # Tiles of the same rows follow each other, and each knows the scales of its own blocks only.
            ref[rows] = jnp.where((block >= first_block) & (block < first_block + plan.count), s, ref[rows])

    lax.fori_loop(np.int32(0), np.int32(height // turn), rows_at, None)


def _parameter(refs: tuple, at: Any) -> Array | None:
    """Returns a part of the parameter, joined if it is split; None if the step has no parameter."""
    parts = [ref[at] for ref in refs]
    return join_in_kernel(*parts) if len(parts) == 2 else parts[0] if parts else None


def _fold(x: Array) -> Array:
    """Returns the largest of all rows if they are an axis of their own, else the largest of every eighth row."""
    if x.ndim > 2:
        return jnp.max(x, axis=0, keepdims=True)
    return jnp.max(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)
