"""One moment of a wrapped transform, as `quantize_state` stores it: its first value, decoded, encoded."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise.codecs import TINY
from ...ops.blockwise.quantize import merge, split
from ...ops.blockwise_step.step import Moment
from ...ops.dtypes import at_least_float32
from ...ops.sharded_like import sharded_like
from ...ops.sharding import placed_like
from ..boxes import rebox, rebox_scales, unbox
from ..storage.moments import (
    dequantize_moment,
    initial_codes,
    no_scales,
    not_differentiated,
    quantize_moment,
    rounding_of,
)
from ..storage.plan import LeafPlan
from ..storage.state_format import StateFormat
from .first_state import FirstState
from .state_fields import Field


def moment_of(field: Field, state_format: StateFormat) -> Moment:
    """Returns how the moments of a field are stored in 8 bits."""
    rounding = rounding_of(state_format, slow=field.slow, second=not field.signed)
    return Moment(field.signed, state_format.codec, rounding)


def first_number(first: FirstState, box: Any, plan: LeafPlan) -> float | None:
    """Returns the number that a moment in 8 bits begins with in all elements; None if it has to be encoded."""
    value = first.constant(unbox(box)) if plan.blocks else None
    if value is None or not np.isfinite(value) or value < 0 or 0 < value < TINY:
        return None
    return float(value)


def initial_moment(box: Any, field: Field, plan: LeafPlan, p: Any, number: float | None) -> tuple[Any, Any]:
    """Stores a moment as `tx` made it. Returns values and scales.

    Args:
        box: The moment, or its shape if `number` is known, in its wrapper.
        field: Its field.
        plan: The plan of its parameter.
        p: The parameter.
        number: The value of all elements; None if they differ.
    """
    x = unbox(box)
    if number is not None and plan.blocks is not None:
        codes, scales = initial_codes(p, moment_of(field, plan.state_format).code, plan.blocks, number)
        return rebox(box, codes), rebox_scales(box, scales, plan.blocks, plan.state_format.shards)
    if plan.blocks is None:
        wide = jnp.bfloat16 if plan.bits == "bf16" else wide_dtype(x.dtype)
        return rebox(box, x.astype(wide)), no_scales(box)
    codes, scales = quantize_moment(x, moment_of(field, plan.state_format), plan.blocks)
    return rebox(box, sharded_like(codes, x)), rebox_scales(box, scales, plan.blocks, plan.state_format.shards)


class WrappedMoment(NamedTuple):
    """A moment that a state stores in 8 bits."""

    path: str
    field: str
    plan: LeafPlan
    moment: Moment
    blocks: Blocks
    codes: Array
    absmax: Array
    at: int = 0  # the index of its scales among the leaves of `field`

    @property
    def decoded(self) -> Array:
        absmax = not_differentiated(self.absmax, self.path)
        return placed_like(dequantize_moment(self.codes, absmax, self.moment, self.blocks), self.codes)

    def encoded(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        """Returns new codes and scales. A block that `tx` did not change keeps its codes and its scale.

        All codecs except one do so by themselves. But the signed dynamic map has no code for -1, so a block whose
        largest element is negative would change.
        """
        axis, code = self.blocks.axis, self.moment.code
        codes, absmax = quantize_moment(x, self.moment, self.blocks, key)
        if 0 < code.bottom < code.top and x.shape:
            same = split(x == self.decoded, self.blocks, fill=1)
            kept = jnp.all(same, axis=axis + 1)
            absmax = jnp.where(kept, self.absmax, absmax)
            kept = jnp.broadcast_to(jnp.expand_dims(kept, axis + 1), same.shape)
            codes = jnp.where(merge(kept, self.blocks, x.shape), self.codes, codes)
        # Without this the compiler would gather an axis that is sharded in the middle of blocks.
        return sharded_like(codes, self.codes), placed_like(absmax, self.absmax)


def wide_dtype(dtype: Any) -> Any:
    """Returns float32 for half precision, else the dtype itself."""
    return at_least_float32(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype
