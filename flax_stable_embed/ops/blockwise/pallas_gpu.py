"""The step as one Triton kernel for GPU: every array is read once and written once, in place.

One program of the kernel takes a tile of whole blocks: all rows of a block and some columns beside each other, or,
where blocks lie along the last axis, some rows of one block each. Codes, moments and what is computed of them stay in
registers, so that there is one pass. Tiles that reach over the edge of the array, and blocks whose length is no power
of two, are masked.

What limits it: memory, 16.06 bytes a parameter for Adam. Compiled for H200; it has not run on one yet.
"""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .codecs import TINY
from .kernel_codecs import arithmetic_of, magnitude_of, without_overflow
from .kernel_scalars import scalars_of, uniform_of
from .step import Operands, Step, apply_rule

ELEMENTS = 4096  # in a tile, where a block is short enough
PER_WARP = 32 * 16  # 16 elements for each thread: 86 registers for Adam with `root`, 94 with `dynamic`, none spilled
COLUMNS = 32  # beside each other, where registers allow it: a sector of memory has 32 bytes


class Tiling(NamedTuple):
    """A view of an array as (before, blocked axis, after), or without an axis after it, and one program's tile.

    The tile's block axis is a power of two of at least the block size; `width` is how many columns it has, or rows of
    the first axis where the blocks lie along the last one.
    """

    view: tuple[int, ...]
    groups: tuple[range, ...]
    blocks: int
    size: int
    height: int
    width: int

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
    few = ELEMENTS // height
    wanted = few if along_rows else max(few, min(COLUMNS, 2 * few))
    width = max(1, min(wanted, pl.next_power_of_2(before if along_rows else after)))
    view = (before, extent) if along_rows else (before, extent, after)
    return Tiling(view, tuple(groups[: len(view)]), -(-extent // size), size, height, width)


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
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(32, plan.height * plan.width // PER_WARP))),
        name=f"{step.rule.__name__}_8bit",
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
    if plan.along_rows:
        tile, axis = (plan.width, plan.height), 1
        at = (pl.ds(beside, plan.width), pl.ds(start, plan.height))
        of_scale, limit = (pl.ds(beside, plan.width), block), plan.view[0]
    else:
        tile, axis = (plan.height, plan.width), 0
        at = (before, pl.ds(start, plan.height), pl.ds(beside, plan.width))
        of_scale, limit = (before, block, pl.ds(beside, plan.width)), plan.view[2]

    def steps(along: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, tile, along)

    inside = None
    if limit % plan.width:
        inside = beside + steps(1 - axis) < limit
    if plan.height != plan.size or plan.view[1] % plan.size:
        own = (steps(axis) < plan.size) & (start + steps(axis) < plan.view[1])
        inside = own if inside is None else inside & own
    scale_inside = None
    if limit % plan.width:
        scale_inside = beside + lax.broadcasted_iota(jnp.int32, (plan.width,), 0) < limit

    def load(ref: Any, where: tuple, mask: Any) -> Array:
        return plgpu.load(ref.at[where], mask=mask, other=None if mask is None else 0)

    def spread(x: Array) -> Array:
        return lax.expand_dims(x, (axis,))

    ways = [arithmetic_of(moment) for moment in step.moments]
    hyper = {name: numbers[k] for k, name in enumerate(names)}
    old = [
        way.decode(load(c, at, inside), spread(load(a, of_scale, scale_inside)))
        for way, c, a in zip(ways, codes, absmax)
    ]
    p_in = None if p is None else load(p, at, inside)
    result, new = apply_rule(step, load(g, at, inside), p_in, tuple(old), hyper)
    plgpu.store(out.at[at], result, mask=inside)
    new = without_overflow(new)
    if inside is not None:
        new = [jnp.where(inside, x, 0.0) for x in new]
    random = None
    if step.stochastic:
        places = [beside, start] if plan.along_rows else [before, start, beside]
        lengths = [*tile] if plan.along_rows else [None, *tile]
        random = uniform_of(integers, places, lengths, plan.groups, *shapes)
    for way, moment, x, code_ref, scale_ref in zip(ways, step.moments, new, new_codes, new_absmax):
        largest = jnp.max(magnitude_of(x, moment), axis=axis)
        largest = jnp.where(largest >= TINY, largest, 0.0)
        plgpu.store(scale_ref.at[of_scale], largest, mask=scale_inside)
        plgpu.store(code_ref.at[at], way.encode(x, spread(way.prepare(largest)), random), mask=inside)
