"""The step as one Triton kernel for GPU: every array is read once and written once, in place.

One program of the kernel takes a tile of whole blocks: all rows of a block and some columns beside each other, or,
where blocks lie along the last axis, some rows of one block each. Codes, moments and what is computed of them stay in
registers, so that there is one pass. Tiles that reach over the edge of the array, and blocks whose length is no power
of two, are masked.

What limits it: memory, 16.06 bytes a parameter for Adam. How fast it gets depends on the length of the stretches that
a tile takes of each row, and on two tiles being at work on a processor, so that one computes while the other waits
(benchmarks/results/gpu-*.json).
"""

from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..blockwise.codecs import TINY
from .kernel_codecs import by_square_roots, kernel_codec, magnitude_of, without_overflow
from .kernel_scalars import scalars_of, uniform_of
from .step import Operands, Step, apply_rule

# Elements of a tile of columns, and its most columns: with 16 for each thread two tiles fit a processor's registers.
ELEMENTS, COLUMNS = 8192, 64
PER_WARP = 32 * 16
# Taken piece by piece, a tile of ELEMENTS needs 64 registers a thread for Adam with `root`, and not 85.
PIECE = 4096
# Of a tile of rows: one warp, which needs no other's results for the largest magnitude of a block.
ELEMENTS_OF_ROWS, PER_WARP_OF_ROWS = 256, 32 * 8


class Tiling(NamedTuple):
    """A view of an array as (before, blocked axis, after), or without an axis after it, and one program's tile.

    The tile's block axis is a power of two of at least the block size; `width` is how many columns it has, or rows of
    the first axis where the blocks lie along the last one. It is computed in `pieces`, cut along the block axis.
    """

    view: tuple[int, ...]
    groups: tuple[range, ...]
    blocks: int
    size: int
    height: int
    width: int
    pieces: int
    warps: int

    @property
    def along_rows(self) -> bool:
        return len(self.view) == 2

    @property
    def across(self) -> int:
        """How many tiles lie beside each other."""
        return pl.cdiv(self.view[0] if self.along_rows else self.view[2], self.width)

    @property
    def programs(self) -> int:
        return self.across * self.blocks * (1 if self.along_rows else self.view[0])


