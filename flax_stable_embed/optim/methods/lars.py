r"""LARS with an 8-bit trace: momentum of gradients that are rescaled to the norm of their parameter.

    d <- g + weight_decay p;   t <- b t - learning_rate r d,   r = c |p| / |d|
    p <- p + t

g is the gradient, p the parameter, t the trace, b the momentum and c the trust coefficient. Rule: You et al. 2017,
Alg. 1 (arXiv:1708.03888). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import NamedTuple

import optax

from ...ops.blockwise_step.api import Implementation
from ...ops.blockwise_step.step import update_rule
from ..arguments import check_numbers
from ..engine.engine import Engine
from ..engine.options import Options
from ..engine.tail import Tail
from ..engine.transform import (
    MASKED_STATELESS,
    decay_member,
    method_member,
    optimizer,
    rate_member,
    scale_by,
)
from ..fused_update import FusedTransformation
from ..storage.moments import Sums
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Mask, Specs
from .sgd import engine as sgd_engine
from .sgd import sgd
from .trust_ratio import clipped, trust_ratio


@update_rule("step_size")
def lars(g, t, *, momentum, nesterov, step_size, ratio=None):
    """Applies the rule, with the same operations as in optax: the trace sums steps, which include the learning rate."""
    if ratio is not None:
        g = g * ratio
    if step_size is not None:
        g = step_size * g
    return sgd(g, t, momentum=momentum, nesterov=nesterov)


class _Ratio(NamedTuple):
    """The arguments of the trust ratio, and `max_unorm`, which replaces it."""

    coefficient: float
    eps: float
    mask: Mask
    max_unorm: float | None


def _parts(
    sums: Sums, decay: Tail, ratio: _Ratio, momentum: float, options: Options, *, nesterov: bool
) -> tuple[Engine, Tail]:
    """Builds the engine and its tail: the trust ratio before the trace, or the clipping of bitsandbytes after it.

    `sums` names the terms that the trace sums if there is a trust ratio. With clipping it always sums gradients.
    """
    if momentum is None:
        raise TypeError("`momentum` must be a number, got None. The default is 0.9, and 0.0 means no momentum.")
    check_numbers(trust_coefficient=ratio.coefficient, eps=ratio.eps)
    if (rescale := clipped(ratio.max_unorm)) is not None:
        method = sgd_engine(momentum, None, options, nesterov=nesterov, name="lars", sums="gradients")
        return method, decay._replace(rescale=rescale)

    def gradient_ratio(g, p):
        return trust_ratio(g, p, ratio.coefficient, ratio.eps)

    method = sgd_engine(momentum, None, options, nesterov=nesterov, rule=lars, name="lars", sums=sums)
    return method, decay._replace(gradient_ratio=gradient_ratio, gradient_mask=ratio.mask)


def scale_by_lars8bit(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = True,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    trust_ratio_mask: Mask = True,
    momentum: float = 0.9,
    nesterov: bool = False,
    *,
    max_unorm: float | None = None,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes LARS without its learning rate. `lars8bit` describes the arguments.

    $$t_t = b\, t_{t-1} + c \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert + \epsilon} d_t$$

    Rule and differences from bitsandbytes: see `lars8bit`.
    optax has no `scale_by_lars`. The trust ratio is the one of `optax.scale_by_trust_ratio`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `lars8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_lars8bit(weight_decay=1e-4), optax.scale_by_learning_rate(0.1))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    decay = Tail(weight_decay=weight_decay, mask=weight_decay_mask, coupled=True)
    ratio = _Ratio(trust_coefficient, eps, trust_ratio_mask, max_unorm)
    return scale_by(*_parts("directions", decay, ratio, momentum, options, nesterov=nesterov))


def lars8bit(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = True,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    trust_ratio_mask: Mask = True,
    momentum: float = 0.9,
    nesterov: bool = False,
    *,
    max_unorm: float | None = None,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.lars` with an 8-bit trace: 1.02 to 1.13 bytes of state per parameter.

    $$u_t = b\, u_{t-1} - \alpha_t c \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert + \epsilon} d_t, \quad d_t = g_t +
    \lambda \theta_t$$

    The formula, the positional arguments and their defaults are the same as in `optax.lars`. `momentum` must be a
    number. The trace is stored as the moments of `adamw8bit`.

    Norms are sums over the full parameter. On another mesh their last bits may differ.

    bitsandbytes' 32-bit `LARS` has no trust ratio. Instead it multiplies the trace by $\min(1, \mathrm{max\_unorm}
    \lVert \theta \rVert / \lVert t \rVert)$. Set `max_unorm` for that formula. Its 8-bit `LARS` on CPU does neither and
    equals SGD.

    Rule: You et al. 2017, Alg. 1 (arXiv:1708.03888).

    Args:
        learning_rate: The step size, a number or a schedule. The trace sums steps that include it, as in optax. (With
            `max_unorm` the trace sums gradients.)
        weight_decay: Strength of the weight decay, a number or a schedule. It is added to the gradient.
        weight_decay_mask: Pytree of booleans that says where weights decay, or a function that returns one. See `mask`
            of `adamw8bit`.
        trust_coefficient: The norm of a step with a learning rate of 1, relative to the norm of the parameter.
        eps: Small constant added to the norm in the denominator, to avoid dividing by zero.
        trust_ratio_mask: Pytree of booleans that says where the trust ratio applies, or a function that returns one.
        momentum: Decay rate of the trace, the sum of past steps.
        nesterov: Whether to use Nesterov momentum.
        max_unorm: If given, it replaces the trust ratio by the clipping of bitsandbytes: the update, before it is
            multiplied by the learning rate, is clipped to `max_unorm` times the norm of the parameter. bitsandbytes'
            default is 0.02, and 0 means no limit. The update of a parameter with norm 0 is not clipped.
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
    >>> tx = fse.lars8bit(1.0, trust_coefficient=0.25)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4)  # moved by a quarter of its length
    0.75
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    decay = Tail(weight_decay=weight_decay, mask=weight_decay_mask, coupled=True)
    ratio = _Ratio(trust_coefficient, eps, trust_ratio_mask, max_unorm)
    method, tail = _parts("steps", decay, ratio, momentum, options, nesterov=nesterov)
    placeholder = ("trust_ratio", MASKED_STATELESS)
    members = [decay_member(decay), placeholder, rate_member(learning_rate), method_member(method)]
    return optimizer(method, learning_rate, tail=tail, members=members)
