r"""LAMB with 8-bit moments: Adam's direction, rescaled to the norm of the parameter.

    d <- adam(g) + weight_decay p;   u <- |p| / |d| d
    p <- p - learning_rate u

g is the gradient and p the parameter. Rule: You et al. 2019, Alg. 2 (arXiv:1904.00962). Storage: Dettmers et al. 2022,
sec. 2 (arXiv:2110.02861).
"""

import optax

from ...ops.blockwise_step.api import Implementation
from ..engine.options import Options
from ..engine.tail import Tail
from ..engine.transform import STATELESS, decay_member, method_member, optimizer, rate_member, scale_by
from ..fused_update import FusedTransformation
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Mask, Specs
from .adam import engine
from .trust_ratio import clipped, trust_ratio


def rescale(u, p):
    """Multiplies a direction by its trust ratio."""
    return u * trust_ratio(u, p)


def _tail(weight_decay, mask, max_unorm) -> Tail:
    """Builds the tail: weight decay, then the trust ratio or the clipping of bitsandbytes."""
    return Tail(weight_decay=weight_decay, mask=mask, rescale=clipped(max_unorm) or rescale)


def scale_by_lamb8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    eps_root: float = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    max_unorm: float | None = None,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes LAMB without its learning rate. `lamb8bit` describes the arguments.

    $$u_t = \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert} d_t$$

    Rule and differences from bitsandbytes: see `lamb8bit`.
    optax has no `scale_by_lamb`. The trust ratio is the one of `optax.scale_by_trust_ratio`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `lamb8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_lamb8bit(weight_decay=0.01), optax.scale_by_learning_rate(1e-3))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    tail = _tail(weight_decay, mask, max_unorm)
    return scale_by(engine(b1, b2, eps, eps_root, None, options, name="lamb"), tail)


def lamb8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    eps_root: float = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    max_unorm: float | None = None,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.lamb` with 8-bit moments.

    $$u_t = -\alpha_t \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert} d_t, \quad d_t = \mathrm{adam}(g_t) + \lambda
    \theta_t$$

    The formula, the positional arguments and their defaults are the same as in `optax.lamb`. Moments are stored as in
    `adamw8bit`.

    Norms are sums over the full parameter. On another mesh the last bits of a norm may differ, and so may the updates.
    The moments of a step do not depend on norms.

    bitsandbytes' 32-bit `LAMB` has no trust ratio. Instead it multiplies the direction by $\min(1, \mathrm{max\_unorm}
    \lVert \theta \rVert / \lVert u \rVert)$. Set `max_unorm` for that formula. Its 8-bit `LAMB` on CPU does neither and
    equals Adam.

    Rule: You et al. 2019, Alg. 2 (arXiv:1904.00962).

    Args:
        learning_rate: The step size, a number or a schedule.
        b1: Exponential decay rate of the first moment.
        b2: Exponential decay rate of the second moment.
        eps: Small constant added to the denominator, outside the square root, to avoid dividing by zero.
        eps_root: Small constant added inside the square root.
        weight_decay: Strength of the weight decay, a number or a schedule. The direction that is rescaled includes it.
        mask: Pytree of booleans that says where weights decay, or a function that returns one. See `adamw8bit`.
        max_unorm: If given, it replaces the trust ratio by the clipping of bitsandbytes: the direction is clipped to
            `max_unorm` times the norm of the parameter. bitsandbytes' default is 1.0, and 0 means no limit. The
            direction of a parameter with norm 0 is not clipped.
        rules: How each parameter is stored, and hyper-parameters of its own. See `adamw8bit` and `Rule`.
        state_format: Codec, rounding and blocks of 8-bit moments. See `StateFormat`.
        implementation: The code that runs the step, None to select it automatically. See `adamw8bit`.
        partition_specs: The sharding of each parameter, if array types do not contain it. See `adamw8bit`.
        skip_nonfinite: Whether elements with a non-finite gradient keep their parameter and moments. See `adamw8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.lamb8bit(0.5)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4)  # moved by half of its length
    0.5
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    method = engine(b1, b2, eps, eps_root, None, options, name="lamb")
    tail = _tail(weight_decay, mask, max_unorm)
    members = [method_member(method), decay_member(tail), ("trust_ratio", STATELESS), rate_member(learning_rate)]
    return optimizer(method, learning_rate, tail=tail, members=members)
