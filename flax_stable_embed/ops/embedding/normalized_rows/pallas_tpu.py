"""Normalized rows and their gradient as two Mosaic kernels for TPU. The table stays in HBM, and its rows are copied.

Forward: one program per tile of tokens. It starts the copies of the next tile's rows, waits for its own rows, and
normalizes them in VMEM. A row outside the table is filled with NaN in VMEM.

Gradient: tokens are sorted by row, and a program takes a tile of `ROWS` rows of the table. The output's gradients are
scattered in HBM. A ring of copies brings them in the order of the rows, across the ends of tiles. They are summed in
registers from the first token of a row. Each partial sum overwrites the one before, so that the total remains. Then the
rows that have tokens are normalized, once. They were copied while the program worked on the tile before.

In HBM a row of a float32 array consists of segments of 128 lanes, stored 8 rows apart. For a sum in full registers, the
segments become the rows of a matrix: the array is viewed as (tokens / 8, segments, 8, 128), its layout in memory.

A single row of a bfloat16 array cannot be copied, because rows are stored in pairs. So the two halves of a row of
bfloat16 gradients are packed into uint32 first, which takes half of the bytes of float32.

What limits them: memory for wide rows, and for narrow rows the dozen instructions that start a copy. They have been
compiled for v5e, v5p and v6e, and have not run on hardware yet.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, enable_x64, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...jax_compat import MOST_UNROLLED
from .packing import can_be_packed, packed, unpacked

LANES, SUBLANES = 128, 8  # of a float32 register
PACKED = 16  # rows of a bfloat16 register
TILE_BYTES = 2 << 20  # of rows copied at a time, enough to hide the latency of a copy
MOST_TOKENS = 256  # of a forward tile
ROWS = 64  # of the table, per program of the gradient
OUTSIDE, NOWHERE = ROWS, ROWS + 1  # rows for tokens outside the table, and for tokens of other tiles
MOST_CHUNKS = 32  # of 8 tokens in the ring
NOT_A_ROW, ELSEWHERE = -1, -2  # for tokens outside the table, and for rows that other devices have
VMEM_BYTES = 32 << 20


def forward(options: Any, table: Array, scale: Array, bias: Array, row_numbers: Array, interpret: Any = False) -> Array:
    """Returns outputs, (tokens, features), for int32 row numbers of shape (tokens,)."""
    with enable_x64(False):  # noqa: FBT003  (Mosaic knows no 64-bit indices)
        (tokens,), features = row_numbers.shape, table.shape[1]
        tile = min(MOST_TOKENS, TILE_BYTES // (4 * features)) // PACKED * PACKED
        tiles = pl.cdiv(tokens, tile)
        number = jnp.where(_is_elsewhere(options, row_numbers, table), ELSEWHERE, NOT_A_ROW)
        row_numbers = jnp.where(_exists(row_numbers, table), row_numbers, number)
        row_numbers = jnp.pad(row_numbers, (0, tiles * tile - tokens)).reshape(tiles, 1, tile)
        numbers = partial(pl.BlockSpec, (None, None, tile), memory_space=pltpu.SMEM)
        vector = pl.BlockSpec((1, features), lambda i: (0, 0))
        return pl.pallas_call(
            partial(_forward, options, _unroll(interpret)),
            grid=(tiles,),
            in_specs=[
                numbers(lambda i: (i, 0, 0)),
                numbers(lambda i: (jnp.minimum(i + 1, tiles - 1), 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                vector,
                vector,
            ],
            out_specs=pl.BlockSpec((tile, features), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((tokens, features), options.dtype),
            scratch_shapes=[
                pltpu.VMEM((2, tile, features), table.dtype),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                *[pltpu.VMEM((tile, LANES), jnp.int32)] * options.is_part,
            ],
            compiler_params=_parameters(),
            name="normalized_rows",
            interpret=interpret,
        )(row_numbers, row_numbers, table, scale[None], bias[None])


def gradient(
    options: Any, dy: Array, table: Array, scale: Array, row_numbers: Array, interpret: Any = False
) -> tuple[Array, Array, Array]:
    """Returns the gradients of table, scale and bias for that of the outputs, (tokens, features) or packed."""
    with enable_x64(False):  # noqa: FBT003  (Mosaic knows no 64-bit indices)
        tokens, features, tiles = dy.shape[0], table.shape[1], pl.cdiv(table.shape[0], ROWS)
        segments = features // LANES
        codes, starts, outside = _sorted_tokens(options, table, row_numbers)
        dy = packed(dy) if can_be_packed(dy) else dy
        dy = dy if dy.dtype == jnp.uint32 else dy.astype(jnp.float32)
        words = dy.shape[1] // LANES
        copied = pl.cdiv(words, SUBLANES) * SUBLANES  # rows of the matrix that a token's copy becomes
        height = copied * segments // words  # and of its sum
        chunks = min(MOST_CHUNKS, TILE_BYTES // (4 * SUBLANES * LANES * pl.next_power_of_2(copied)))
        dy = jnp.pad(dy, ((0, codes.size - tokens), (0, 0)))
        dy = dy.reshape(-1, SUBLANES, words, LANES).transpose(0, 2, 1, 3)
        of_norm = jax.ShapeDtypeStruct((SUBLANES, features), jnp.float32)
        sums = pl.BlockSpec(of_norm.shape, lambda i, *_: (0, 0))
        d_table, d_scale, d_bias = pl.pallas_call(
            partial(_gradient, options, _unroll(interpret)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(tiles,),
                in_specs=[
                    pl.BlockSpec(memory_space=pl.ANY),
                    pl.BlockSpec(memory_space=pl.ANY),
                    pl.BlockSpec((1, features), lambda i, *_: (0, 0)),
                ],
                out_specs=[pl.BlockSpec((ROWS, features), lambda i, *_: (i, 0)), sums, sums],
                scratch_shapes=[
                    pltpu.VMEM((chunks, SUBLANES, copied, LANES), dy.dtype),
                    pltpu.SemaphoreType.DMA((chunks,)),
                    pltpu.VMEM((2, ROWS, features), table.dtype),
                    pltpu.SemaphoreType.DMA((2,)),
                    pltpu.SMEM((2,), jnp.int32),
                    pltpu.VMEM(((ROWS + SUBLANES) * height, LANES), jnp.float32),
                    pltpu.VMEM((ROWS + SUBLANES, LANES), jnp.int32),
                    pltpu.SMEM((ROWS // SUBLANES + 1,), jnp.int32),
                ],
            ),
            out_shape=[jax.ShapeDtypeStruct(table.shape, table.dtype), of_norm, of_norm],
            compiler_params=_parameters(),
            name="normalized_rows_gradient",
            interpret=interpret,
        )(codes, starts, dy, table, scale[None])
        d_scale = jnp.where(outside, np.float32(np.nan), d_scale.sum(axis=0))
        return d_table, d_scale.astype(scale.dtype), d_bias.sum(axis=0).astype(scale.dtype)


def _parameters() -> pltpu.CompilerParams:
    """Disables bounds checks, which would double the instructions of a copy. All addresses are within bounds."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
    )


