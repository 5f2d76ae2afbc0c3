r"""RMSprop with 8-bit moments.

    v <- b v + (1 - b) g^2;   u <- g / sqrt(v + eps);   p <- p - learning_rate u
    centered: m <- b m + (1 - b) g, with v - m^2 in place of v
    with momentum: t <- learning_rate u + c t;   p <- p - t

g is the gradient, p the parameter, b the decay and c the momentum. Rule: Hinton 2012
(cs.toronto.edu/~hinton/coursera/lecture6/lec6.pdf). Centered: Graves 2013, eq. 38 to 41 (arXiv:1308.0850). Storage:
Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...ops.blockwise_step.step import square as abs_square
from ...ops.blockwise_step.step import update_rule
from ..arguments import check_numbers
from ..engine.engine import Engine
from ..engine.method import Method
from ..engine.options import Options
from ..engine.transform import STATELESS, method_member, optimizer, rate_member, scale_by
from ..fused_update import FusedTransformation
from ..storage.moments import MomentSpec
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Specs
from .arithmetic import correction, inverse_root, over
from .sgd import sgd


class ScaleByRmsprop8bitState(NamedTuple):
    """State of RMSprop.

    `nu`, `mu` and `trace` hold codes, or floating-point moments, in the shape of the parameter. `mu` is None unless
    centered, `trace` is None without momentum.
    """

    count: Array  # int32, the number of steps
    nu: optax.Updates
    nu_absmax: optax.Updates  # float32 scales: blocks instead of elements along one axis
    format: Array  # uint8, says how the state is stored
    mu: optax.Updates | None = None  # centered
    mu_absmax: optax.Updates | None = None
    trace: optax.Updates | None = None  # momentum
    trace_absmax: optax.Updates | None = None


@update_rule("square", "rounded", "step_size")
def rmsprop(g, v, *others, decay, eps, eps_in_sqrt, centered, c, momentum, nesterov, square, rounded, step_size):
    """Applies the rule, with the same operations in the same order as in optax.

    `others` has the mean if centered, then the trace if there is momentum. Rounded moments need not satisfy v >= m^2,
    so then the variance is clipped at zero.
    """
    others = list(others)
    new = [(1 - decay) * square(g) + decay * v]
    variance = new[0] if c is None else over(new[0], c, rounded)
    if centered:
        new.append((1 - decay) * g + decay * others.pop(0))
        variance = variance - abs_square(new[1] if c is None else over(new[1], c, rounded))
        if rounded:
            variance = jnp.maximum(variance, 0.0)
    u = (inverse_root(variance + eps, rounded) if eps_in_sqrt else 1 / (jnp.sqrt(variance) + eps)) * g
    if step_size is not None:
        u = step_size * u
    if others:
        u, trace = sgd(u, others.pop(), momentum=momentum, nesterov=nesterov)
        new += trace
    return u, tuple(new)


def engine(
    decay,
    eps,
    initial_scale,
    momentum,
    options: Options,
    *,
    eps_in_sqrt,
    centered,
    bias_correction,
    nesterov=False,
) -> Engine:
    """Builds RMSprop's engine."""
    check_numbers(decay=decay, eps=eps, initial_scale=initial_scale)
    moments = [MomentSpec("nu", signed=False, dynamic_signed=True, second=True, initial=initial_scale, decay="b2")]
    if centered:
        moments.append(MomentSpec("mu", signed=True, dynamic_signed=True, decay="b2"))
    if momentum is not None:
        check_numbers(momentum=momentum)
        moments.append(MomentSpec("trace", signed=True, dynamic_signed=True, decay="b1", sums="steps"))

    def hyper(before, after, *, b2, eps, b1=0.0):
        del before
        c = correction(b2, after) if bias_correction else None
        flags = {"eps_in_sqrt": eps_in_sqrt, "centered": centered, "nesterov": nesterov}
        return {"decay": b2, "eps": eps, "c": c, "momentum": b1, **flags}

    overridable = {"b2": decay, "eps": eps} | ({} if momentum is None else {"b1": momentum})
    method = Method(
        "rmsprop",
        ScaleByRmsprop8bitState,
        rmsprop,
        tuple(moments),
        hyper,
        overridable,
        centered=centered,
        counts_steps=bias_correction,
    )
    return Engine(method, options)


