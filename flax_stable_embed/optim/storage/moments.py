"""How a moment is stored: its first values, their wrapper and their place on devices, and the name of its format.

- 8: codes of the parameter's shape, and absmax, float32 with blocks for elements along one axis.
- 32, "bf16": float32 (or wider) or bfloat16 of the parameter's shape; absmax is zeros of shape [1] * ndim.
- "rowwise": as 32, but second moments have a last axis of 1.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise.codecs import Code
from ...ops.blockwise.quantize import dequantize, quantize
from ...ops.blockwise_step.step import Moment
from ...ops.dtypes import at_least_float32
from ...ops.sharding import where_it_divides
from ..boxes import rebox, rebox_scales, unbox
from .plan import LeafPlan
from .rules import Bits
from .state_format import StateFormat

Sums = Literal["gradients", "directions", "steps"]


class MomentName(NamedTuple):
    """A moment's field in the state, whether it can be negative, and what it begins with.

    dynamic_signed: the sign with the `dynamic` codec, where bitsandbytes decides.
    second: a mean or a sum of squares, of which `rowwise` keeps one for each row.
    slow: a mean over so many steps that stochastic rounding acts on it, as it does on second moments.
    sums: what a trace sums: gradients, directions (gradients times a trust ratio), or steps (learning rate and all);
        None where that depends on what is before it in a chain.
    """

    name: str
    signed: bool
    dynamic_signed: bool
    second: bool = False
    initial: Any = 0.0
    slow: bool = False
    sums: Sums | None = None

    def stored(self, state_format: StateFormat) -> Moment:
        signed = self.dynamic_signed if state_format.codec == "dynamic" else self.signed
        stochastic = state_format.rounding == "stochastic" and (self.second or self.slow)
        return Moment(signed, state_format.codec, stochastic)


def initial(box: Any, moment: MomentName, plan: LeafPlan) -> tuple[Any, Any]:
    """Makes a moment before the first step, and its scales, in the parameter's wrapper and on its devices."""
    p, kind = unbox(box), plan.rule.memory_kind
    if plan.blocks is not None:
        pair = initial_codes(p, moment.stored(plan.state_format).code, plan.blocks, moment.initial)
        codes, scales = (in_memory(x, kind) for x in pair)
        return rebox(box, codes), rebox_scales(box, scales, plan.blocks, plan.state_format.shards)
    if plan.bits == "rowwise" and moment.second:
        rows = Blocks(len(p.shape) - 1, max(1, p.shape[-1]))
        shape = rows.absmax_shape(p.shape)
        place = _sharding(p, shape, rows)
        rows_of_p = jnp.full(shape, moment.initial, at_least_float32(p.dtype), device=place)
        values = rebox_scales(box, in_memory(rows_of_p, kind), rows, 0)
    else:
        dtype = jnp.bfloat16 if plan.bits == "bf16" else at_least_float32(p.dtype)
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


def quantize_moment(x: Array, moment: Moment, blocks: Blocks, key: Array | None = None) -> tuple[Array, Array]:
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


def dequantize_moment(codes: Array, absmax: Array, moment: Moment, blocks: Blocks) -> Array:
    """The float32 moment that `quantize_moment` stored."""
    return dequantize(codes, absmax, signed=moment.signed, codec=moment.codec, block_size=blocks.size, axis=blocks.axis)


def bits_of(stored: Any, shape: tuple[int, ...]) -> Bits:
    """How an array of a state is stored, by its dtype and its shape; `shape` is the parameter's."""
    if is_codes(stored.dtype):
        return 8
    if stored.dtype == jnp.bfloat16:
        return "bf16"
    return 32 if stored.shape == shape else "rowwise"


def is_codes(dtype: Any) -> bool:
    """Whether a moment of this dtype is in 8 bits."""
    return dtype in (jnp.int8, jnp.uint8)


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
