"""Normalized rows and their gradient as two Triton kernels for GPU.

Forward: one program per token. It reads the row, keeps it in registers for both sums, and writes the output.

Gradient: tokens are sorted by row, and a program takes `RUN` of them. It sums the output's gradients of tokens with the
same row. When the row changes, it reads the row and writes its gradient. If the tokens of a row extend over the end of
a run, its gradient is added in memory in parts, in no fixed order. So many programs share a frequent token, and no
program waits. The gradients of scale and bias are summed in registers, then over all programs.

What limits them: memory, and for the gradient also the zeros of rows without tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

RUN = 32  # tokens per program; partial sums of scale and bias take 1/32 of the gradient's bytes each
PER_WARP = 32 * 32  # features per warp


def forward(
    options: Any, table: Array, scale: Array, bias: Array, row_numbers: Array, interpret: bool = False
) -> Array:
    """Returns outputs, (tokens, features), for int32 row numbers of shape (tokens,)."""
    (tokens,), features = row_numbers.shape, table.shape[1]
    return pl.pallas_call(
        partial(_forward, options, table.shape),
        grid=(tokens,),
        out_shape=jax.ShapeDtypeStruct((tokens, features), options.dtype),
        compiler_params=_parameters(features),
        name="normalized_rows",
        interpret=interpret,
    )(table, scale, bias, row_numbers)


def gradient(
    options: Any, dy: Array, table: Array, scale: Array, row_numbers: Array, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Returns the gradients of table, scale and bias for that of the outputs, (tokens, features)."""
    tokens, features = dy.shape
    programs = pl.cdiv(tokens, RUN)
    row_numbers = jnp.where(row_numbers < 0, table.shape[0], row_numbers)  # even if the caller promised none
    order = jnp.argsort(row_numbers).astype(jnp.int32)
    none = np.int32(-1)  # the row before the first token and after the last
    rows = jnp.pad(row_numbers[order], (1, programs * RUN - tokens + 1), constant_values=none)
    partial_sums = jax.ShapeDtypeStruct((programs, features), jnp.float32)
    d_table, d_scale, d_bias = pl.pallas_call(
        partial(_gradient, options, table.shape, tokens, _add_in_turn if interpret else _add_atomically),
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct(table.shape, jnp.float32), partial_sums, partial_sums],
        input_output_aliases={5: 0},
        compiler_params=_parameters(features),
        name="normalized_rows_gradient",
        interpret=interpret,
    )(dy, table, scale, order, rows, jnp.zeros(table.shape, jnp.float32))
    of_norm = (x.sum(axis=0).astype(scale.dtype) for x in (d_scale, d_bias))
    return d_table.astype(table.dtype), *of_norm


def _parameters(features: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=max(1, min(8, pl.next_power_of_2(features) // PER_WARP)))


def _forward(options: Any, shape: tuple[int, ...], table, scale, bias, row_numbers, y):
    token = pl.program_id(0)
    load, at, inside = _rows_of(shape[1])
    row = plgpu.load(row_numbers.at[token])
    exists = (row >= 0) & (row < shape[0])
    unit, _ = _standardized(load(table, jnp.where(exists, row, 0)), inside, shape[1], options.epsilon)
    found = unit * load(scale) + load(bias)
    plgpu.store(y.at[at(token)], jnp.where(exists, found, np.float32(np.nan)).astype(y.dtype), mask=inside)


def _gradient(options: Any, shape: tuple[int, ...], tokens: int, add_to: Any, *references):
    dy, table, scale, order, rows, _, *results = references
    d_table, d_scale, d_bias = results
    program = pl.program_id(0)
    first = program * RUN
    load, at, inside = _rows_of(shape[1])
    factor = load(scale)
    zero = jnp.zeros_like(factor)

    def row_at(k: Any) -> Array:  # of the k-th token of this program; of the one before it for k = -1
        return plgpu.load(rows.at[first + k + 1])

    before, after = row_at(-1), row_at(RUN)

    def store(k: Any, row: Array, total: Array, of_scale: Array) -> tuple[Array, Array]:
        """Writes the row's gradient for the sum of its tokens' gradients."""
        exists = row < shape[0]
        x = jnp.where(exists, load(table, jnp.where(exists, row, 0)), np.float32(np.nan))
        unit, reciprocal = _standardized(x, inside, shape[1], options.epsilon)
        h = total * factor
        mean, along = (jnp.sum(v if inside is None else jnp.where(inside, v, 0.0)) / shape[1] for v in (h, h * unit))
        d_row = reciprocal * (h - mean - unit * along)
        live = exists if options.padding_idx is None else exists & (row != options.padding_idx)
        mask = live if inside is None else live & inside
        mask = jnp.broadcast_to(mask, d_row.shape)
        shared = (row == before) | ((row == after) & (k == RUN - 1))
        place = at(jnp.where(exists, row, 0))
        lax.cond(
            shared,
            lambda: add_to(d_table, place, d_row, mask),
            lambda: plgpu.store(d_table.at[place], d_row, mask=mask),
        )
        return zero, of_scale + total * unit

    def add(k: Any, sums: tuple) -> tuple:
        total, of_scale, of_bias = sums
        row = row_at(k)
        real = first + k < tokens
        token = plgpu.load(order.at[jnp.where(real, first + k, 0)])
        g = jnp.where(real, load(dy, token), 0.0)
        total, of_bias = total + g, of_bias + g
        ends = real & ((row_at(k + 1) != row) | (k == RUN - 1))
        total, of_scale = lax.cond(
            ends, store, lambda k, row, total, of_scale: (total, of_scale), k, row, total, of_scale
        )
        return total, of_scale, of_bias

    _, of_scale, of_bias = lax.fori_loop(0, RUN, add, (zero, zero, zero))
    plgpu.store(d_scale.at[at(program)], of_scale, mask=inside)
    plgpu.store(d_bias.at[at(program)], of_bias, mask=inside)


def _add_atomically(ref: Any, place: tuple, x: Array, mask: Array) -> None:
    plgpu.atomic_add(ref, place, x, mask=mask)


def _add_in_turn(ref: Any, place: tuple, x: Array, mask: Array) -> None:
    """Adds without atomics, for the interpreter. It runs one program after the other and has no masked atomics."""
    plgpu.store(ref.at[place], plgpu.load(ref.at[place], mask=mask, other=0.0) + x, mask=mask)


def _rows_of(features: int) -> tuple:
    """Returns functions that load a vector or row and that address a row, and a mask of its elements (None: all)."""
    length = pl.next_power_of_2(features)
    inside = None if length == features else jnp.arange(length) < features
    # From JAX 0.12 on, a slice that starts at a constant must end inside, also with a mask.
    start = 0 if inside is None else pl.program_id(0) * 0

    def at(row: Any) -> tuple:
        return (row, pl.ds(start, length))

    def load(ref: Any, row: Any = None) -> Array:
        where = (pl.ds(start, length),) if row is None else at(row)
        return plgpu.load(ref.at[where], mask=inside, other=None if inside is None else 0).astype(jnp.float32)

    return load, at, inside


def _standardized(x: Array, inside: Array | None, features: int, epsilon: float) -> tuple[Array, Array]:
    """Standardizes one row as `layer_norm.py` does, with zeros outside of it."""
    centered = x - jnp.sum(x) / features
    centered = centered if inside is None else jnp.where(inside, centered, 0.0)
    reciprocal = lax.rsqrt(jnp.sum(centered * centered) / features + epsilon)
    return centered * reciprocal, reciprocal
