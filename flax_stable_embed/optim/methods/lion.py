r"""Lion with an 8-bit moment.

    u <- sign(b1 m + (1 - b1) g);   m <- b2 m + (1 - b2) g
    p <- p - learning_rate (u + weight_decay p)

g is the gradient and p the parameter. Rule: Chen et al. 2023, Alg. 2 (arXiv:2302.06675). Storage: Dettmers et al.
2022, sec. 2 (arXiv:2110.02861).
"""

from typing import NamedTuple

import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...ops.blockwise_step.step import update_rule
from ..arguments import check_numbers, refuse_dtype
from ..engine.engine import Engine
from ..engine.method import Method
from ..engine.options import Options
from ..engine.tail import Tail
from ..engine.transform import decay_member, method_member, optimizer, rate_member, scale_by
from ..fused_update import FusedTransformation
from ..storage.moments import MomentSpec
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Mask, Specs
from .arithmetic import sign


class ScaleByLion8bitState(NamedTuple):
    """State of Lion. `mu` holds codes (int8, uint8) or floating-point moments in the parameter's shape."""

    count: Array  # int32, the number of steps
    mu: optax.Updates
    mu_absmax: optax.Updates  # float32 scales: blocks instead of elements along one axis
    format: Array  # uint8, says how the state is stored


@update_rule()
def lion(g, m, *, b1, b2):
    """Applies the rule, with the same operations in the same order as in optax."""
    return sign((1.0 - b1) * g + b1 * m), ((1 - b2) * g + b2 * m,)


def engine(b1, b2, mu_dtype, options: Options) -> Engine:
    """Builds Lion's engine."""
    refuse_dtype("mu_dtype", mu_dtype)
    check_numbers(b1=b1, b2=b2)

    def hyper(before, after, *, b1, b2):
        del before, after
        return {"b1": b1, "b2": b2}

    mu = MomentSpec("mu", signed=True, dynamic_signed=True, decay="b2")
    return Engine(Method("lion", ScaleByLion8bitState, lion, (mu,), hyper, {"b1": b1, "b2": b2}), options)


def scale_by_lion8bit(
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: None = None,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes `optax.scale_by_lion` with an 8-bit moment. `lion8bit` describes the arguments.

    $$u_t = \mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t)$$

    Rule and differences from bitsandbytes: see `lion8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `lion8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_lion8bit(), optax.scale_by_learning_rate(1e-4))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return scale_by(engine(b1, b2, mu_dtype, options))


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.lion` with an 8-bit moment: 1.02 to 1.13 bytes of state per parameter.

    $$u_t = -\alpha_t \left( \mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t) + \lambda \theta_t \right), \quad
    m_t = b_2 m_{t-1} + (1 - b_2) g_t$$

    The formula, the positional arguments and their defaults are the same as in `optax.lion`, in the mode "hard" of
    `optax.scale_by_lion`. `mu_dtype` must be None. Moments are stored as in `adamw8bit`.

    bitsandbytes' `Lion8bit` has other defaults: a learning rate of 1e-4 and no weight decay. It also moves elements
    without a gradient. The table of its CPU quantizer has no zero, and the sign of the number that it stores instead
    moves such an element by the learning rate in every step. Here zero is stored as zero, and the element stays.

    Rule: Chen et al. 2023, Alg. 2 (arXiv:2302.06675).

    Args:
        learning_rate: The step size, a number or a schedule.
        b1: Weight of the moment in the direction; the gradient has the weight 1 - b1.
        b2: Exponential decay rate of the moment, the average of past gradients.
        mu_dtype: Must be None. It is only here so that positional arguments match optax.
        weight_decay: Strength of the weight decay, a number or a schedule. It is multiplied by the learning rate.
        mask: Pytree of booleans that says where weights decay, or a function that returns one. See `adamw8bit`.
        rules: How each parameter is stored, and hyper-parameters of its own. See `adamw8bit` and `Rule`.
        state_format: Codec, rounding and blocks of 8-bit moments. See `StateFormat`.
        implementation: The code that runs the step, None to select it automatically. See `adamw8bit`.
        partition_specs: The sharding of each parameter, if array types do not contain it. See `adamw8bit`.
        skip_nonfinite: Whether elements with a non-finite gradient keep their parameter and moments. See `adamw8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.lion8bit(1e-4, weight_decay=0.1)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> state[0].mu["kernel"].dtype
    dtype('int8')
    """
    method = engine(b1, b2, mu_dtype, Options(rules, state_format, implementation, partition_specs, skip_nonfinite))
    tail = Tail(weight_decay=weight_decay, mask=mask)
    members = [method_member(method), decay_member(tail), rate_member(learning_rate)]
    return optimizer(method, learning_rate, tail=tail, members=members)
