r"""SGD with momentum, its trace in one byte each.

    t <- g + b t;   u <- t, or with Nesterov momentum g + b t

Rule: Sutskever et al. 2013, sec. 2 (proceedings.mlr.press/v28/sutskever13). Storage: Dettmers et al. 2022, sec. 2
(arXiv:2110.02861).
"""

from typing import Any, NamedTuple

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
from ..storage.moments import MomentName, Sums
from ..storage.state_format import StateFormat


class ScaleBySgd8bitState(NamedTuple):
    """State of SGD. `trace`: int8 or uint8 codes, or fp32 values, in the parameter's shape; None without momentum."""

    count: Array  # shape=(), dtype=int32
    format: Array  # uint8, names the codecs and block settings
    trace: optax.Updates | None = None
    trace_absmax: optax.Updates | None = None  # float32, the parameter's shape with blocks for elements on one axis


@update_rule()
def sgd(g, t, *, momentum, nesterov):
    """The rule, operation by operation as optax writes it."""
    t = g + momentum * t
    return g + momentum * t if nesterov else t, (t,)


@update_rule()
def plain_sgd(g):
    """The rule without momentum."""
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
    """The engine of a trace, also for `lars8bit`, whose rule feeds it otherwise; the options are `Engine`'s."""
    refuse_dtype("accumulator_dtype", accumulator_dtype)
    if momentum is None:
        method = Method(name, ScaleBySgd8bitState, plain_sgd, (), lambda before, after: {}, counts_steps=False)
        return Engine(method, options)
    check_numbers(momentum=momentum)

    def hyper(before, after, *, b1):
        del before, after
        return {"momentum": b1, "nesterov": nesterov}

    trace = MomentName("trace", signed=True, dynamic_signed=True, sums=sums)
    method = Method(name, ScaleBySgd8bitState, rule, (trace,), hyper, {"b1": momentum}, counts_steps=False)
    return Engine(method, options)


def scale_by_sgd8bit(
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: None = None,
    *,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.trace` with one byte each; see `sgd8bit` for the arguments.

    $$t_t = g_t + b\, t_{t-1} \ \text{ or, Nesterov, } g_t + b\, t_t$$

    Rule, and what differs from bitsandbytes: `sgd8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `sgd8bit`.

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
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.sgd` with its momentum in one byte each: 1.02 to 1.13 bytes of state a parameter.

    $$t_t = g_t + b\, t_{t-1}, \quad u_t = -\alpha_t t_t \ \text{ or, Nesterov, } -\alpha_t (g_t + b\, t_t)$$

    bitsandbytes' `SGD8bit` has no Nesterov momentum (it takes the argument and ignores it) and adds weight decay to the
    gradient; that formula is `fse.interop.bitsandbytes.sgd8bit`, or `optax.chain(optax.add_decayed_weights(...),
    sgd8bit(...))`.

    Formula, order of arguments and defaults are those of `optax.sgd`; moments are stored as in `adamw8bit`, and what
    comes after `*` is ours. `accumulator_dtype` must be None.

    Rule: Sutskever et al. 2013, sec. 2 (proceedings.mlr.press/v28/sutskever13).

    Args:
        learning_rate: a number or a schedule.
        momentum: decay rate of the trace; None, as in optax, keeps no state at all.
        nesterov: Nesterov momentum.
        accumulator_dtype: only there for the order of arguments; must be None.
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
    >>> tx = fse.sgd8bit(0.1, momentum=0.9, nesterov=True)
    >>> tx.init(params)[0].trace["kernel"].dtype
    dtype('int8')
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    method = engine(momentum, accumulator_dtype, options, nesterov=nesterov, sums="gradients")
    return optimizer(method, learning_rate)
