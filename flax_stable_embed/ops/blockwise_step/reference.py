"""Defines the step in plain `jax.numpy`. Every other implementation is tested against it.

It takes the full array at once and keeps its shape, so that XLA can partition it on any mesh. The codes of a block need
its scale, so XLA compiles several loops that each read the arrays. That is why CPU has a loop over chunks (`cpu.py`),
and TPU and GPU have kernels that read every array once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..blockwise.quantize import dequantize_view, merge, quantize_view, split
from ..counter_random import linear_index, linear_index_of_tile, uniform, weight_bits
from ..sharding import placed_like
from ..split_weights import join_weight, split_weight
from .step import Operands, Step, apply_rule, without_overflow

Stored = tuple[Any, list[tuple[Array, Array]]]


def store_moments(step: Step, out: Any, new: tuple[Array, ...], numbers: Array | None) -> Stored:
    """Returns the output, and codes and scales of each new moment, in split views."""
    return out, [
        quantize_view(x, step.blocks.axis, moment.code, None if moment.rounding == "nearest" else numbers)
        for x, moment in zip(without_overflow(new), step.moments)
    ]


def plain(step: Step, operands: Operands, index: Array | None = None, store: Callable[..., Stored] = store_moments):
    """Runs one step and returns `(output, codes, absmax)`. The output of a split parameter is a pair.

    Args:
        step: Everything static about the step.
        operands: Its arrays.
        index: The row-major index of each element in the global array. If None, `operands` are the global arrays.
        store: `store_moments`, or another form of it with the same results.
    """
    blocks, shape = step.blocks, operands.g.shape
    old = tuple(
        dequantize_view(split(codes, blocks), absmax, blocks.axis, moment.code)
        for codes, absmax, moment in zip(operands.codes, operands.absmax, step.moments)
    )
    p = None if operands.p is None else split(operands.p, blocks)
    if p is not None and operands.remainder is not None:
        p = join_weight(p, split(operands.remainder, blocks))
    out, new = apply_rule(step, split(operands.g, blocks), p, old, operands.hyper)
    numbers = noise = None
    if needs_index(step):
        index = split(linear_index(shape) if index is None else index, blocks)
        if operands.key is not None:
            numbers = uniform(step.rounding, index, operands.key)
        if operands.weight_key is not None:
            noise = weight_bits(index, operands.weight_key)
    if step.fused and step.split:
        out = split_weight(out, step.split, noise)
    out, stored = store(step, out, new, numbers)
    codes = tuple(placed_like(merge(new, blocks, shape), before) for (new, _), before in zip(stored, operands.codes))
    absmax = tuple(placed_like(new, before) for (_, new), before in zip(stored, operands.absmax))
    out = jax.tree.map(lambda x: placed_like(merge(x, blocks, shape), operands.codes[0]), out)
    return out, codes, absmax


def needs_index(step: Step) -> bool:
    """Returns whether the results depend on the place of an element in the array."""
    return step.rounding != "nearest" or step.rounds_weights


def partitioned(step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = ()):
    """Runs `plain` where XLA may partition it and fuse it with what surrounds it.

    The condition is true of every update that is not NaN. It keeps XLA from contracting the last product of the update
    and the user's `p + u` into one rounding, which a kernel's update cannot get. So bits do not depend on the mesh.

    Args:
        step: Everything static about the step.
        operands: The arrays, or their shards on one device.
        origin: Where the shard starts in the global array, along each axis; empty if it starts at zero.
        shape: The shape of the global array; empty if `operands` are the global arrays.
    """
    index, local = None, operands.g.shape
    if origin and needs_index(step):
        axes = [range(axis, axis + 1) for axis in range(len(local))]
        index = linear_index_of_tile((0,) * len(local), local, axes, local, origin, shape)
    out, codes, absmax = plain(step, operands, index)
    return out if step.fused else jnp.where(out == out, out, jnp.nan), codes, absmax
