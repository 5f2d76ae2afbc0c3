"""Which arrays each kernel can take, and why not the others.

On TPU a block must fill registers, 32 rows of them or 128 lanes, because the kernel loads and reduces full registers.
On GPU tiles are masked, so only sizes have limits. The reasons are texts, because `describe` prints them and errors
quote them.
"""

from math import prod
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..blockwise.blocks import Blocks

Name = Literal["pallas_tpu", "pallas_gpu"]


class Seen(NamedTuple):
    """A sharding that a parameter once had, and may have now. It decides how fast a step is, and nothing else."""

    sharding: NamedSharding


Spec = PartitionSpec | NamedSharding | Seen
PLATFORMS: dict[str, Name] = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
LANES, ROWS = 128, 32  # of a register of 8-bit numbers on TPU
DTYPES: dict[Name, set[str]] = {
    "pallas_tpu": {"float32", "bfloat16"},
    "pallas_gpu": {"float32", "bfloat16", "float16"},
}


def refusal(name: Name, blocks: Blocks, shape: tuple[int, ...], *dtypes: Any) -> str | None:
    """Returns why a kernel cannot take an array of this shape and dtypes with these blocks; None if it can."""
    if not prod(shape):
        return "it is empty"
    if unknown := [str(dtype) for dtype in map(jnp.dtype, dtypes) if str(dtype) not in DTYPES[name]]:
        return f"it has the dtype {unknown[0]}, and the kernel takes {', '.join(sorted(DTYPES[name]))}"
    return _refusal_on_gpu(blocks, shape) if name == "pallas_gpu" else _refusal_on_tpu(blocks, shape)


def _refusal_on_gpu(blocks: Blocks, shape: tuple[int, ...]) -> str | None:
    if prod(shape) >= 2**31:
        return "it has 2^31 elements or more"
    return None if blocks.size <= 4096 else f"its blocks of {blocks.size} are longer than 4096"


def _refusal_on_tpu(blocks: Blocks, shape: tuple[int, ...]) -> str | None:
    axis, size = blocks
    if len(shape) < 2:
        fits = shape and shape[0] % size == 0 and size % LANES == 0
        longest = 8192
        if not fits:
            return f"{shape or 'a scalar'} does not divide into full blocks of a multiple of {LANES}"
    elif axis == len(shape) - 1:
        longest = 8192
        if size < shape[-1] and size % LANES:
            return f"its blocks of {size} along the last axis do not fill {LANES} lanes"
        if blocks.count(shape) > 16384:
            return f"its last axis has {blocks.count(shape)} blocks, more than 16384"
    else:
        longest = 2048 if axis == len(shape) - 2 else 1024
        if size % ROWS:
            return f"its blocks of {size} do not fill {ROWS} rows"
        if axis < len(shape) - 2 and shape[-2] % 8:
            return f"its axis before the last, of {shape[-2]}, does not fill rows of 8"
    return None if size <= longest else f"its blocks of {size} are longer than {longest}"