def _unroll(interpret: Any) -> int:
    """Returns how far to unroll a loop. The interpreter gets a shorter program."""
    return 1 if interpret else MOST_UNROLLED


def _exists(row_numbers: Array, table: Array) -> Array:
    return (row_numbers >= 0) & (row_numbers < table.shape[0])


def _is_elsewhere(options: Any, row_numbers: Array, table: Array) -> Array:
    return (row_numbers == table.shape[0] + 1) & options.is_part


def _forward(options: Any, unroll: int, numbers, next_numbers, table, scale, bias, y, x, missing, arrived, *of_part):
    step = pl.program_id(0)
    slot, (tile, features) = step & 1, y.shape

    def fetch(numbers: Any, slot: Array) -> None:
        """Starts the copies of a tile, and counts the rows that are not in the table.

        In a part of a table most rows are not. Only those that are get a copy.
        """

        def one(k, count):
            row = numbers[k]
            copy = pltpu.make_async_copy(
                table.at[pl.ds(jnp.maximum(row, 0), 1)], x.at[slot, pl.ds(k, 1)], arrived.at[slot]
            )
            if options.is_part:
                pl.when(row >= 0)(copy.start)
            else:
                copy.start()
            return count + (row < 0)

        missing[slot] = lax.fori_loop(0, tile, one, jnp.int32(0), unroll=unroll)

    @pl.when(step == 0)
    def _():
        fetch(numbers, slot)
        for elsewhere in of_part:
            elsewhere[...] = jnp.full_like(elsewhere, -1)

    pl.when(step + 1 < pl.num_programs(0))(lambda: fetch(next_numbers, 1 - slot))
    if options.is_part:
        _wait_for_rows(tile - missing[slot], x.at[slot], arrived.at[slot])
    else:
        _wait(x.at[slot], arrived.at[slot])

    @pl.when(missing[slot] > 0)
    def _():
        @pl.loop(0, tile)
        def _(k):
            @pl.when(numbers[k] == NOT_A_ROW)
            def _():
                x[slot, pl.ds(k, 1)] = jnp.full((1, features), np.nan, x.dtype)

            for elsewhere in of_part:

                @pl.when(numbers[k] == ELSEWHERE)
                def _(elsewhere=elsewhere):
                    elsewhere[pl.ds(k, 1)] = jnp.full((1, LANES), step)

    @pl.loop(0, tile // PACKED)
    def _(k):
        rows = pl.ds(pl.multiple_of(k * PACKED, PACKED), PACKED)
        unit, _ = _standardized(x[slot, rows], options.epsilon)
        result = unit * scale[...] + bias[...]
        for elsewhere in of_part:
            result = jnp.where(elsewhere[rows][:, :1] == step, -0.0, result)
        y[rows] = result.astype(y.dtype)


def _wait(copied: Any, semaphore: Any) -> None:
    """Waits for as many bytes as `copied` has, from any number of copies."""
    pltpu.make_async_copy(copied, copied, semaphore).wait()


def _wait_for_rows(count: Array, x: Any, semaphore: Any) -> None:
    """Waits for the copies of so many rows."""
    for k in range(x.shape[0].bit_length()):
        pl.when((count >> k) & 1 == 1)(lambda k=k: _wait(x.at[pl.ds(0, 1 << k)], semaphore))


def _standardized(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Standardizes rows as `layer_norm.py` does."""
    centered = x - _mean(x)
    reciprocal = lax.rsqrt(_mean(centered * centered) + epsilon)
    return centered * reciprocal, reciprocal


def _mean(x: Array) -> Array:
    return jnp.sum(x, axis=1, keepdims=True) / x.shape[1]


def _sorted_tokens(options: Any, table: Array, row_numbers: Array) -> tuple[Array, Array, Array]:
    """Returns the codes of tokens sorted by row, where each tile of rows starts, and whether any token has no row.

    A code holds the number of the token, its row in the tile, whether to read this row, and whether it is the first
    token of its row. The codes are padded with zeros to a multiple of 8. Tokens whose rows other devices have come last
    and are not in a tile.
    """
    tokens, tiles = row_numbers.size, pl.cdiv(table.shape[0], ROWS)
    number = table.shape[0] + _is_elsewhere(options, row_numbers, table)
    known = jnp.where(_exists(row_numbers, table), row_numbers, number)
    rows, order = lax.sort((known, lax.iota(jnp.int32, tokens)), num_keys=1)
    end = jnp.sum(rows <= table.shape[0], dtype=jnp.int32) if options.is_part else np.int32(tokens)
    outside = rows == table.shape[0]
    first = rows != jnp.pad(rows[:-1], (1, 0), constant_values=-1)
    local = jnp.where(outside, OUTSIDE, rows % ROWS)
    codes = (order << 9) | (local << 2) | ((first & ~outside) << 1) | first
    inner = jnp.searchsorted(rows, jnp.arange(1, tiles) * ROWS, method="compare_all").astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), inner, jnp.reshape(end, 1)])
    return jnp.pad(codes, (0, -tokens % SUBLANES)), starts, jnp.any(outside) if options.is_part else outside[-1]


def _token(code: Array) -> Array:
    return code >> 9


def _row(code: Array) -> Array:
    return (code >> 2) & 127


def _is_read(code: Array) -> Array:
    return (code & 2) != 0


def _is_first(code: Array) -> Array:
    return (code & 1) != 0


def _gradient(options: Any, unroll: int, codes, starts, dy, table, scale, d_table, d_scale, d_bias, *scratch):
    ring, arrived, x, read, wanted, total, known, filled = scratch
    step, steps = pl.program_id(0), pl.num_programs(0)
    slot, segments, words = step & 1, d_table.shape[1] // LANES, dy.shape[1]
    height = total.shape[0] // (ROWS + SUBLANES)
    places = [k if k < words else ring.shape[2] + k - words for k in range(segments)]  # of segments in a sum
    start, end = starts[step], starts[step + 1]
    chunks = (starts[steps] + SUBLANES - 1) >> 3 if options.is_part else codes.shape[0] // SUBLANES

    def fetch_terms(chunk):
        place = chunk & (ring.shape[0] - 1)

        @pl.loop(0, SUBLANES, unroll=unroll)
        def _(k):
            token = _token(codes[chunk * SUBLANES + k])
            source = dy.at[token >> 3, :, token & 7]
            pltpu.make_async_copy(source, ring.at[place, k, pl.ds(0, words)], arrived.at[place]).start()

    def fetch_rows(tile, slot):
        """Copies all rows of a tile at once if it has at least as many tokens, else each row that has a token."""
        first, last = starts[tile], starts[tile + 1]
        rows = min(ROWS, table.shape[0])
        at_once = (last - first >= rows) & (tile * ROWS + rows <= table.shape[0])

        def fetch(row, count):
            source = table.at[pl.ds(tile * ROWS + row, count)]
            pltpu.make_async_copy(source, x.at[slot, pl.ds(row, count)], read.at[slot]).start()

        def of_token(k, count):
            needed = _is_read(codes[k])
            pl.when(needed)(lambda: fetch(_row(codes[k]), 1))
            return count + needed

        pl.when(at_once)(lambda: fetch(0, rows))
        count = lax.fori_loop(first, jnp.where(at_once, first, last), of_token, jnp.int32(0))
        wanted[slot] = jnp.where(at_once, rows, count)

    def add(chunk, total_of_row):
        place = chunk & (ring.shape[0] - 1)
        pl.when(chunk * SUBLANES >= start)(lambda: _wait(ring.at[place, :, pl.ds(0, words)], arrived.at[place]))

        def add_one(k, total_of_row):
            token = chunk * SUBLANES + k
            code, own = codes[token], (token >= start) & (token < end)
            total_of_row = unpacked(ring[place, k], axis=0) + jnp.where(_is_first(code), 0.0, total_of_row)
            row = jnp.where(own, _row(code), NOWHERE)
            total[pl.ds(pl.multiple_of(row * height, SUBLANES), height)] = total_of_row
            known[pl.ds(row, 1)] = jnp.full((1, LANES), step)
            filled[row >> 3] = step
            return total_of_row

        total_of_row = lax.fori_loop(0, SUBLANES, add_one, total_of_row, unroll=unroll)
        done = chunk * SUBLANES + SUBLANES <= end
        pl.when(done & (chunk + ring.shape[0] < chunks))(lambda: fetch_terms(chunk + ring.shape[0]))
        return total_of_row

    def totals(group):
        """Returns the sums of eight rows, (8, features), zero for rows without tokens, and which rows have tokens."""
        exists = known[pl.ds(group * SUBLANES, SUBLANES)][:, :1] == step
        of_segments = [total[pl.ds(group * SUBLANES * height + k, SUBLANES, stride=height)] for k in places]
        return jnp.where(exists, jnp.concatenate(of_segments, axis=1), 0.0), exists

    def finish(group):
        rows = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        of_rows, exists = totals(group)
        unit, reciprocal = _standardized(jnp.where(exists, x[slot, rows], 0.0), options.epsilon)
        h = of_rows * scale[...]
        d_rows = reciprocal * (h - _mean(h) - unit * _mean(h * unit))
        if options.padding_idx is not None:
            number = step * ROWS + group * SUBLANES + lax.broadcasted_iota(jnp.int32, exists.shape, 0)
            d_rows = jnp.where(number == options.padding_idx, 0.0, d_rows)
        d_table[rows] = d_rows
        d_scale[...] += of_rows * unit
        d_bias[...] += of_rows

    @pl.when(step == 0)
    def _():
        known[...] = jnp.full_like(known, -1)
        for k in range(filled.shape[0]):
            filled[k] = -1
        d_scale[...] = jnp.zeros_like(d_scale)
        d_bias[...] = jnp.zeros_like(d_bias)
        pl.loop(0, jnp.minimum(ring.shape[0], chunks) if options.is_part else min(ring.shape[0], chunks))(fetch_terms)
        fetch_rows(step, slot)

    pl.when(step + 1 < steps)(lambda: fetch_rows(step + 1, 1 - slot))
    lax.fori_loop(start >> 3, (end + SUBLANES - 1) >> 3, add, jnp.zeros((height, LANES), jnp.float32))
    _wait_for_rows(wanted[slot], x.at[slot], read.at[slot])

    @pl.loop(0, ROWS // SUBLANES)
    def _(group):
        pl.when(filled[group] == step)(lambda: finish(group))

        @pl.when(filled[group] != step)
        def _():
            d_table[pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)] = jnp.zeros(
                (SUBLANES, d_table.shape[1]), d_table.dtype
            )

    @pl.when(step == steps - 1)
    def _():  # tokens outside the table contribute to the gradient of the bias
        of_rows, _ = totals(OUTSIDE // SUBLANES)
        d_bias[...] += jnp.where(lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0) == 0, of_rows, 0.0)
