r"""LARS: momentum of gradients at the length of their parameter; its trace in one byte each.

    d <- g + w p;   t <- -lr r d + b t,   r = c |p| / |d|

Rule: You et al. 2017, Alg. 1 (arXiv:1708.03888). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import Any, NamedTuple

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
from ..storage.state_format import StateFormat
from .sgd import engine as sgd_engine
from .sgd import sgd
from .trust_ratio import clipped, trust_ratio


@update_rule("step_size")
def lars(g, t, *, momentum, nesterov, step_size, ratio=None):
    """The rule, operation by operation as optax writes it: the learning rate is part of what the trace sums."""
    if ratio is not None:
        g = g * ratio
    if step_size is not None:
        g = step_size * g
    return sgd(g, t, momentum=momentum, nesterov=nesterov)


class _Ratio(NamedTuple):
    """The arguments of the trust ratio, and bitsandbytes' `max_unorm`, which takes its place."""

    coefficient: float
    eps: float
    mask: Any
    max_unorm: float | None


def _parts(
    sums: Sums, decay: Tail, ratio: _Ratio, momentum: float, options: Options, *, nesterov: bool
) -> tuple[Engine, Tail]:
    """Builds the engine and its tail: the paper's ratio before the trace, or bitsandbytes' clipping after it.

    `sums` says what the trace sums with the ratio. With clipping it sums gradients.
    """
    if momentum is None:
        raise TypeError("`momentum` must be a number, got None; optax's default is 0.9, and 0.0 keeps no momentum.")
    check_numbers(trust_coefficient=ratio.coefficient, eps=ratio.eps)
    if (rescale := clipped(ratio.max_unorm)) is not None:
        method = sgd_engine(momentum, None, options, nesterov=nesterov, name="lars", sums="gradients")
        return method, decay._replace(rescale=rescale)

    def gradient_hyper(g, p):
        return {"ratio": trust_ratio(g, p, ratio.coefficient, ratio.eps)}

    method = sgd_engine(momentum, None, options, nesterov=nesterov, rule=lars, name="lars", sums=sums)
    return method, decay._replace(gradient_hyper=gradient_hyper, gradient_mask=ratio.mask)


def scale_by_lars8bit(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = True,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    trust_ratio_mask: Any = True,
    momentum: float = 0.9,
    nesterov: bool = False,
    *,
    max_unorm: float | None = None,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""LARS' direction, all but the learning rate; see `lars8bit` for the arguments.

    $$t_t = b\, t_{t-1} + c \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert + \epsilon} d_t$$

    Rule, and what differs from bitsandbytes: `lars8bit`.
    There is no `optax.scale_by_lars`: its trust ratio is `optax.scale_by_trust_ratio`'s.

    Raises:
        TypeError, ValueError, NotImplementedError: as `lars8bit`.

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
    weight_decay_mask: Any = True,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    trust_ratio_mask: Any = True,
    momentum: float = 0.9,
    nesterov: bool = False,
    *,
    max_unorm: float | None = None,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.lars` with its trace in one byte each: 1.02 to 1.13 bytes of state a parameter.

    $$u_t = b\, u_{t-1} - \alpha_t c \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert + \epsilon} d_t, \quad d_t = g_t +
    \lambda \theta_t$$

    This is the trust ratio of the paper. bitsandbytes' 32-bit `LARS` has none: it clips the step along the trace,
    $\min(1, \mathrm{max\_unorm} \lVert \theta \rVert / \lVert t \rVert)$, which `max_unorm` asks for here, in place of
    the ratio; its 8-bit `LARS` on CPU does neither and is SGD. Norms are sums over a whole parameter: on another mesh
    they may differ in their last bits.

    Formula, order of arguments and defaults are those of `optax.lars`; moments are stored as in `adamw8bit`, and what
    comes after `*` is ours. `max_unorm` is bitsandbytes', and `momentum` must be a number.

    Rule: You et al. 2017, Alg. 1 (arXiv:1708.03888).

    Args:
        learning_rate: a number or a schedule; part of what the trace sums, as in optax (with `max_unorm`, it is not).
        weight_decay: a number or a schedule, added to the gradient.
        weight_decay_mask: a pytree of booleans, or a function of the updates that gives one: where weights decay.
        trust_coefficient: the length of a step, in lengths of the parameter.
        eps: added to the norm in the denominator.
        trust_ratio_mask: where the ratio applies, as `weight_decay_mask`.
        momentum: decay rate of the trace.
        nesterov: Nesterov momentum.
        max_unorm: bitsandbytes' clipping in place of the trust ratio: the longest step, in lengths of the parameter
            (0.02 there); 0 is no limit, and None the trust ratio. A parameter of length 0 is not clipped.
        rules: which parameters are stored how, and hyper-parameters of their own: see `adamw8bit` and `Rule`, whose
            `b1` is the momentum.
        state_format: codec, rounding and blocks, see `StateFormat`.
        implementation: None takes what suits platform and shape: one kernel that reads and writes every array once
            ("pallas_tpu", "pallas_gpu") where it can, else "xla". A named one runs or raises.
        partition_specs: a tree of `PartitionSpec` (or `NamedSharding`) like the parameters: how they are cut over a
            mesh with Auto axes, which the kernel has to know on several TPU chips. Under a mesh with Explicit axes
            types say it.
        skip_nonfinite: elements whose gradient is NaN or infinite keep their parameter and trace.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adamw8bit`.

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
