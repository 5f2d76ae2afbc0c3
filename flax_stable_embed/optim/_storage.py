"""How a moment is stored: its first values, their wrapper and their place on devices, and the name of its format.

- 8: codes of the parameter's shape, and absmax, float32 with blocks for elements along one axis.
- 32, "bf16": float32 (or wider) or bfloat16 of the parameter's shape; absmax is zeros of shape [1] * ndim.
- "rowwise": as 32, but second moments have a last axis of 1.
"""

import zlib
from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..ops._sharding import where_it_divides
from ..ops.blockwise.blocks import Blocks
from ..ops.blockwise.codecs import CODECS, Code
from ..ops.blockwise.quantize import dequantize, quantize
from ..ops.blockwise.step import Moment
from ._boxes import rebox, rebox_scales, unbox
from ._method import MomentName
from ._rules import Decision, StateFormat

_FORMAT_SIZE = 12  # bytes of one StateFormat in the state's `format`
_CODECS = list(CODECS)


def initial(box: Any, moment: MomentName, decision: Decision) -> tuple[Any, Any]:
    """A moment before the first step and its scales, in the parameter's wrapper and on its devices."""
    p, kind = unbox(box), decision.rule.memory_kind
    if decision.blocks is not None:
        pair = initial_codes(p, moment.stored(decision.format).code, decision.blocks, moment.initial)
        codes, scales = (in_memory(x, kind) for x in pair)
        return rebox(box, codes), rebox_scales(box, scales, decision.blocks, decision.format.shards)
    if decision.bits == "rowwise" and moment.second:
        rows = Blocks(len(p.shape) - 1, max(1, p.shape[-1]))
        shape = rows.absmax_shape(p.shape)
        place = _sharding(p, shape, rows)
        rows_of_p = jnp.full(shape, moment.initial, wide_dtype(p.dtype), device=place)
        values = rebox_scales(box, in_memory(rows_of_p, kind), rows, 0)
    else:
        dtype = jnp.bfloat16 if decision.bits == "bf16" else wide_dtype(p.dtype)
        values = rebox(box, in_memory(jnp.full_like(p, moment.initial, dtype=dtype), kind))
    return values, no_scales(box, kind)


def no_scales(box: Any, memory_kind: str | None = None) -> Any:
    """What stands for the scales of an array that is not in 8 bits, in its wrapper and on its devices."""
    shape = (1,) * len(unbox(box).shape)
    zeros = jnp.zeros(shape, jnp.float32, device=_sharding(unbox(box), shape, None))
    return rebox_scales(box, in_memory(zeros, memory_kind), None, 0)


def initial_codes(p: Any, code: Code, blocks: Blocks, value: Any = 0.0) -> tuple[Array, Array]:
    """Codes and scales of `value` everywhere: of zeros, or of the largest code where it is another number."""
    zeros = isinstance(value, int | float) and value == 0
    codes = jnp.full_like(p, code.zero if zeros else code.zero + code.top, dtype=code.dtype)
    shape = blocks.absmax_shape(p.shape)
    return codes, jnp.full(shape, value, jnp.float32, device=_sharding(p, shape, blocks))


def in_memory(x: Any, kind: str | None) -> Any:
    """An array in the host's memory ("pinned_host") or its device's ("device"), cut as it is; None: where it is."""
    if kind is None or kind == memory_of(x):
        return x
    return jax.device_put(x, jax.memory.Space.Host if kind == "pinned_host" else jax.memory.Space.Device)


def memory_of(x: Any) -> str:
    """The memory that an array is in, of those of `in_memory`."""
    return "pinned_host" if jax.typeof(x).memory_space == jax.memory.Space.Host else "device"


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


def is_none(x: Any) -> bool:
    """Whether a parameter has no array in a tree, as an `is_leaf`."""
    return x is None


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
    if blocks is None:
        return NamedSharding(sharding.mesh, PartitionSpec(*[None] * len(sharding.spec)))
    return where_it_divides(sharding, shape)


# --- the name of a format --------------------------------------------------------------------------------------------


