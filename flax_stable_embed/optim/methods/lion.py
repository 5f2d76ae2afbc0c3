r"""Lion with its moment in one byte each.

    u <- sign(b1 m + (1 - b1) g);   m <- b2 m + (1 - b2) g

Rule: Chen et al. 2023, Alg. 2 (arXiv:2302.06675). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import Any, NamedTuple

import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...ops.blockwise_step.step import update_rule
from ..arguments import check_numbers, refuse_dtype
from ..engine.engine import Engine
from ..engine.method import Method
from ..engine.options import Options
from ..engine.tail import Tail
from ..engine.transform import decay_member, method_member, optimizer, rate_member, scale_by
from ..fused_update import FusedTransformation
from ..storage.moments import MomentName
from ..storage.state_format import StateFormat
from .arithmetic import sign


class ScaleByLion8bitState(NamedTuple):
    """State of Lion. `mu`: int8 or uint8 codes, or fp32 values, in the parameter's shape."""

    count: Array  # shape=(), dtype=int32
    mu: optax.Updates
    mu_absmax: optax.Updates  # float32, the parameter's shape with blocks for elements on one axis; ones without codes
    format: Array  # uint8, names the codecs and block settings


@update_rule()
def lion(g, m, *, b1, b2):
    """The rule, operation by operation as optax writes it."""
    return sign((1.0 - b1) * g + b1 * m), ((1 - b2) * g + b2 * m,)


def engine(b1, b2, mu_dtype, options: Options) -> Engine:
    """Lion's engine; the options are `Engine`'s."""
    refuse_dtype("mu_dtype", mu_dtype)
    check_numbers(b1=b1, b2=b2)

    def hyper(before, after, *, b1, b2):
        del before, after
        return {"b1": b1, "b2": b2}

    mu = MomentName("mu", signed=True, dynamic_signed=True)
    return Engine(Method("lion", ScaleByLion8bitState, lion, (mu,), hyper, {"b1": b1, "b2": b2}), options)


def scale_by_lion8bit(
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: None = None,
    *,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.scale_by_lion` with its moment in one byte each; see `lion8bit` for the arguments.

    $$u_t = \mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t)$$

    Rule, and what differs from bitsandbytes: `lion8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `lion8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(fse.scale_by_lion8bit(), optax.scale_by_learning_rate(1e-4))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return scale_by(engine(b1, b2, mu_dtype, options))


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.lion` with its moment in one byte each: 1.02 to 1.13 bytes of state a parameter.

    $$u_t = -\alpha_t \left( \mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t) + \lambda \theta_t \right), \quad
    m_t = b_2 m_{t-1} + (1 - b_2) g_t$$

    From bitsandbytes' `Lion8bit` it differs in its defaults (learning rate 1e-4 and no decay there) and in that a
    coordinate without a gradient never moves: zero is a code here, while the table of bitsandbytes' CPU quantizer has
    none, and the sign of what it stores instead moves such a coordinate by the learning rate on every step.

    Formula, order of arguments and defaults are those of `optax.lion`; moments are stored as in `adamw8bit`, and what
    comes after `*` is ours. `mu_dtype` must be None, and of `optax.scale_by_lion`'s modes there is the hard one.

    Rule: Chen et al. 2023, Alg. 2 (arXiv:2302.06675).

    Args:
        learning_rate: a number or a schedule.
        b1: weight of the moment in the direction.
        b2: decay rate of the moment.
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
        skip_nonfinite: elements whose gradient is NaN or infinite keep their parameter and moment.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.lion8bit(1e-4, weight_decay=0.1)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> state[0].mu["kernel"].dtype
    dtype('int8')
    """
    method = engine(b1, b2, mu_dtype, Options(rules, state_format, implementation, partition_specs, skip_nonfinite))
    tail = Tail(weight_decay=weight_decay, mask=mask)
    members = [method_member(method), decay_member(tail), rate_member(learning_rate)]
    return optimizer(method, learning_rate, tail=tail, members=members)
