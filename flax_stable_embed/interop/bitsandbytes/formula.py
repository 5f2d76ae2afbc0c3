"""What all optimizers of bitsandbytes share: how moments are stored, bias corrections, what is around the rule.

Its four implementations differ in details; where they do, these are the formulas of its CPU build and of its plain
torch one (0.50.2), which do what torch's own optimizers do: decay before the update, one rounding at the end. Its
quantizer is the CUDA build's but for ties: the nearest code, zero stays zero, and a NaN stays one element's affair.
"""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from ...optim.engine.engine import Engine
from ...optim.engine.tail import Tail
from ...optim.engine.transform import optimizer
from ...optim.fused_update import FusedTransformation
from ...optim.methods.trust_ratio import clipped
from ...optim.storage.state_format import StateFormat

STATE_FORMAT = StateFormat("dynamic", block_size=256, block_axis=-1)


def correction(b: Any, count: Array) -> Array:
    """1 - b^t to a float32 rounding or two, as bitsandbytes has it in float64; by powers, 5e-5 would be lost."""
    return -jnp.expm1(count.astype(jnp.result_type(float)) * log(b))


def log(b: Any) -> Any:
    """The natural logarithm of a decay rate, in float64 where it is a Python number."""
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
    """An optimizer: decay, of the parameter or (`coupled`) in the gradient, clipping and learning rate."""
    tail = Tail(weight_decay=weight_decay, coupled=coupled, clip=clipped(max_unorm))
    return optimizer(engine, learning_rate, tail=tail, members=("method", "decay", "rate"))