def format_bytes(
    formats: Sequence[StateFormat], in_bytes: Sequence[tuple[str, tuple[int, ...], StateFormat, Blocks]] = ()
) -> np.ndarray:
    """The formats in use as one small uint8 vector.

    Its length differs for every sequence of codecs, so that a checkpoint of another codec fails on shape (orbax casts
    dtypes without a word): 12 bytes times the sequence read as a number in bijective base 3. Where the shapes of codes
    and scales do not tell how every parameter is stored, the length tells that too, but for one chance in 66: it is 72
    times that number, and a checksum that is no multiple of 12.

    Args:
        formats: the optimizer's, then those of the rules in order.
        in_bytes: path, shape, format and blocks of the parameters in 8 bits.
    """
    number, content = 0, []
    for f in formats:
        codec = _CODECS.index(f.codec) + 1
        number = 3 * number + codec
        numbers = (f.block_size or 0, f.shards, f.min_size)
        axis = 255 if f.block_axis is None else f.block_axis % 254
        content += [codec, int(f.rounding == "stochastic"), axis]
        content += [byte for x in numbers for byte in min(x, 2**24 - 1).to_bytes(3, "little")]
    untold = [f"{path} {f.codec} {blocks}" for path, shape, f, blocks in in_bytes if _untold(shape, f, blocks, formats)]
    length = _FORMAT_SIZE * number
    if untold:
        tens, ones = divmod(zlib.crc32("; ".join(sorted(untold)).encode()) % 66, _FORMAT_SIZE - 1)
        length = _FORMAT_SIZE * (6 * number + tens) + ones + 1
    vector = np.zeros(length, np.uint8)
    vector[: len(content)] = content
    return vector


def _untold(shape: tuple[int, ...], f: StateFormat, blocks: Blocks, formats: Sequence[StateFormat]) -> bool:
    """Whether the shape of the scales may be that of other codes, or of no codes at all."""
    whole = not shape or blocks.size in (1, shape[blocks.axis])
    another_size = not whole and blocks.size & (blocks.size - 1) != 0  # 384 and 512 both cut 768 in two
    no_codes = all(n == 1 for n in blocks.absmax_shape(shape))  # as for a parameter that is not in 8 bits
    return f.codec != formats[0].codec or another_size or no_codes


def format_difference(vector: Array, formats: Sequence[StateFormat]) -> str:
    """What `formats` would change in the formats that a state's `format` names; of a tracer's, the codecs alone."""
    length = vector.shape[0]
    number, codecs = length // _FORMAT_SIZE // (6 if length % _FORMAT_SIZE else 1), []
    while number > 0:
        number, codec = divmod(number - 1, 3)
        codecs.insert(0, _CODECS[codec])
    made, told = [StateFormat(codec) for codec in codecs], ("codec",)
    if not isinstance(vector, Tracer):
        made, told = _formats_of(np.asarray(vector), len(codecs)), [f.name for f in fields(StateFormat)]
    found = []
    for i, (a, b) in enumerate(zip_longest(made, formats)):
        name = "`state_format`" if i == 0 else f"the rules' format {i}"
        if a is None or b is None:
            found.append(f"{name} is {'new here' if a is None else 'missing here'}")
            continue
        pairs = {field: (getattr(a, field), getattr(b, field)) for field in told}
        changes = [f"{field} {x!r}, here {y!r}" for field, (x, y) in pairs.items() if x != y]
        found += [f"{name} had {', and '.join(changes)}"] if changes else []
    return "; ".join(found)


def _formats_of(vector: np.ndarray, n: int) -> list[StateFormat]:
    """The formats that a vector of `format_bytes` names."""
    formats = []
    for codec, stochastic, axis, *rest in vector[: n * _FORMAT_SIZE].reshape(n, _FORMAT_SIZE).tolist():
        size, shards, min_size = (int.from_bytes(rest[i : i + 3], "little") for i in (0, 3, 6))
        axis = None if axis == 255 else axis - 254 if axis > 127 else axis
        rounding = "stochastic" if stochastic else "nearest"
        formats.append(StateFormat(_CODECS[codec - 1], rounding, size or None, axis, shards, min_size))
    return formats
