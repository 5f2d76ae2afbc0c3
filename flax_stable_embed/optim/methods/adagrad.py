r"""Adagrad with its sum of squares in one byte each.

    s <- s + g^2;   u <- g / sqrt(s + eps)

Rule: Duchi et al. 2011, fig. 1 (jmlr.org/papers/v12/duchi11a). Storage: Dettmers et al. 2022, sec. 2
(arXiv:2110.02861).
"""

from typing import Any, NamedTuple

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
from ..storage.moments import MomentName
from ..storage.state_format import StateFormat
from .arithmetic import inverse_root


class ScaleByAdagrad8bitState(NamedTuple):
    """State of Adagrad. `sum_of_squares`: codes, or fp32 values, in the parameter's shape."""

    count: Array  # shape=(), dtype=int32
    sum_of_squares: optax.Updates
    sum_of_squares_absmax: optax.Updates  # float32, the parameter's shape with blocks for elements on one axis
    format: Array  # uint8, names the codecs and block settings


@update_rule("square", "rounded")
def adagrad(g, s, *, eps, eps_in_sqrt, square, rounded):
    """The rule, operation by operation as optax writes it, or with eps outside of the square root."""
    # Two products and a sum: which of them XLA on CPU contracts, and so the last bit, depends on how an array is cut.
    # A maximum between them, which changes nothing, keeps it from contracting either.
    s = jnp.maximum(square(g), 0.0) + jnp.maximum(s, 0.0) if rounded else square(g) + s
    if not eps_in_sqrt:
        return g / (jnp.sqrt(s) + eps), (s,)
    return jnp.where(s > 0, inverse_root(s + eps, rounded), 0.0) * g, (s,)


def engine(initial_accumulator_value, eps, options: Options, *, eps_in_sqrt) -> Engine:
    """Adagrad's engine; the options are `Engine`'s."""
    check_numbers(initial_accumulator_value=initial_accumulator_value, eps=eps)

    def hyper(before, after, *, eps):
        del before, after
        return {"eps": eps, "eps_in_sqrt": eps_in_sqrt}

    moment = MomentName(
        "sum_of_squares", signed=False, dynamic_signed=True, second=True, initial=initial_accumulator_value
    )
    method = Method("adagrad", ScaleByAdagrad8bitState, adagrad, (moment,), hyper, {"eps": eps}, counts_steps=False)
    return Engine(method, options)


def scale_by_adagrad8bit(
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    *,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.scale_by_rss` with one byte each; see `adagrad8bit` for the arguments.

    $$u_t = \frac{g_t}{\sqrt{s_t + \epsilon}}$$

    Rule, and what differs from bitsandbytes: `adagrad8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adagrad8bit`.

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
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.adagrad` with its sum of squares in one byte each: 1.02 to 1.13 bytes of state a parameter.

    $$s_t = s_{t-1} + g_t^2, \quad u_t = -\alpha_t \frac{g_t}{\sqrt{s_t + \epsilon}}$$

    A sum only grows, and late steps add less to it than a code can show: what an element adds is rounded away while its
    block's scale grows with others'. `StateFormat(rounding="stochastic")` keeps the sums right in the mean.
    bitsandbytes' `Adagrad8bit` begins from 0, puts eps outside the square root, adds weight decay to the gradient and
    stores the sum with a signed code: `fse.interop.bitsandbytes.adagrad8bit`.

    Formula, order of arguments and defaults are those of `optax.adagrad`; moments are stored as in `adamw8bit`, and
    what comes after `*` is ours. Nothing else differs.

    Rule: Duchi et al. 2011, fig. 1 (jmlr.org/papers/v12/duchi11a).

    Args:
        learning_rate: a number or a schedule.
        initial_accumulator_value: what the sum begins with.
        eps: inside the square root.
        rules: which parameters are stored how, and hyper-parameters of their own: see `adamw8bit` and `Rule`.
        state_format: codec, rounding and blocks, see `StateFormat`.
        implementation: None takes what suits platform and shape: one kernel that reads and writes every array once
            ("pallas_tpu", "pallas_gpu") where it can, else "xla". A named one runs or raises.
        partition_specs: a tree of `PartitionSpec` (or `NamedSharding`) like the parameters: how they are cut over a
            mesh with Auto axes, which the kernel has to know on several TPU chips. Under a mesh with Explicit axes
            types say it.
        skip_nonfinite: elements whose gradient is NaN or infinite keep their parameter and sum.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.adagrad8bit(0.1)
    >>> state = tx.init({"kernel": jnp.ones((64, 512))})[0]
    >>> state.sum_of_squares["kernel"].dtype, float(state.sum_of_squares_absmax["kernel"].min())
    (dtype('uint8'), 0.1...)
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return optimizer(engine(initial_accumulator_value, eps, options, eps_in_sqrt=True), learning_rate)
