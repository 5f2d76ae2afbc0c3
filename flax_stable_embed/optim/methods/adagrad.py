r"""Adagrad with an 8-bit sum of squares.

    s <- s + g^2;   u <- g / sqrt(s + eps)
    p <- p - learning_rate u

g is the gradient and p the parameter. Rule: Duchi et al. 2011, fig. 1 (jmlr.org/papers/v12/duchi11a). Storage:
Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...ops.blockwise_step.step import update_rule
from ..arguments import check_numbers
from ..engine.engine import Engine
from ..engine.method import Method
from ..engine.options import Options
from ..engine.transform import optimizer, scale_by
from ..fused_update import FusedTransformation
from ..storage.moments import MomentSpec
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Specs
from .arithmetic import inverse_root


class ScaleByAdagrad8bitState(NamedTuple):
    """State of Adagrad. `sum_of_squares` holds codes, or floating-point sums, in the shape of the parameter."""

    count: Array  # int32, the number of steps
    sum_of_squares: optax.Updates
    sum_of_squares_absmax: optax.Updates  # float32 scales: blocks instead of elements along one axis
    format: Array  # uint8, says how the state is stored


@update_rule("square", "rounded")
def adagrad(g, s, *, eps, eps_in_sqrt, square, rounded):
    """Applies the rule, with the same operations as in optax, or with eps outside the square root."""
    # XLA on CPU contracts one of the two products and the sum into one instruction. It depends on the sharding which
    # product that is, and so does the last bit. The maximum changes no value, but it prevents the contraction.
    s = jnp.maximum(square(g), 0.0) + jnp.maximum(s, 0.0) if rounded else square(g) + s
    if not eps_in_sqrt:
        return g / (jnp.sqrt(s) + eps), (s,)
    return jnp.where(s > 0, inverse_root(s + eps, rounded), 0.0) * g, (s,)


def engine(initial_accumulator_value, eps, options: Options, *, eps_in_sqrt) -> Engine:
    """Builds Adagrad's engine."""
    check_numbers(initial_accumulator_value=initial_accumulator_value, eps=eps)

    def hyper(before, after, *, eps):
        del before, after
        return {"eps": eps, "eps_in_sqrt": eps_in_sqrt}

    moment = MomentSpec(
        "sum_of_squares",
        signed=False,
        dynamic_signed=True,
        second=True,
        initial=initial_accumulator_value,
        decay=1.0,
    )
    method = Method("adagrad", ScaleByAdagrad8bitState, adagrad, (moment,), hyper, {"eps": eps}, counts_steps=False)
    return Engine(method, options)


def scale_by_adagrad8bit(
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes `optax.scale_by_rss` with an 8-bit sum of squares. `adagrad8bit` describes the arguments.

    $$u_t = \frac{g_t}{\sqrt{s_t + \epsilon}}$$

    Rule and differences from bitsandbytes: see `adagrad8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adagrad8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_adagrad8bit(), optax.scale_by_learning_rate(0.1))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return scale_by(engine(initial_accumulator_value, eps, options, eps_in_sqrt=True))


def adagrad8bit(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.adagrad` with an 8-bit sum of squares: 1.02 to 1.13 bytes of state per parameter.

    $$s_t = s_{t-1} + g_t^2, \quad u_t = -\alpha_t \frac{g_t}{\sqrt{s_t + \epsilon}}$$

    The formula, the positional arguments and their defaults are the same as in `optax.adagrad`. Moments are stored as
    in `adamw8bit`.

    The sum only grows. In late steps an element adds less than the distance between two codes, and rounding to nearest
    would discard it, while the scale of its block grows with other elements. So by default sums are dithered, which
    keeps them correct on average.

    bitsandbytes' `Adagrad8bit` starts the sum at 0, adds eps outside the square root, adds weight decay to the gradient
    and stores the sum with a signed code: `fse.interop.bitsandbytes.adagrad8bit`.

    Rule: Duchi et al. 2011, fig. 1 (jmlr.org/papers/v12/duchi11a).

    Args:
        learning_rate: The step size, a number or a schedule.
        initial_accumulator_value: Value of the sum before the first step.
        eps: Small constant added inside the square root, to avoid dividing by zero.
        rules: How each parameter is stored, and hyper-parameters of its own. See `adamw8bit` and `Rule`.
        state_format: Codec, rounding and blocks of 8-bit moments. See `StateFormat`.
        implementation: The code that runs the step, None to select it automatically. See `adamw8bit`.
        partition_specs: The sharding of each parameter, if array types do not contain it. See `adamw8bit`.
        skip_nonfinite: Whether elements with a non-finite gradient keep their parameter and moments. See `adamw8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.adagrad8bit(0.1)
    >>> state = tx.init({"kernel": jnp.ones((64, 512))})[0]
    >>> state.sum_of_squares["kernel"].dtype, float(state.sum_of_squares_absmax["kernel"].min())
    (dtype('uint8'), 0.1...)
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return optimizer(engine(initial_accumulator_value, eps, options, eps_in_sqrt=True), learning_rate)
