"""Holds what all optimizers of bitsandbytes share: the storage format, bias corrections and weight decay.

bitsandbytes has four implementations, which differ in details. Where they differ, these are the formulas of its CPU
build and of its plain torch version (0.50.2). Both do as torch's own optimizers do: parameters decay before the update
and are rounded once, at the end. Moments are quantized as in its CUDA build, except for ties: each number becomes the
nearest code, zero stays zero, and a NaN affects only its own element.
"""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from ...optim.engine.engine import Engine
from ...optim.engine.tail import Tail
from ...optim.engine.transform import decay_member, method_member, optimizer, rate_member
from ...optim.fused_update import FusedTransformation
from ...optim.methods.trust_ratio import clipped
from ...optim.storage.state_format import StateFormat

STATE_FORMAT = StateFormat("dynamic", "nearest", block_size=256, block_axis=-1)


def correction(b: Any, count: Array) -> Array:
    """Returns 1 - b^t within a few float32 roundings; bitsandbytes computes it in float64.

    A float32 power would lose more: at b = 0.999 the relative error is 5e-5.
    """
    return -jnp.expm1(count.astype(jnp.result_type(float)) * log(b))


def log(b: Any) -> Any:
    """Returns the natural logarithm of a decay rate, computed in float64 if the rate is a Python number."""
    if not isinstance(b, int | float):
        return jnp.log(b)
    return math.log(b) if b > 0 else -math.inf


def decayed(
    engine: Engine,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    *,
    coupled: bool = False,
    max_unorm: Any = None,
) -> FusedTransformation:
    """Builds an optimizer from an update rule: adds weight decay, clipping and the learning rate.

    With `coupled`, weight decay is added to the gradient (g + w p). Otherwise the parameter itself decays.
    """
    tail = Tail(weight_decay=weight_decay, coupled=coupled, clip=clipped(max_unorm))
    members = [method_member(engine), decay_member(tail), rate_member(learning_rate)]
    return optimizer(engine, learning_rate, tail=tail, members=members)
