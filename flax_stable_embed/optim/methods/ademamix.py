r"""AdEMAMix with three 8-bit moments.

    m1 <- b1 m1 + (1 - b1) g;   m2 <- b3 m2 + (1 - b3) g;   v <- b2 v + (1 - b2) g^2
    u <- (m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t) + eps_root) + eps)
    p <- p - learning_rate (u + weight_decay p)

g is the gradient, p the parameter and t the number of the step. Rule: Pagliardini et al. 2024, Alg. 1
(arXiv:2409.03137). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...ops.blockwise_step.step import update_rule
from ..arguments import check_numbers, check_schedules, refuse_dtype
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
from .arithmetic import correction, over


class ScaleByAdemamix8bitState(NamedTuple):
    """State of AdEMAMix.

    `m1` (the fast average), `m2` (the slow one) and `nu` hold codes, or floating-point moments, in the shape of the
    parameter.
    """

    count: Array  # int32, the number of steps
    count_m2: Array  # the same number again, as in optax
    m1: optax.Updates
    m2: optax.Updates
    nu: optax.Updates
    m1_absmax: optax.Updates  # float32 scales: blocks instead of elements along one axis
    m2_absmax: optax.Updates
    nu_absmax: optax.Updates
    format: Array  # uint8, says how the state is stored


@update_rule("square", "rounded")
def ademamix(g, m1, m2, v, *, b1, b2, b3, b3_rest, alpha, eps, eps_root, c1, c2, square, rounded):
    """Applies the rule, with the same operations in the same order as in optax.

    `c1` is 1 - b1^t, `c2` is 1 - b2^t and `b3_rest` is 1 - b3.
    """
    m1 = (1 - b1) * g + b1 * m1
    m2 = b3_rest * g + b3 * m2
    v = (1 - b2) * square(g) + b2 * v
    return (over(m1, c1, rounded) + alpha * m2) / (jnp.sqrt(over(v, c2, rounded) + eps_root) + eps), (m1, m2, v)


def engine(
    b1,
    b2,
    b3,
    alpha,
    eps,
    eps_root,
    mu_dtype,
    options: Options,
    *,
    correction: Any = correction,
    growing_b3: Any = None,
) -> Engine:
    """Builds AdEMAMix' engine. `growing_b3(count, b1)`, if given, returns b3 and 1 - b3 at a step, instead of `b3`."""
    refuse_dtype("mu_dtype", mu_dtype)
    check_numbers(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    check_schedules(b3=b3, alpha=alpha)

    def hyper(before, after, *, b1, b2, eps):
        if growing_b3 is None:
            b3_now: Any = b3(before) if callable(b3) else b3
            rest = 1 - b3_now
        else:
            b3_now, rest = growing_b3(before, b1)
        slow = {"b3": b3_now, "b3_rest": rest, "alpha": alpha(before) if callable(alpha) else alpha}
        corrections = {"c1": correction(b1, after), "c2": correction(b2, after)}
        return {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, **slow, **corrections}

    moments = (
        MomentSpec("m1", signed=True, dynamic_signed=True, decay="b1"),
        MomentSpec("m2", signed=True, dynamic_signed=True, decay=b3 if isinstance(b3, int | float) else 1.0),
        MomentSpec("nu", signed=False, dynamic_signed=False, second=True, decay="b2"),
    )
    overridable = {"b1": b1, "b2": b2, "eps": eps}
    return Engine(Method("ademamix", ScaleByAdemamix8bitState, ademamix, moments, hyper, overridable), options)


def scale_by_ademamix8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 6.0,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: None = None,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes `optax.contrib.scale_by_ademamix` with 8-bit moments. `ademamix8bit` describes the arguments.

    $$u_t = \frac{m^{(1)}_t / (1 - b_1^t) + a_t m^{(2)}_t}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}$$

    Rule and differences from bitsandbytes: see `ademamix8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `ademamix8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_ademamix8bit(), optax.scale_by_learning_rate(1e-3))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return scale_by(engine(b1, b2, b3, alpha, eps, eps_root, mu_dtype, options))


def ademamix8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.contrib.ademamix` with 8-bit moments: 3.05 to 3.38 bytes per parameter instead of 12.

    $$u_t = -\alpha_t \left( \frac{m^{(1)}_t / (1 - b_1^t) + a_t m^{(2)}_t}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} +
    \epsilon} + \lambda \theta_t \right)$$

    The formula, the positional arguments and their defaults are the same as in `optax.contrib.ademamix`. `mu_dtype`
    must be None. The slow average has no bias correction. Moments are stored as in `adamw8bit`.

    A step changes the slow average by only 1 - b3 of a gradient. That is less than the distance between two codes
    unless gradients are noisy. So by default the slow average is dithered, and follows smooth gradients too.

    bitsandbytes' `AdEMAMix8bit` has a weight decay of 0.01 by default and schedules of its own:
    `fse.interop.bitsandbytes.ademamix8bit(t_alpha=..., t_beta3=...)`.

    Rule: Pagliardini et al. 2024, Alg. 1 (arXiv:2409.03137).

    Args:
        learning_rate: The step size, a number or a schedule.
        b1: Exponential decay rate of the fast average of past gradients.
        b2: Exponential decay rate of the second moment.
        b3: Exponential decay rate of the slow average of past gradients, a number or a schedule.
        alpha: Weight of the slow average in the direction, a number or a schedule.
        eps: Small constant added to the denominator, outside the square root, to avoid dividing by zero.
        eps_root: Small constant added inside the square root.
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

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.ademamix8bit(1e-3, alpha=optax.linear_schedule(0.0, 5.0, 1000))
    >>> tx.init(params)[0].m2["kernel"].dtype
    dtype('int8')
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    method = engine(b1, b2, b3, alpha, eps, eps_root, mu_dtype, options)
    tail = Tail(weight_decay=weight_decay, mask=mask)
    members = [method_member(method), decay_member(tail), rate_member(learning_rate)]
    return optimizer(method, learning_rate, tail=tail, members=members)
