r"""Adam and AdamW with 8-bit moments.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    u <- (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps)
    p <- p - learning_rate (u + weight_decay p)

g is the gradient, p the parameter and t the number of the step. Rule: Kingma and Ba 2014, Alg. 1
(arXiv:1412.6980). Decoupled weight decay: Loshchilov and Hutter 2017 (arXiv:1711.05101). Nesterov momentum: Dozat
2016. Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
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
from ..storage.moments import MomentSpec
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Mask, Specs
from .arithmetic import correction, over


class ScaleByAdam8bitState(NamedTuple):
    """State of Adam. `mu` and `nu` hold codes (int8, uint8) or floating-point moments in the parameter's shape."""

    count: Array  # int32, the number of steps
    mu: optax.Updates
    nu: optax.Updates
    mu_absmax: optax.Updates  # float32 scales: blocks instead of elements along one axis
    nu_absmax: optax.Updates
    format: Array  # uint8, says how the state is stored


@update_rule("square", "rounded")
def adam(g, m, v, *, b1, b2, eps, eps_root, c1, c2, c1_next, nesterov, square, rounded):
    """Applies the rule, with the same operations in the same order as in optax. `c1` is 1 - b1^t, `c2` is 1 - b2^t."""
    m = (1 - b1) * g + b1 * m
    v = (1 - b2) * square(g) + b2 * v
    if nesterov:
        m_hat = b1 * over(m, c1_next, rounded) + (1 - b1) * over(g, c1, rounded)
    else:
        m_hat = over(m, c1, rounded)
    return m_hat / (jnp.sqrt(over(v, c2, rounded) + eps_root) + eps), (m, v)


