r"""RMSprop with its moments in one byte each.

    v <- b v + (1 - b) g^2;   u <- g / sqrt(v + eps)
    centered: m <- b m + (1 - b) g, and v - m^2 in place of v;   with momentum: t <- a u + c t, and t in place of u

Rule: Hinton 2012 (cs.toronto.edu/~hinton/coursera/lecture6/lec6.pdf); centered: Graves 2013, eq. 38 to 41
(arXiv:1308.0850). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import Any, NamedTuple

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
from ..storage.moments import MomentName
from ..storage.state_format import StateFormat
from .arithmetic import correction, inverse_root, over
from .sgd import sgd


class ScaleByRmsprop8bitState(NamedTuple):
    """State of RMSprop. Moments: codes, or fp32 values, in the parameter's shape; None where the option is off."""

    count: Array  # shape=(), dtype=int32
    nu: optax.Updates
    nu_absmax: optax.Updates  # float32, the parameter's shape with blocks for elements on one axis; ones without codes
    format: Array  # uint8, names the codecs and block settings
    mu: optax.Updates | None = None  # centered
    mu_absmax: optax.Updates | None = None
    trace: optax.Updates | None = None  # momentum
    trace_absmax: optax.Updates | None = None


@update_rule("square", "rounded", "step_size")
def rmsprop(g, v, *others, decay, eps, eps_in_sqrt, centered, c, momentum, nesterov, square, rounded, step_size):
    """The rule, operation by operation as optax writes it; `others`: the mean if centered, the trace if momentum.

    Decoded moments need not satisfy v >= m^2: where they were rounded, the variance is clipped at zero.
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
    moments = [MomentName("nu", signed=False, dynamic_signed=True, second=True, initial=initial_scale)]
    if centered:
        moments.append(MomentName("mu", signed=True, dynamic_signed=True))
    if momentum is not None:
        check_numbers(momentum=momentum)
        moments.append(MomentName("trace", signed=True, dynamic_signed=True, sums="steps"))

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
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.scale_by_rms`, or centered `optax.scale_by_stddev`, in one byte each; see `rmsprop8bit`.

    $$u_t = \frac{g_t}{\sqrt{v_t + \epsilon}}$$

    Rule, and what differs from bitsandbytes: `rmsprop8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `rmsprop8bit`.

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
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.rmsprop` with its moments in one byte each: 1.02 to 1.13 bytes a parameter for each of them.

    $$v_t = b v_{t-1} + (1 - b) g_t^2, \quad u_t = -\alpha_t \frac{g_t}{\sqrt{v_t + \epsilon}}$$

    Centered, $v_t - m_t^2$ stands for $v_t$, clipped at zero where the moments are rounded; with momentum, $t_t = u_t +
    c\, t_{t-1}$ is the update, as in optax after the learning rate. bitsandbytes' `RMSprop8bit` has neither of them
    (it takes momentum and ignores it), puts eps outside the square root, adds weight decay to the gradient and stores
    $v$ with a signed code, which leaves half of the codes unused: `fse.interop.bitsandbytes.rmsprop8bit`. With the
    `dynamic` codec it is stored so here as well.

    Formula, order of arguments and defaults are those of `optax.rmsprop`; moments are stored as in `adamw8bit`, and
    what comes after `*` is ours. `optax.rmsprop` of a centered variance below zero is NaN, here it is clipped.

    Rule: Hinton 2012, lecture 6; centered: Graves 2013, eq. 38 to 41 (arXiv:1308.0850).

    Args:
        learning_rate: a number or a schedule.
        decay: decay rate of the second moment (and of the first, if centered).
        eps: in the denominator.
        initial_scale: what the second moment begins with.
        eps_in_sqrt: whether eps is inside the square root, or outside as in PyTorch.
        centered: divide by the standard deviation, not by the root of the second moment.
        momentum: decay rate of a trace of the scaled updates; None for none.
        nesterov: Nesterov momentum, in that trace.
        bias_correction: correct the moments for their beginning.
        rules: which parameters are stored how, and hyper-parameters of their own: see `adamw8bit` and `Rule`, whose
            `b1` is the momentum and `b2` the decay.
        state_format: codec, rounding and blocks, see `StateFormat`.
        implementation: None takes what suits platform and shape: one kernel that reads and writes every array once
            ("pallas_tpu", "pallas_gpu") where it can, else "xla". A named one runs or raises.
        partition_specs: a tree of `PartitionSpec` (or `NamedSharding`) like the parameters: how they are cut over a
            mesh with Auto axes, which the kernel has to know on several TPU chips. Under a mesh with Explicit axes
            types say it.
        skip_nonfinite: elements whose gradient is NaN or infinite keep their parameter and moments.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adamw8bit`.

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
