"""How a moment is stored: its first values, their wrapper and their place on devices, and the name of its format.

- 8: codes of the parameter's shape, and absmax, float32 with blocks for elements along one axis.
- 32, "bf16": float32 (or wider) or bfloat16 of the parameter's shape; absmax is zeros of shape [1] * ndim.
- "rowwise": as 32, but second moments have a last axis of 1.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..ops.blockwise.blocks import Blocks
from ..ops.blockwise.codecs import CODECS, Code
from ..ops.blockwise.quantize import dequantize, quantize
from ..ops.blockwise.step import Moment
from ._boxes import rebox, rebox_scales, unbox
from ._method import MomentName
from ._rules import Decision, StateFormat

_FORMAT_SIZE = 12  # bytes of one StateFormat in the state's `format`


def initial(box: Any, moment: MomentName, decision: Decision) -> tuple[Any, Any]:
    """A moment before the first step and its scales, in the parameter's wrapper and on its devices."""
    p = unbox(box)
    if decision.blocks is not None:
        codes, scales = initial_codes(p, moment.stored(decision.format).code, decision.blocks, moment.initial)
        return rebox(box, codes), rebox_scales(box, scales, decision.blocks, decision.format.shards)
    if decision.bits == "rowwise" and moment.second:
        rows = Blocks(len(p.shape) - 1, max(1, p.shape[-1]))
        shape = rows.absmax_shape(p.shape)
        place = _sharding(p, shape, rows)
        values = rebox_scales(box, jnp.full(shape, moment.initial, wide_dtype(p.dtype), device=place), rows, 0)
    else:
        dtype = jnp.bfloat16 if decision.bits == "bf16" else wide_dtype(p.dtype)
        values = rebox(box, jnp.full_like(p, moment.initial, dtype=dtype))
    shape = (1,) * len(p.shape)
    scales = jnp.zeros(shape, jnp.float32, device=_sharding(p, shape, None))
    return values, rebox_scales(box, scales, None, decision.format.shards)


def initial_codes(p: Any, code: Code, blocks: Blocks, value: Any = 0.0) -> tuple[Array, Array]:
    """Codes and scales of `value` everywhere: of zeros, or of the largest code where it is another number."""
    zeros = isinstance(value, int | float) and value == 0
    codes = jnp.full_like(p, code.zero if zeros else code.zero + code.top, dtype=code.dtype)
    shape = blocks.absmax_shape(p.shape)
    return codes, jnp.full(shape, value, jnp.float32, device=_sharding(p, shape, blocks))


def encode(x: Array, moment: Moment, blocks: Blocks, key: Array | None = None) -> tuple[Array, Array]:
    """Codes and scales of a moment; `key` (`array_key`) where it is rounded stochastically."""
    rounding = "stochastic" if moment.stochastic else "nearest"
    return quantize(
        x,
        signed=moment.signed,
        codec=moment.codec,
        block_size=blocks.size,
        axis=blocks.axis,
        rounding=rounding,
        seed=key if moment.stochastic else None,
    )


def decode(codes: Array, absmax: Array, moment: Moment, blocks: Blocks) -> Array:
    """The float32 moment that `encode` stored."""
    return dequantize(codes, absmax, signed=moment.signed, codec=moment.codec, block_size=blocks.size, axis=blocks.axis)


def bits_of(stored: Any, shape: tuple[int, ...]) -> int | str:
    """How an array of a state is stored, by its dtype and its shape; `shape` is the parameter's."""
    if is_codes(stored.dtype):
        return 8
    if stored.dtype == jnp.bfloat16:
        return "bf16"
    return 32 if stored.shape == shape else "rowwise"


def is_codes(dtype: Any) -> bool:
    """Whether a moment of this dtype is in 8 bits."""
    return dtype in (jnp.int8, jnp.uint8)


def is_array(box: Any) -> bool:
    """Whether there is an array in the wrapper, and not, say, optax's MaskedNode."""
    return hasattr(unbox(box), "shape") and hasattr(unbox(box), "dtype")


def with_shape(box: Any) -> Any:
    """Python numbers as shapes; all else as it is."""
    if not isinstance(box, int | float | complex) or is_array(box):
        return box
    return jax.ShapeDtypeStruct((), jax.typeof(box).dtype)


def wide_dtype(dtype: Any) -> np.dtype:
    """The dtype of moments that are not in 8 bits: float32, or what is wider; complex as it is."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64
    return np.dtype(dtype if wide else jnp.float32)


def nbytes(box: Any) -> int:
    """Bytes of an array, also in a wrapper and also where only its shape is known."""
    return prod(unbox(box).shape) * unbox(box).dtype.itemsize


def _sharding(p: Any, shape: tuple[int, ...], blocks: Blocks | None) -> NamedSharding | None:
    """The sharding of `p`, less what would not divide; None where JAX chooses, as for `jnp.zeros_like`."""
    sharding = jax.typeof(p).sharding if isinstance(p, Tracer) else getattr(p, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    if isinstance(p, Tracer) and AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = []
    for axis, names in enumerate(sharding.spec):
        ways = prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
        spec.append(names if blocks is not None and shape[axis] % ways == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def format_bytes(formats: list[StateFormat]) -> np.ndarray:
    """The formats in use as one small uint8 vector.

    Its length differs for every sequence of codecs, so that a checkpoint of another codec fails on shape (orbax casts
    dtypes without a word): 12 bytes times the sequence read as a number in bijective base 3.
    """
    number, content = 0, []
    for f in formats:
        codec = list(CODECS).index(f.codec) + 1
        number = 3 * number + codec
        numbers = (f.block_size or 0, f.shards, f.min_size)
        axis = 255 if f.block_axis is None else f.block_axis % 254
        content += [codec, int(f.rounding == "stochastic"), axis]
        content += [byte for x in numbers for byte in min(x, 2**24 - 1).to_bytes(3, "little")]
    vector = np.zeros(_FORMAT_SIZE * number, np.uint8)
    vector[: len(content)] = content
    return vector