def engine(
    b1, b2, eps, eps_root, mu_dtype, options: Options, *, nesterov=False, correction: Any = correction, name="adam"
) -> Engine:
    """Builds Adam's engine; `adamw8bit`, `lamb8bit` and the bitsandbytes variants share it."""
    refuse_dtype("mu_dtype", mu_dtype)
    check_numbers(b1=b1, b2=b2, eps=eps, eps_root=eps_root)

    def hyper(before, after, *, b1, b2, eps):
        del before
        c1_next = correction(b1, jnp.asarray(optax.safe_increment(after)))
        corrections = {"c1": correction(b1, after), "c2": correction(b2, after), "c1_next": c1_next}
        return {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "nesterov": nesterov, **corrections}

    moments = (
        MomentSpec("mu", signed=True, dynamic_signed=True, decay="b1"),
        MomentSpec("nu", signed=False, dynamic_signed=False, second=True, decay="b2"),
    )
    overridable = {"b1": b1, "b2": b2, "eps": eps}
    return Engine(Method(name, ScaleByAdam8bitState, adam, moments, hyper, overridable), options)


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: None = None,
    *,
    nesterov: bool = False,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes `optax.scale_by_adam` with 8-bit moments. `adamw8bit` describes the arguments.

    $$u_t = \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}$$

    Rule and differences from bitsandbytes: see `adamw8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adamw8bit`.

    >>> import optax, flax_stable_embed as fse
    >>> tx = optax.chain(optax.clip(1.0), fse.scale_by_adam8bit(), optax.scale_by_learning_rate(1e-3))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return scale_by(engine(b1, b2, eps, eps_root, mu_dtype, options, nesterov=nesterov))


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: None = None,
    *,
    nesterov: bool = False,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.adam` with 8-bit moments. `adamw8bit`, which adds weight decay, describes the arguments.

    $$u_t = -\alpha_t \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}$$

    bitsandbytes' `Adam8bit` has the same formula, and optionally decoupled weight decay:
    `fse.interop.bitsandbytes.adam8bit`. Rule: Kingma and Ba 2014, Alg. 1 (arXiv:1412.6980).

    Raises:
        TypeError, ValueError, NotImplementedError: As for `adamw8bit`.

    >>> import flax_stable_embed as fse
    >>> tx = fse.adam8bit(1e-3)
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    return optimizer(engine(b1, b2, eps, eps_root, mu_dtype, options, nesterov=nesterov), learning_rate)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Makes `optax.adamw` with 8-bit moments. Embeddings, norms and biases keep fp32 moments.

    $$u_t = -\alpha_t \left( \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}
    + \lambda \theta_t \right)$$

    The formula is the one of `optax.adamw`, and so are the arguments up to `nesterov`, with their order and defaults.
    All further arguments are keyword-only. Moments are decoded, updated and encoded block by block. The update is
    computed from the new moments before they are rounded, in float32 whatever the dtype of the parameter. Parameters
    with fp32 moments get exactly the updates of `optax.adamw`.

    bitsandbytes' `AdamW8bit` has the same formula. Its weight decay is 1e-2 by default, and on CPU it comes before the
    step. It stores codes of the `dynamic` map in blocks of 256, and it has no Nesterov momentum:
    `fse.interop.bitsandbytes.adamw8bit`.

    Rule: Kingma and Ba 2014, Alg. 1 (arXiv:1412.6980), Loshchilov and Hutter 2017 (arXiv:1711.05101).

    Args:
        learning_rate: The step size, a number or a schedule (a function that takes the step count and returns one).
        b1: Exponential decay rate of the first moment, the average of past gradients.
        b2: Exponential decay rate of the second moment, the average of past squared gradients.
        eps: Small constant added to the denominator, outside the square root, to avoid dividing by zero.
        eps_root: Small constant added inside the square root. You need it, for example, to differentiate through Adam.
        mu_dtype: Must be None. It is only here so that positional arguments match `optax.adamw`.
        weight_decay: Strength of the weight decay, a number or a schedule. It is multiplied by the learning rate.
        mask: Pytree of booleans with the structure of the parameters (or a prefix of it), or a function that takes the
            updates and returns one. Weight decay applies where it is True. None means everywhere.
        nesterov: Whether to use Nesterov momentum.
        rules: How each parameter is stored: a tuple of pairs `(pattern, setting)`, or a pytree of settings with the
            structure of the parameters. The first pair that matches wins. A pattern is a regular expression, which is
            searched in the path of the parameter, "block/attn/kernel", or `fse.where(predicate)`. A setting is 8, 32,
            "bf16", "rowwise" or a `Rule`, which can also change hyper-parameters. If no rule sets the bits, the NNX
            metadata `optim_bits` decides, then the default rules: embeddings, norm scales and biases keep fp32 moments,
            everything else gets 8-bit moments.
        state_format: The codec, rounding and blocks of 8-bit moments. See `StateFormat`.
        implementation: The code that runs the step of 8-bit moments: "xla", "pallas_tpu" or "pallas_gpu". None selects
            it by platform and shape: a fused kernel, which reads and writes every array once, if there is one, else
            "xla". A named implementation is used or raises.
        partition_specs: Pytree with the structure of the parameters that holds the `PartitionSpec` or `NamedSharding`
            of each. For parameters that are arrays on a mesh it is `jax.tree.map(lambda x: x.sharding, params)`. It is
            needed only where the kernels cannot see how arrays are sharded: on a mesh with Auto axes, in a function of
            its own inside of a jitted program, if `init` did not see the sharded parameters either.
        skip_nonfinite: Whether elements whose gradient is NaN or infinite keep their parameter (bit for bit) and their
            moments. 8-bit moments are rounded again if the scale of their block changes. By default these elements
            become NaN, as in optax. No other element is affected in either case.

    Returns:
        An optax transform that also works with `fse.fused_update`. Its state is the state of `optax.adamw` with
        `ScaleByAdam8bitState` in place of `ScaleByAdamState`.

    Raises:
        TypeError: `mu_dtype` is not None, a hyper-parameter is not a number, or `state_format` is not a `StateFormat`.
            In `update`: the state is not one that `init` makes.
        ValueError: A rule or a format is invalid. In `init`: a rule matches no parameter. In `update`: the state
            belongs to other parameters, rules or formats, or `partition_specs` needs a mesh and none is set. In both: a
            named implementation cannot run a parameter, or `partition_specs` has no entry for it or does not fit it.
        NotImplementedError: In `update`: the named implementation cannot run on the platform or the mesh.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"embedding": jnp.ones((512, 64)), "kernel": jnp.ones((64, 512))}
    >>> tx = fse.adamw8bit(1e-3, weight_decay=0.1)
    >>> state = tx.init(params)
    >>> {name: str(x.dtype) for name, x in state[0].mu.items()}
    {'embedding': 'float32', 'kernel': 'int8'}
    >>> updates, state = tx.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    method = engine(b1, b2, eps, eps_root, mu_dtype, options, nesterov=nesterov)
    tail = Tail(weight_decay=weight_decay, mask=mask)
    members = [method_member(method), decay_member(tail), rate_member(learning_rate)]
    return optimizer(method, learning_rate, tail=tail, members=members)
