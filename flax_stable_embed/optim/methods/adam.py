r"""Adam and AdamW with their moments in one byte each.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    u <- (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps)

Rule: Kingma and Ba 2014, Alg. 1 (arXiv:1412.6980); decoupled weight decay: Loshchilov and Hutter 2017
(arXiv:1711.05101); Nesterov momentum: Dozat 2016. Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
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
from ..storage.moments import MomentName
from ..storage.state_format import StateFormat
from .arithmetic import correction, over


class ScaleByAdam8bitState(NamedTuple):
    """State of Adam. `mu` and `nu`: int8 or uint8 codes, or fp32 values, in the parameter's shape."""

    count: Array  # shape=(), dtype=int32
    mu: optax.Updates
    nu: optax.Updates
    mu_absmax: optax.Updates  # float32, the parameter's shape with blocks for elements on one axis; ones without codes
    nu_absmax: optax.Updates
    format: Array  # uint8, names the codecs and block settings


@update_rule("square", "rounded")
def adam(g, m, v, *, b1, b2, eps, eps_root, c1, c2, c1_next, nesterov, square, rounded):
    """The rule, operation by operation as optax writes it; `c` are the bias corrections 1 - b^t."""
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
        MomentName("mu", signed=True, dynamic_signed=True),
        MomentName("nu", signed=False, dynamic_signed=False, second=True),
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
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.scale_by_adam` with its moments in one byte each; see `adamw8bit` for the arguments.

    $$u_t = \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}$$

    Rule, and what differs from bitsandbytes: `adamw8bit`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adamw8bit`.

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
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.adam` with its moments in one byte each; see `adamw8bit`, which adds weight decay, for the arguments.

    $$u_t = -\alpha_t \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}$$

    bitsandbytes' `Adam8bit` has the same formula and decays weights (decoupled) if it is asked to:
    `fse.interop.bitsandbytes.adam8bit`. Rule: Kingma and Ba 2014, Alg. 1 (arXiv:1412.6980).

    Raises:
        TypeError, ValueError, NotImplementedError: as `adamw8bit`.

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
    mask: Any = None,
    *,
    nesterov: bool = False,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.adamw` with its moments in one byte each, and fp32 moments for embeddings, norms and biases.

    $$u_t = -\alpha_t \left( \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\epsilon} + \epsilon}
    + \lambda \theta_t \right)$$

    Parameters, their order, formula and defaults are those of `optax.adamw`; the rest is keyword-only. Moments are
    decoded, updated and encoded block by block; the update comes from the fresh moments, before they are rounded, in
    float32 whatever the parameter's dtype. Parameters that keep fp32 moments get what `optax.adamw` gives them.

    bitsandbytes' `AdamW8bit` has the same formula, a decay of 1e-2 by default, which on CPU comes before the step, its
    `dynamic` map in blocks of 256, and no Nesterov momentum: `fse.interop.bitsandbytes.adamw8bit`.

    Rule: Kingma and Ba 2014, Alg. 1 (arXiv:1412.6980), Loshchilov and Hutter 2017 (arXiv:1711.05101).

    Args:
        learning_rate: a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added outside the square root.
        eps_root: added inside the square root.
        mu_dtype: only there for the order of arguments; must be None.
        weight_decay: a number or a schedule; decoupled, multiplied by the learning rate.
        mask: a pytree of booleans, or a function of the updates that gives one: where weights decay.
        nesterov: Nesterov momentum.
        rules: pairs (pattern, 8 | 32 | "bf16" | "rowwise" | Rule), the first match wins, before the defaults:
            embeddings, norm scales and biases keep fp32. A pattern is a regular expression searched in the parameter's
            path, "block/attn/kernel", or `fse.where(predicate)`. Or a pytree of such values, labelled like the
            parameters.
        state_format: codec, rounding and blocks, see `StateFormat`.
        implementation: None takes what suits platform and shape: one kernel that reads and writes every array once
            ("pallas_tpu", "pallas_gpu") where it can, else "xla". A named one runs or raises.
        partition_specs: a tree of `PartitionSpec` (or `NamedSharding`) like the parameters: how they are cut over a
            mesh with Auto axes, which the kernel has to know on several TPU chips. Under a mesh with Explicit axes
            types say it.
        skip_nonfinite: elements whose gradient is NaN or infinite keep their parameter to the bit, and their moments,
            which in 8 bits are rounded again if the scale of their block changes. By default they become NaN, as in
            optax, and no other element is touched.

    Returns:
        An optax transform that also serves `fse.fused_update`. Its state is that of `optax.adamw` with
        `ScaleByAdam8bitState` in place of `ScaleByAdamState`.

    Raises:
        TypeError: `mu_dtype` is not None; a hyper-parameter that is no number, a `state_format` that is no
            `StateFormat`; in `update`, a state that `init` does not make.
        ValueError: a rule or format that cannot be; in `init`, a rule that matches no parameter; in `update`, a state
            of other parameters, rules or formats.
        NotImplementedError: in `update`, an implementation that the platform or the mesh does not have.

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
