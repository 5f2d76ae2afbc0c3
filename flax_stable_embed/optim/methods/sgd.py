r"""SGD with an 8-bit momentum trace.

    t <- g + b t;   u <- t, or with Nesterov momentum g + b t
    p <- p - learning_rate u

g is the gradient, p the parameter, t the trace and b the momentum. Rule: Sutskever et al. 2013, sec. 2
(proceedings.mlr.press/v28/sutskever13). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import NamedTuple

import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...ops.blockwise_step.step import UpdateRule, update_rule
from ..arguments import check_numbers, refuse_dtype
from ..engine.engine import Engine
from ..engine.method import Method
from ..engine.options import Options
from ..engine.transform import optimizer, scale_by
from ..fused_update import FusedTransformation
from ..storage.moments import MomentSpec, Sums
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Specs


class ScaleBySgd8bitState(NamedTuple):
    """State of SGD.

    `trace` holds int8 or uint8 codes, or floating-point numbers, in the shape of the parameter. Without momentum it is
    None.
    """

    count: Array  # int32, the number of steps
    format: Array  # uint8, says how the state is stored
    trace: optax.Updates | None = None
    trace_absmax: optax.Updates | None = None  # float32 scales: blocks instead of elements along one axis


@update_rule()
def sgd(g, t, *, momentum, nesterov):
    """Applies the rule, with the same operations in the same order as in optax."""
    t = g + momentum * t
    return g + momentum * t if nesterov else t, (t,)


@update_rule()
def plain_sgd(g):
    """Applies the update rule without momentum: the update is the gradient."""
    return g, ()


def engine(
    momentum,
    accumulator_dtype,
    options: Options,
    *,
    nesterov=False,
    rule: UpdateRule = sgd,
    name="sgd",
    sums: Sums | None = None,
) -> Engine:
    """Builds the engine of SGD. `lars8bit` uses it with another rule."""
    refuse_dtype("accumulator_dtype", accumulator_dtype)
    if momentum is None:
        method = Method(name, ScaleBySgd8bitState, plain_sgd, (), lambda before, after: {}, counts_steps=False)
        return Engine(method, options)
    check_numbers(momentum=momentum)

    def hyper(before, after, *, b1):
        del before, after
        return {"momentum": b1, "nesterov": nesterov}

    trace = MomentSpec("trace", signed=True, dynamic_signed=True, decay="b1", sums=sums)
    method = Method(name, ScaleBySgd8bitState, rule, (trace,), hyper, {"b1": momentum}, counts_steps=False)
    return Engine(method, options)


def scale_by_sgd8bit(
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: None = None,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes `optax.trace` with an 8-bit trace. `sgd8bit` describes the arguments.

    $$t_t = g_t + b\, t_{t-1} \ \text{ or, Nesterov, } g_t + b\, t_t$$

    Rule and differences from bitsandbytes: see `sgd8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `sgd8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_sgd8bit(momentum=0.9), optax.scale_by_learning_rate(0.1))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return scale_by(engine(momentum, accumulator_dtype, options, nesterov=nesterov))


def sgd8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: None = None,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.sgd` with an 8-bit momentum trace: 1.02 to 1.13 bytes of state per parameter.

    $$t_t = g_t + b\, t_{t-1}, \quad u_t = -\alpha_t t_t \ \text{ or, Nesterov, } -\alpha_t (g_t + b\, t_t)$$

    The formula, the positional arguments and their defaults are the same as in `optax.sgd`. `accumulator_dtype` must be
    None. The trace is stored as the moments of `adamw8bit`.

    bitsandbytes' `SGD8bit` has no Nesterov momentum (it accepts the argument and ignores it), and it adds weight decay
    to the gradient. For that formula use `fse.interop.bitsandbytes.sgd8bit`, or
    `optax.chain(optax.add_decayed_weights(...), sgd8bit(...))`.

    Rule: Sutskever et al. 2013, sec. 2 (proceedings.mlr.press/v28/sutskever13).

    Args:
        learning_rate: The step size, a number or a schedule.
        momentum: Decay rate of the trace, the sum of past gradients. None means no momentum and no state, as in optax.
        nesterov: Whether to use Nesterov momentum.
        accumulator_dtype: Must be None. It is only here so that positional arguments match optax.
        rules: How each parameter is stored, and hyper-parameters of its own. See `adamw8bit` and `Rule`.
            There `b1` is the momentum.
        state_format: Codec, rounding and blocks of 8-bit moments. See `StateFormat`.
        implementation: The code that runs the step, None to select it automatically. See `adamw8bit`.
        partition_specs: The sharding of each parameter, if array types do not contain it. See `adamw8bit`.
        skip_nonfinite: Whether elements with a non-finite gradient keep their parameter and moments. See `adamw8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.sgd8bit(0.1, momentum=0.9, nesterov=True)
    >>> tx.init(params)[0].trace["kernel"].dtype
    dtype('int8')
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    method = engine(momentum, accumulator_dtype, options, nesterov=nesterov, sums="gradients")
    return optimizer(method, learning_rate)