def tiling(shape: tuple[int, ...], axis: int, size: int) -> Tiling:
    """The tiles of an array of this shape that has blocks of `size` along `axis`."""
    groups = [range(axis), range(axis, axis + 1), range(axis + 1, len(shape))]
    before, extent, after = (prod(shape[k] for k in group) for group in groups)
    height = pl.next_power_of_2(size)
    along_rows = after == 1
    wanted = ELEMENTS_OF_ROWS // height if along_rows else min(COLUMNS, ELEMENTS // height)
    width = max(1, min(wanted, pl.next_power_of_2(before if along_rows else after)))
    view = (before, extent) if along_rows else (before, extent, after)
    elements = height * width
    pieces = 1 if along_rows else pl.cdiv(elements, PIECE)
    warps = max(1, min(32, elements // (PER_WARP_OF_ROWS if along_rows else PER_WARP)))
    return Tiling(view, tuple(groups[: len(view)]), -(-extent // size), size, height, width, pieces, warps)


def run(
    step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = (), *, interpret: bool = False
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """One kernel on one device's own array, which lies at `origin` of a global array of `shape`."""
    local = operands.g.shape
    plan = tiling(local, *step.blocks)
    of_scales = (plan.view[0], plan.blocks, *plan.view[2:])
    arrays = [x.reshape(plan.view) for x in (operands.g, operands.p, *operands.codes) if x is not None]
    scales = [x.reshape(of_scales) for x in operands.absmax]
    names = sorted(operands.hyper)
    numbers, integers = scalars_of(operands, origin)

    codes = arrays[-len(operands.codes) :]
    outputs = [jax.ShapeDtypeStruct(plan.view, step.dtype)]
    outputs += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*codes, *scales)]
    first = 3 + (operands.p is not None)  # of the codes among the inputs
    aliases = {first + k: 1 + k for k in range(2 * len(codes))} | ({3: 0} if step.fused else {})
    out, *stored = pl.pallas_call(
        partial(_kernel, step, plan, names, (local, shape or local), operands.p is not None),
        grid=(plan.programs,),
        out_shape=outputs,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps),
        name=f"{step.rule.name}_8bit",
        interpret=interpret,
    )(numbers, integers, *arrays, *scales)
    new_codes, absmax = stored[: len(codes)], stored[len(codes) :]
    return (
        out.reshape(local),
        tuple(x.reshape(local) for x in new_codes),
        tuple(x.reshape(like.shape) for x, like in zip(absmax, operands.absmax)),
    )


def _kernel(step: Step, plan: Tiling, names, shapes, has_p: bool, numbers, integers, *references):
    given = iter(references)

    def several() -> tuple:
        return tuple(next(given) for _ in step.moments)

    g, p = next(given), next(given) if has_p else None
    codes, absmax, out, new_codes, new_absmax = several(), several(), next(given), several(), several()
    program = pl.program_id(0)
    wide, blocks = np.int32(plan.across), np.int32(plan.blocks)
    across, rest = lax.rem(program, wide), lax.div(program, wide)
    block, before = lax.rem(rest, blocks), lax.div(rest, blocks)
    start, beside = block * np.int32(plan.size), across * np.int32(plan.width)
    length = plan.height // plan.pieces
    if plan.along_rows:
        tile, axis = (plan.width, length), 1
        of_scale, limit = (pl.ds(beside, plan.width), block), plan.view[0]
    else:
        beside += _zero_in_fours(program)
        tile, axis = (length, plan.width), 0
        of_scale, limit = (before, block, pl.ds(beside, plan.width)), plan.view[2]

    def steps(along: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, tile, along)

    def place(piece: int) -> tuple[list, list]:
        """Where a piece begins on each axis, and its lengths."""
        first = start + np.int32(piece * length)
        return ([beside, first], [*tile]) if plan.along_rows else ([before, first, beside], [None, *tile])

    def at(piece: int) -> tuple:
        return tuple(first if n is None else pl.ds(first, n) for first, n in zip(*place(piece)))

    def inside(piece: int) -> Array | None:
        """Which elements of a piece are the block's and the array's own; None if all are."""
        found = None
        if limit % plan.width:
            found = beside + steps(1 - axis) < limit
        if plan.height != plan.size or plan.view[1] % plan.size:
            along = np.int32(piece * length) + steps(axis)
            own = (along < plan.size) & (start + along < plan.view[1])
            found = own if found is None else found & own
        return found

    scale_inside = None
    if limit % plan.width:
        scale_inside = beside + lax.broadcasted_iota(jnp.int32, (plan.width,), 0) < limit

    def load(ref: Any, where: tuple, mask: Any) -> Array:
        return plgpu.load(ref.at[where], mask=mask, other=None if mask is None else 0)

    def spread(x: Array) -> Array:
        return lax.expand_dims(x, (axis,))

    codecs = [kernel_codec(moment, by_square_roots) for moment in step.moments]
    hyper = {name: numbers[k] for k, name in enumerate(names)}
    old_scales = [spread(load(ref, of_scale, scale_inside)) for ref in absmax]

    def fresh(piece: int) -> list[Array]:
        """Stores the result of a piece and returns its new moments."""
        where, mask = at(piece), inside(piece)
        old = [codec.dequantize(load(c, where, mask), scale) for codec, c, scale in zip(codecs, codes, old_scales)]
        p_in = None if p is None else load(p, where, mask)
        result, new = apply_rule(step, load(g, where, mask), p_in, tuple(old), hyper)
        plgpu.store(out.at[where], result, mask=mask)
        new = without_overflow(new)
        return new if mask is None else [jnp.where(mask, x, 0.0) for x in new]

    new = [fresh(piece) for piece in range(plan.pieces)]
    factors = []
    for k, (codec, moment) in enumerate(zip(codecs, step.moments)):
        largest = reduce(jnp.maximum, [magnitude_of(of_piece[k], moment) for of_piece in new]).max(axis=axis)
        largest = jnp.where(largest >= TINY, largest, 0.0)
        plgpu.store(new_absmax[k].at[of_scale], largest, mask=scale_inside)
        factors.append(spread(codec.factor(largest)))
    for piece, of_piece in enumerate(new):
        random = uniform_of(integers, *place(piece), plan.groups, *shapes) if step.stochastic else None
        for codec, x, factor, ref in zip(codecs, of_piece, factors, new_codes):
            plgpu.store(ref.at[at(piece)], codec.quantize(x, factor, random), mask=inside(piece))


def _zero_in_fours(program: Array) -> Array:
    """Zero, of which Triton knows that it is a multiple of four, and no more.

    Added to where columns begin, it lets each thread load four neighbors of every array. Of bytes it would take 16,
    and of float32 four, exchange them between threads, and find each column's largest magnitude across threads: 141
    instructions for each element, and not 94 (Adam, `root`, compiled for H200).
    """
    return 4 * lax.shift_right_logical(program, np.int32(31))