def scale_by_rmsprop8bit(
    decay: float = 0.9,
    eps: float = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes `optax.scale_by_rms`, or if centered `optax.scale_by_stddev`, with 8-bit moments. See `rmsprop8bit`.

    $$u_t = \frac{g_t}{\sqrt{v_t + \epsilon}}$$

    Rule and differences from bitsandbytes: see `rmsprop8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `rmsprop8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_rmsprop8bit(), optax.scale_by_learning_rate(1e-3))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    flags = {"eps_in_sqrt": eps_in_sqrt, "centered": centered, "bias_correction": bias_correction}
    return scale_by(engine(decay, eps, initial_scale, None, options, **flags))


def rmsprop8bit(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    eps: float = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.rmsprop` with 8-bit moments: 1.02 to 1.13 bytes per parameter for each moment.

    $$v_t = b v_{t-1} + (1 - b) g_t^2, \quad u_t = -\alpha_t \frac{g_t}{\sqrt{v_t + \epsilon}}$$

    If centered, $v_t$ is replaced by $v_t - m_t^2$. With momentum, the update is $t_t = u_t + c\, t_{t-1}$, where
    $u_t$ already contains the learning rate, as in optax.

    The formula, the positional arguments and their defaults are the same as in `optax.rmsprop`. Moments are stored as
    in `adamw8bit`. One thing differs: if rounding makes the centered variance negative, it is clipped at zero, where
    `optax.rmsprop` would return NaN.

    bitsandbytes' `RMSprop8bit` is not centered and has no momentum (it accepts the argument and ignores it). It adds
    eps outside the square root, adds weight decay to the gradient, and stores $v$ with a signed code, which leaves half
    of the codes unused: `fse.interop.bitsandbytes.rmsprop8bit`. The `dynamic` codec stores $v$ in this way here too.

    Rule: Hinton 2012, lecture 6. Centered: Graves 2013, eq. 38 to 41 (arXiv:1308.0850).

    Args:
        learning_rate: The step size, a number or a schedule.
        decay: Exponential decay rate of the second moment, the average of past squared gradients. If centered, also of
            the average of past gradients.
        eps: Small constant added in the denominator, to avoid dividing by zero.
        initial_scale: Value of the second moment before the first step.
        eps_in_sqrt: Whether eps is added inside the square root. PyTorch adds it outside.
        centered: Whether to divide by the standard deviation of past gradients instead of their root mean square.
        momentum: Decay rate of a trace that sums past updates. None means no momentum.
        nesterov: Whether to use Nesterov momentum. Has no effect without momentum.
        bias_correction: Whether to correct the averages for their initial values: they are divided by 1 - decay^t.
        rules: How each parameter is stored, and hyper-parameters of its own. See `adamw8bit` and `Rule`.
            There `b1` is the momentum and `b2` the decay.
        state_format: Codec, rounding and blocks of 8-bit moments. See `StateFormat`.
        implementation: The code that runs the step, None to select it automatically. See `adamw8bit`.
        partition_specs: The sharding of each parameter, if array types do not contain it. See `adamw8bit`.
        skip_nonfinite: Whether elements with a non-finite gradient keep their parameter and moments. See `adamw8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> state = fse.rmsprop8bit(1e-3, centered=True, momentum=0.9).init(params)[0]
    >>> state.nu["kernel"].dtype, state.mu["kernel"].dtype, state.trace["kernel"].dtype
    (dtype('uint8'), dtype('int8'), dtype('int8'))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    flags = {"eps_in_sqrt": eps_in_sqrt, "centered": centered, "bias_correction": bias_correction}
    method = engine(decay, eps, initial_scale, momentum, options, nesterov=nesterov, **flags)
    members = [method_member(method), rate_member(learning_rate), ("trace", STATELESS)]
    return optimizer(method, learning_rate, members=members)
