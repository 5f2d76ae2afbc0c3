"""Stores moments: makes the first arrays, quantizes and dequantizes them, and moves them between memories.

A moment is two arrays, its values and its scales (`absmax`). The parameter's `bits` decide how they are stored:

- 8: codes in the parameter's shape, and float32 scales, whose shape has blocks for elements along one axis.
- 32: float32 (or wider) in the parameter's shape. The scales are zeros of shape [1] * ndim, which nothing reads.
- "bf16": the same in bfloat16.
- "rowwise": the same in float32, but second moments have a last axis of 1.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise.codecs import Code
from ...ops.blockwise.quantize import dequantize, quantize_by_key
from ...ops.blockwise_step.step import Moment
from ...ops.counter_random import Rounding
from ...ops.dtypes import at_least_float32
from ...ops.sharding import where_it_divides
from ..boxes import rebox, rebox_scales, unbox
from ..derivatives import refuse_derivative
from ..placement import device_of
from ..trees import is_array
from .plan import LeafPlan
from .rules import Bits
from .state_format import StateFormat

Sums = Literal["gradients", "directions", "steps"]

# Second moments, and other moments, with these decays or higher ones are dithered by default. `python -m benchmarks
# rounding` measures where dither begins to be better than rounding to nearest.
SLOW_SECOND, SLOW = 0.99, 0.999


def rounding_of(state_format: StateFormat, *, slow: bool, second: bool) -> Rounding:
    """Returns the rounding of a moment in a format."""
    if state_format.rounding is None:
        return "dither" if slow else "nearest"
    return state_format.rounding if slow or second else "nearest"


class MomentSpec(NamedTuple):
    """Declares a moment that an optimizer keeps for every parameter.

    Attributes:
        name: Its field in the state. The field `<name>_absmax` has its scales.
        signed: Whether it can be negative.
        dynamic_signed: Whether its codes are signed with the `dynamic` codec, which follows bitsandbytes.
        second: Whether it is an average or a sum of squares. With "rowwise" there is one per row.
        initial: Its value before the first step.
        decay: What it keeps of its value in one step: the name of a hyper-parameter, or a number (1.0 for a sum).
        sums: For a trace, the terms that it sums: gradients, directions (gradients times a trust ratio) or steps
            (which include the learning rate). None if that depends on the transforms before it in a chain.
    """

    name: str
    signed: bool
    dynamic_signed: bool
    second: bool = False
    initial: Any = 0.0
    decay: str | float | None = None
    sums: Sums | None = None

    def stored(self, state_format: StateFormat, hyper: Mapping[str, Any] = MappingProxyType({})) -> Moment:
        """Returns how the moment is stored in a format.

        Args:
            state_format: The format.
            hyper: The hyper-parameters that `decay` may name.
        """
        signed = self.dynamic_signed if state_format.codec == "dynamic" else self.signed
        decay = hyper.get(self.decay) if isinstance(self.decay, str) else self.decay
        known = isinstance(decay, int | float)
        slow = decay >= (SLOW_SECOND if self.second else SLOW) if known else self.second
        return Moment(signed, state_format.codec, rounding_of(state_format, slow=slow, second=self.second))


def initial(box: Any, moment: MomentSpec, plan: LeafPlan) -> tuple[Any, Any]:
    """Makes a moment before the first step: values and scales, in the parameter's wrapper and sharded like it."""
    p, kind = unbox(box), plan.memory_kind
    if plan.blocks is not None:
        pair = initial_codes(p, moment.stored(plan.state_format).code, plan.blocks, moment.initial)
        codes, scales = (in_memory(x, kind) for x in pair)
        return rebox(box, codes), rebox_scales(box, scales, plan.blocks, plan.state_format.shards)
    if plan.bits == "rowwise" and moment.second:
        rows = Blocks(len(p.shape) - 1, max(1, p.shape[-1]))
        shape = rows.absmax_shape(p.shape)
        per_row = jnp.full(shape, moment.initial, at_least_float32(p.dtype), device=_sharding(p, shape, rows))
        values = rebox_scales(box, in_memory(per_row, kind), rows, 0)
    else:
        dtype = jnp.bfloat16 if plan.bits == "bf16" else at_least_float32(p.dtype)
        values = rebox(box, in_memory(jnp.full_like(p, moment.initial, dtype=dtype), kind))
    return values, no_scales(box, kind)


def no_scales(box: Any, memory_kind: str | None = None) -> Any:
    """Makes the placeholder for the scales of an array that is not in 8 bits, in its wrapper and on its mesh."""
    shape = (1,) * len(unbox(box).shape)
    zeros = jnp.zeros(shape, jnp.float32, device=_sharding(unbox(box), shape, None))
    return rebox_scales(box, in_memory(zeros, memory_kind), None, 0)


