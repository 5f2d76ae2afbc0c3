"""The step as one Triton kernel for GPU: every array is read once and written once, in place.

One program of the kernel takes a tile of full blocks. The tile has all rows of a block and some neighboring columns. If
blocks are along the last axis, it has one block of each of some rows. Codes, moments and intermediate results stay in
registers, so there is one pass. Tiles that extend beyond the array are masked, and so are blocks whose size is not a
power of two.

What limits it: memory, 16.06 bytes per parameter for Adam, as long as other warps compute while one waits. A load does
not move ahead of a store, because the store might write what it reads. So a tile is read before its first part is
stored. 16 warps or more share a processor (`python -m benchmarks instructions`).
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
from ..split_weights import join_in_kernel, split_in_kernel
from .gpu_codecs import gpu_codec
from .gpu_instructions import Instructions, contracted
from .kernel_codecs import magnitude_of
from .kernel_scalars import bits_of_tile, scalars_of, weight_bits_of_tile
from .step import Operands, Output, Step, apply_rule

# Elements of a tile of columns. Its number of columns is at most COLUMNS, and fewer in a small array, so that there are
# PROGRAMS of them, two for each processor of a large GPU.
ELEMENTS, COLUMNS, FEWEST_COLUMNS, PROGRAMS = 4096, 64, 16, 2 * 132
# Elements of a thread. With 32 of them, the largest magnitude of a column needs few results of other warps.
PER_THREAD = 32
# A tile is computed in parts, in each of which a thread has this number of neighbors in a row.
NEIGHBORS = 4
# A tile of rows is one warp if blocks are that short, so that the largest magnitude of a block needs no results of
# another warp.
ELEMENTS_OF_ROWS, PER_THREAD_OF_ROWS = 512, 16


class Tiling(NamedTuple):
    """The tile of one program.

    view: The shape of the array as (before, blocked axis, after), without the last axis if blocks are along it.
    groups: The axes of the array that each axis of the view consists of.
    blocks: The number of blocks along the blocked axis.
    size: The number of elements per block.
    height: The length of the tile along the blocked axis, the next power of two from `size`.
    width: The number of columns of the tile, or of rows if blocks are along the last axis.
    parts: The number of parts that a tile is computed in, one after the other along the blocked axis.
    warps: The number of warps of a program.
    """

    view: tuple[int, ...]
    groups: tuple[range, ...]
    blocks: int
    size: int
    height: int
    width: int
    parts: int
    warps: int

    @property
    def along_rows(self) -> bool:
        return len(self.view) == 2

    @property
    def across(self) -> int:
        """Returns the number of tiles next to each other."""
        return pl.cdiv(self.view[0] if self.along_rows else self.view[2], self.width)

    @property
    def programs(self) -> int:
        return self.across * self.blocks * (1 if self.along_rows else self.view[0])


def tiling(shape: tuple[int, ...], axis: int, size: int) -> Tiling:
    """Returns the tiles of an array of this shape with blocks of `size` along `axis`."""
    groups = [range(axis), range(axis, axis + 1), range(axis + 1, len(shape))]
    before, extent, after = (prod(shape[k] for k in group) for group in groups)
    height = pl.next_power_of_2(size)
    along_rows = after == 1
    wanted = ELEMENTS_OF_ROWS // height if along_rows else min(COLUMNS, ELEMENTS // height)
    width = max(1, min(wanted, pl.next_power_of_2(before if along_rows else after)))
    view = (before, extent) if along_rows else (before, extent, after)
    blocks = pl.cdiv(extent, size)
    while not along_rows and width > FEWEST_COLUMNS and before * blocks * pl.cdiv(after, width) < PROGRAMS:
        width //= 2
    per_thread = PER_THREAD_OF_ROWS if along_rows else PER_THREAD
    warps = max(1, min(32, height * width // (32 * per_thread)))
    parts = 1 if along_rows else max(1, min(height, height * width // (32 * warps * NEIGHBORS)))
    return Tiling(view, tuple(groups[: len(view)]), blocks, size, height, width, parts, warps)


def run(
    step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = (), *, interpret: bool = False
) -> tuple[Output, tuple[Array, ...], tuple[Array, ...]]:
    """Runs the kernel on the array of one device, or its shard at `origin` of a global array of `shape`."""
    local = operands.g.shape
    plan = tiling(local, *step.blocks)
    of_scales = (plan.view[0], plan.blocks, *plan.view[2:])
    read = (operands.g, operands.p, operands.remainder, *operands.codes)
    arrays = [x.reshape(plan.view) for x in read if x is not None]
    scales = [x.reshape(of_scales) for x in operands.absmax]
    names = sorted(operands.hyper)
    numbers, integers = scalars_of(operands, origin)

    codes = arrays[-len(operands.codes) :]
    outputs = [jax.ShapeDtypeStruct(plan.view, dtype) for dtype in step.outputs]
    outputs += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*codes, *scales)]
    n, of_step = len(outputs) - 2 * len(codes), len(arrays) - len(codes)
    aliases = {2 + of_step + k: n + k for k in range(2 * len(codes))}  # two vectors of scalars come first
    aliases |= {3 + k: k for k in range(n)} if step.fused else {}
    results = pl.pallas_call(
        partial(_kernel, Instructions(interpret), step, plan, names, (local, shape or local), of_step),
        grid=(plan.programs,),
        out_shape=outputs,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps),
        name=f"{step.rule.name}_8bit",
        interpret=interpret,
    )(numbers, integers, *arrays, *scales)
    *of_shape, absmax = *(x.reshape(local) for x in results[: n + len(codes)]), results[n + len(codes) :]
    return (
        of_shape[0] if n == 1 else tuple(of_shape[:n]),
        tuple(of_shape[n:]),
        tuple(x.reshape(like.shape) for x, like in zip(absmax, operands.absmax)),
    )


def _kernel(do: Instructions, step: Step, plan: Tiling, names, shapes, of_step: int, numbers, integers, *references):
    given, n = iter(references), len(step.moments)

    def take(count: int) -> list:
        return [next(given) for _ in range(count)]

    g, *p = take(of_step)  # of the parameter nothing, itself, or a bfloat16 and its remainder
    codes, absmax, out, new_codes, new_absmax = take(n), take(n), take(len(step.outputs)), take(n), take(n)
    program = pl.program_id(0)
    wide, blocks = np.int32(plan.across), np.int32(plan.blocks)
    across, rest = lax.rem(program, wide), lax.div(program, wide)
    block, before = lax.rem(rest, blocks), lax.div(rest, blocks)
    start, offset = block * np.int32(plan.size), across * np.int32(plan.width)
    length = plan.height // plan.parts
    if plan.along_rows:
        tile, axis = (plan.width, length), 1
        of_scale, limit = (pl.ds(offset, plan.width), block), plan.view[0]
    else:
        offset += _zero_in_fours(program)
        tile, axis = (length, plan.width), 0
        of_scale, limit = (before, block, pl.ds(offset, plan.width)), plan.view[2]

    def steps(along: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, tile, along)

    def place(part: int) -> tuple[list, list]:
        """Returns where a part starts on each axis, and its lengths."""
        first = start + np.int32(part * length)
        return ([offset, first], [*tile]) if plan.along_rows else ([before, first, offset], [None, *tile])

    def at(part: int) -> tuple:
        return tuple(first if n is None else pl.ds(first, n) for first, n in zip(*place(part)))

    def inside(part: int) -> Array | None:
        """Returns which elements of a part are inside of the block and the array; None if all are."""
        found = None
        if limit % plan.width:
            found = offset + steps(1 - axis) < limit
        if plan.height != plan.size or plan.view[1] % plan.size:
            along = np.int32(part * length) + steps(axis)
            own = (along < plan.size) & (start + along < plan.view[1])
            found = own if found is None else found & own
        return found

    scale_inside = None
    if limit % plan.width:
        scale_inside = offset + lax.broadcasted_iota(jnp.int32, (plan.width,), 0) < limit

    def load(ref: Any, where: tuple, mask: Any) -> Array:
        return plgpu.load(ref.at[where], mask=mask, other=None if mask is None else 0)

    def spread(x: Array) -> Array:
        return lax.expand_dims(x, (axis,))

    codecs = [gpu_codec(do, moment) for moment in step.moments]
    hyper = {name: numbers[k] for k, name in enumerate(names)}
    keys_and_place = [integers[k] for k in range(1 + len(shapes[0]) + step.rounds_weights)]
    old_scales = [spread(load(ref, of_scale, scale_inside)) for ref in absmax]
    rule = contracted(do, lambda g, p, old: apply_rule(step, g, p, tuple(old), hyper))

    def read(part: int) -> tuple:
        where, mask = at(part), inside(part)
        return load(g, where, mask), [load(x, where, mask) for x in p], [load(c, where, mask) for c in codes]

    def compute(part: int, g_in: Array, of_p: list[Array], of_codes: list[Array]) -> list[Array]:
        """Stores the output of a part and returns its new moments, all NaN where one is not finite."""
        mask = inside(part)
        old = [codec.dequantize(c, scale) for codec, c, scale in zip(codecs, of_codes, old_scales)]
        p_in = join_in_kernel(*of_p) if len(of_p) == 2 else of_p[0] if of_p else None
        result, new = rule(g_in, p_in, old)
        results: tuple[Array, ...] = (result,)
        if step.split and step.fused:
            noise = None
            if step.rounds_weights:
                noise = weight_bits_of_tile(keys_and_place, *place(part), plan.groups, *shapes)
            results = split_in_kernel(result, step.split, noise)
        for ref, x in zip(out, results):
            plgpu.store(ref.at[at(part)], x, mask=mask)
        new = do.nan_if_any_overflows(list(new))
        return new if mask is None else [jnp.where(mask, x, 0.0) for x in new]

    new = [compute(part, *arrays) for part, arrays in enumerate([read(part) for part in range(plan.parts)])]
    factors = []
    for k, (codec, moment) in enumerate(zip(codecs, step.moments)):
        largest = do.largest(reduce(do.larger, [magnitude_of(of_part[k], moment) for of_part in new]), axis)
        largest = jnp.where(largest >= TINY, largest, 0.0)  # also where it is NaN
        plgpu.store(new_absmax[k].at[of_scale], largest, mask=scale_inside)
        factors.append(spread(codec.factor(largest)))

    for part, of_part in enumerate(new):
        random = None
        if step.rounding != "nearest":
            random = bits_of_tile(step.rounding, keys_and_place, *place(part), plan.groups, *shapes)
        for codec, x, factor, ref in zip(codecs, of_part, factors, new_codes):
            plgpu.store(ref.at[at(part)], codec.quantize(x, factor, random), mask=inside(part))


def _zero_in_fours(program: Array) -> Array:
    """Returns zero in a form that Triton only knows to be a multiple of four.

    It is added to the first column of a tile, so that each thread loads four neighbors of every array. Without it a
    thread would load 16 neighbors of 8-bit arrays and four of float32 arrays. Triton would then exchange them between
    threads, and find the largest magnitude of each column across threads. That takes 141 instructions per element
    instead of 94 (Adam, `root`, compiled for H200).
    """
    return 4 * lax.shift_right_logical(program, np.int32(31))
