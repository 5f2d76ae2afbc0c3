r"""LAMB: Adam's direction, decayed, at the length of its parameter; moments in one byte each.

    u <- r (adam(g) + w p),   r = |p| / |adam(g) + w p|

Rule: You et al. 2019, Alg. 2 (arXiv:1904.00962). Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from typing import Any

import optax

from ...ops.blockwise_step.api import Implementation
from ..engine.options import Options
from ..engine.tail import Tail
from ..engine.transform import STATELESS, decay_member, method_member, optimizer, rate_member, scale_by
from ..fused_update import FusedTransformation
from ..storage.state_format import StateFormat
from .adam import engine
from .trust_ratio import clipped, trust_ratio


def rescale(u, p):
    """`u` at the length that the trust ratio gives it."""
    return u * trust_ratio(u, p)


def _tail(weight_decay, mask, max_unorm) -> Tail:
    """Decay, and then the trust ratio or bitsandbytes' clipping."""
    return Tail(weight_decay=weight_decay, mask=mask, rescale=clipped(max_unorm) or rescale)


def scale_by_lamb8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    eps_root: float = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    max_unorm: float | None = None,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB's direction, all but the learning rate; see `lamb8bit` for the arguments.

    $$u_t = \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert} d_t$$

    Rule, and what differs from bitsandbytes: `lamb8bit`.
    There is no `optax.scale_by_lamb`: its trust ratio is `optax.scale_by_trust_ratio`'s.

    Raises:
        TypeError, ValueError, NotImplementedError: as `lamb8bit`.

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
    mask: Any = None,
    *,
    max_unorm: float | None = None,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""`optax.lamb` with its moments in one byte each, stored as `adamw8bit` stores them.

    $$u_t = -\alpha_t \frac{\lVert \theta_t \rVert}{\lVert d_t \rVert} d_t, \quad d_t = \mathrm{adam}(g_t) + \lambda
    \theta_t$$

    This is the trust ratio of the paper. bitsandbytes' 32-bit `LAMB` has none: it clips, $\min(1, \mathrm{max\_unorm}
    \lVert \theta \rVert / \lVert u \rVert)$, which `max_unorm` asks for here, in place of the ratio; its 8-bit `LAMB`
    on CPU does neither and is Adam. Norms are sums over a whole parameter: on another mesh they may differ in their
    last bits, and with them the updates, but not the moments.

    Formula, order of arguments and defaults are those of `optax.lamb`; moments are stored as in `adamw8bit`, and what
    comes after `*` is ours. `max_unorm` is bitsandbytes'.

    Rule: You et al. 2019, Alg. 2 (arXiv:1904.00962).

    Args:
        learning_rate: a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added outside the square root.
        eps_root: added inside the square root.
        weight_decay: a number or a schedule; part of the direction whose length is set.
        mask: a pytree of booleans, or a function of the updates that gives one: where weights decay.
        max_unorm: bitsandbytes' clipping in place of the trust ratio: the longest direction, in lengths of the
            parameter (1.0 there); 0 is no limit, and None the trust ratio. A parameter of length 0 is not clipped.
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