def initial_codes(p: Any, code: Code, blocks: Blocks, value: Any = 0.0) -> tuple[Array, Array]:
    """Makes codes and scales that decode to `value`: zeros, or else the largest code with this scale."""
    zeros = isinstance(value, int | float) and value == 0
    codes = jnp.full_like(p, 0 if zeros else code.top, dtype=code.dtype)
    shape = blocks.absmax_shape(p.shape)
    return codes, jnp.full(shape, value, jnp.float32, device=_sharding(p, shape, blocks))


def in_memory(x: Any, kind: str | None) -> Any:
    """Moves an array to host memory ("pinned_host") or to the device ("device"). None leaves it where it is."""
    if kind is None or kind == memory_of(x):
        return x
    return jax.device_put(x, jax.memory.Space.Host if kind == "pinned_host" else jax.memory.Space.Device)


def memory_of(x: Any) -> str:
    """Returns the memory that holds an array: "pinned_host" or "device"."""
    return "pinned_host" if jax.typeof(x).memory_space == jax.memory.Space.Host else "device"


def not_differentiated(x: Array, path: str) -> Array:
    """Returns an array of a moment in 8 bits or bfloat16, through which no derivative can flow.

    Codes are integers and bfloat16 is rounded by bits, so JAX would take the derivative of a moment for zero.
    """
    return refuse_derivative(
        x,
        f"A derivative reaches the moments of parameter {path!r}, which are not stored in 32 bits, so it would be "
        'wrong. To differentiate through several steps of an optimizer, use rules=((".*", 32),). To train with a '
        "gradient that depends on the state, use jax.lax.stop_gradient(state).",
    )


def quantize_moment(x: Array, moment: Moment, blocks: Blocks, key: Array | None = None) -> tuple[Array, Array]:
    """Quantizes a moment to codes and scales. `key` is from `rounding_key`; without it, rounds to nearest."""
    rounding = "nearest" if key is None else moment.rounding
    return quantize_by_key(
        x,
        None if rounding == "nearest" else key,
        blocks=blocks,
        codec=moment.codec,
        signed=moment.signed,
        rounding=rounding,
    )


def dequantize_moment(codes: Array, absmax: Array, moment: Moment, blocks: Blocks) -> Array:
    """Dequantizes a moment that `quantize_moment` stored, to float32."""
    return dequantize(codes, absmax, signed=moment.signed, codec=moment.codec, block_size=blocks.size, axis=blocks.axis)


def bits_of(stored: Any, shape: tuple[int, ...]) -> Bits:
    """Returns how a moment is stored, from its dtype and shape. `shape` is the shape of the parameter."""
    if is_codes(stored.dtype):
        return 8
    if stored.dtype == jnp.bfloat16:
        return "bf16"
    return 32 if stored.shape == shape else "rowwise"


# The dtypes of moments: codes, "bf16", 32 bits or wider.
_DTYPES = {np.dtype(x) for x in ("int8", "uint8", jnp.bfloat16, "float32", "float64", "complex64", "complex128")}


def checked_scales(path: str, field: str, stored: Any, scales: Any) -> Any:
    """Returns the scales of a moment in float32. Checks what a checkpoint loader may have cast.

    Raises:
        ValueError: The moment or its scales are not arrays, or have a dtype that `init` never gives them. In float16
            most moments would be zero or infinite, and as integers all of them zero.
    """
    for name, x in ((field, stored), (f"{field}_absmax", scales)):
        if not is_array(x):
            raise ValueError(
                f"`{name}` of parameter {path!r} is {x!r:.40} in the state, where `init` makes an array. Restore the "
                "state as `init` makes it."
            )
    if scales.dtype == jnp.bfloat16 and stored.dtype in _DTYPES:
        return scales.astype(jnp.float32)
    name, dtype = (f"{field}_absmax", scales.dtype) if stored.dtype in _DTYPES else (field, stored.dtype)
    if dtype != jnp.float32:
        raise ValueError(
            f"`{name}` of parameter {path!r} is {dtype} in the state, where `init` makes float32. Restore the state "
            "with the dtypes of fse.abstract_state, or of `init`. (bfloat16 scales are widened; in float16 small "
            "moments are zero and large ones infinite, so they cannot be repaired.)"
        )
    return scales


def is_codes(dtype: Any) -> bool:
    """Returns whether a moment of this dtype is stored in 8 bits."""
    return dtype in (jnp.int8, jnp.uint8)


def _sharding(p: Any, shape: tuple[int, ...], blocks: Blocks | None) -> Sharding | None:
    """Returns the sharding of `p` for another shape, without axes that do not divide it; or the device of `p`.

    None means that JAX chooses, as for `jnp.zeros_like`.
    """
    sharding = jax.typeof(p).sharding if isinstance(p, Tracer) else getattr(p, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return device_of(p)
    if isinstance(p, Tracer) and AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    if blocks is None:
        return NamedSharding(sharding.mesh, PartitionSpec(*[None] * len(sharding.spec)))
    return where_it_divides(sharding, shape)
