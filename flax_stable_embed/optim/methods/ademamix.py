r"""AdEMAMix with its three moments in one byte each.

    m1 <- b1 m1 + (1 - b1) g;   m2 <- b3 m2 + (1 - b3) g;   v <- b2 v + (1 - b2) g^2
    u <- (m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t) + eps_root) + eps)

Rule: Pagliardini et al. 2024, Alg. 1 (arXiv:2409.03137). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
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
from ..storage.moments import MomentName
from ..storage.state_format import StateFormat
from .arithmetic import correction, over


class ScaleByAdemamix8bitState(NamedTuple):
    """State of AdEMAMix. `m1` (fast), `m2` (slow) and `nu`: codes, or fp32 values, in the parameter's shape."""

    count: Array  # shape=(), dtype=int32
    count_m2: Array  # the same, as optax has it
    m1: optax.Updates
    m2: optax.Updates
    nu: optax.Updates
    m1_absmax: optax.Updates  # float32, the parameter's shape with blocks for elements on one axis; ones without codes
    m2_absmax: optax.Updates
    nu_absmax: optax.Updates
    format: Array  # uint8, names the codecs and block settings


@update_rule("square", "rounded")
def ademamix(g, m1, m2, v, *, b1, b2, b3, b3_rest, alpha, eps, eps_root, c1, c2, square, rounded):
    """The rule, operation by operation as optax writes it; `c` are the bias corrections 1 - b^t, `b3_rest` 1 - b3."""
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
    """AdEMAMix's engine; `growing_b3(count, b1)` gives b3 and 1 - b3 in its place; the options are `Engine`'s."""
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
        MomentName("m1", signed=True, dynamic_signed=True),
        MomentName("m2", signed=True, dynamic_signed=True, slow=True),
        MomentName("nu", signed=False, dynamic_signed=False, second=True),
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
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.contrib.scale_by_ademamix` in one byte each; see `ademamix8bit` for the arguments.

    $$u_t = \frac{m^{(1)}_t / (1 - b_1^t) + a_t m^{(2)}_t}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}$$

    Rule, and what differs from bitsandbytes: `ademamix8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `ademamix8bit`.

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
    mask: Any = None,
    *,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.contrib.ademamix` with its moments in one byte each: 3.05 to 3.38 bytes a parameter in place of 12.

    $$u_t = -\alpha_t \left( \frac{m^{(1)}_t / (1 - b_1^t) + a_t m^{(2)}_t}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} +
    \epsilon} + \lambda \theta_t \right)$$

    The slow mean is not corrected for its beginning. bitsandbytes' `AdEMAMix8bit` has a weight decay of 0.01 by default
    and schedules of its own: `fse.interop.bitsandbytes.ademamix8bit(t_alpha=..., t_beta3=...)`.

    A step changes the slow mean by 1 - b3 of a gradient, which is less than from one code to the next unless gradients
    are noisy; `StateFormat(rounding="stochastic")` rounds it so that it still follows where they are smooth.

    Formula, order of arguments and defaults are those of `optax.contrib.ademamix`; moments are stored as in
    `adamw8bit`, and what comes after `*` is ours. `mu_dtype` must be None.

    Rule: Pagliardini et al. 2024, Alg. 1 (arXiv:2409.03137).

    Args:
        learning_rate: a number or a schedule.
        b1: decay rate of the fast mean.
        b2: decay rate of the second moment.
        b3: decay rate of the slow mean, a number or a schedule.
        alpha: weight of the slow mean, a number or a schedule.
        eps: added outside the square root.
        eps_root: added inside the square root.
        mu_dtype: only there for the order of arguments; must be None.
        weight_decay: a number or a schedule; decoupled, multiplied by the learning rate.
        mask: a pytree of booleans, or a function of the updates that gives one: where weights decay.
        rules: which parameters are stored how, and hyper-parameters of their own: see `adamw8bit` and `Rule`.
        state_format: codec, rounding and blocks, see `StateFormat`.
        implementation: None takes what suits platform and shape: one kernel that reads and writes every array once
            ("pallas_tpu", "pallas_gpu") where it can, else "xla". A named one runs or raises.
        partition_specs: a tree of `PartitionSpec` (or `NamedSharding`) like the parameters: how they are cut over a
            mesh with Auto axes, which the kernel has to know on several TPU chips. Under a mesh with Explicit axes
            types say it.
        skip_nonfinite: elements whose gradient is NaN or infinite keep their parameter and moments.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adamw8bit`.

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
