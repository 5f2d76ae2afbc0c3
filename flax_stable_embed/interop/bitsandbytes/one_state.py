r"""bitsandbytes' optimizers with one moment: SGD, LARS, RMSprop, Adagrad, Lion.

All of them store it with the signed map, also where it is never negative. But for Lion, weight decay joins the
gradient: g + w p. Source: bitsandbytes 0.50.2, `optim/` and `backends/`.
"""

from typing import Any

import optax

from ...ops.blockwise_step.api import Implementation
from ...optim.fused_update import FusedTransformation
from ...optim.methods.adagrad import engine as adagrad_engine
from ...optim.methods.lion import engine as lion_engine
from ...optim.methods.rmsprop import engine as rmsprop_engine
from ...optim.methods.sgd import engine as sgd_engine
from ...optim.storage.state_format import StateFormat
from .formula import STATE_FORMAT, decayed


def sgd8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `SGD8bit`: momentum without dampening and without Nesterov, which it takes and ignores.

    $$t_t = g_t + \lambda \theta_{t-1} + b\, t_{t-1}, \quad \theta_t = \theta_{t-1} - \alpha_t t_t$$

    Differences from bitsandbytes: those of `adamw8bit`; `momentum` has no default (there it is 0, which raises).
    Difference from `fse.sgd8bit`: weight decay.

    Args:
        momentum: decay rate of the trace.
        weight_decay: a number or a schedule, added to the gradient.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: see
            `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.interop.bitsandbytes.sgd8bit(0.1, 0.9, weight_decay=0.5)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4)
    0.85
    """
    options = rules, state_format, implementation, partition_specs, skip_nonfinite
    engine = sgd_engine(momentum, False, None, *options, sums="gradients")
    return decayed(engine, learning_rate, weight_decay, coupled=True)


def lars8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    max_unorm: float | None = 0.02,
    *,
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `LARS8bit`: SGD, its step clipped where the trace is in 32 bits.

    $$t_t = g_t + \lambda \theta_{t-1} + b\, t_{t-1}, \quad \theta_t = \theta_{t-1} - \alpha_t \min\left(1, \frac{M
    \lVert \theta_{t-1} \rVert}{\lVert t_t \rVert}\right) t_t$$

    **A parameter with an 8-bit trace is not clipped**, as in bitsandbytes, where `LARS8bit` is SGD for those on CPU and
    refuses to run on CUDA. For the trust ratio of the paper, or for clipping whatever the storage, use
    `fse.lars8bit(max_unorm=None or M)`; for bitsandbytes' `LARS32bit`, rules=((".*", 32),).

    Differences from bitsandbytes: those of `sgd8bit`. A parameter of length 0 is not clipped; there it would stay 0 for
    ever.

    Differences from `fse.lars8bit`: the storage, as in `adamw8bit`; clipping in place of the trust ratio, behind the
    trace and only of fp32 traces.

    Args:
        momentum: decay rate of the trace.
        weight_decay: a number or a schedule, added to the gradient.
        max_unorm: the longest step at a learning rate of 1, in lengths of the parameter; None or 0 for no limit.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: see
            `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512)), "bias": jnp.ones(512)}
    >>> tx = fse.interop.bitsandbytes.lars8bit(0.1, 0.9)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> [round(float(x.ravel()[0]), 4) for x in (params["kernel"], params["bias"])]
    [0.9, 0.998]
    """
    options = rules, state_format, implementation, partition_specs, skip_nonfinite
    engine = sgd_engine(momentum, False, None, *options, name="lars", sums="gradients")
    return decayed(engine, learning_rate, weight_decay, coupled=True, max_unorm=max_unorm)


def rmsprop8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    decay: float = 0.99,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `RMSprop8bit`: eps outside the square root, no momentum, not centered.

    $$d_t = g_t + \lambda \theta_{t-1}, \quad v_t = b v_{t-1} + (1 - b) d_t^2, \quad \theta_t = \theta_{t-1} - \alpha_t
    \frac{d_t}{\sqrt{v_t} + \epsilon}$$

    Differences from bitsandbytes: those of `adamw8bit`; the decayed gradient is in the numerator, as on CPU: on CUDA
    the raw one is, which all but loses the decay.

    Differences from `fse.rmsprop8bit`: the storage, as in `adamw8bit`; a learning rate by default, eps outside the
    square root, weight decay, `decay` 0.99 and not 0.9, and neither centering nor momentum.

    Args:
        decay: decay rate of the second moment; bitsandbytes' `alpha`.
        eps: added outside the square root.
        weight_decay: a number or a schedule, added to the gradient.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: see
            `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.interop.bitsandbytes.rmsprop8bit()
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4), state[0].nu["kernel"].dtype
    (0.9, dtype('uint8'))
    """
    options = rules, state_format, implementation, partition_specs, skip_nonfinite
    engine = rmsprop_engine(decay, eps, 0.0, False, False, None, False, False, *options)
    return decayed(engine, learning_rate, weight_decay, coupled=True)


def adagrad8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    eps: float = 1e-10,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `Adagrad8bit`: the sum begins from 0, eps is outside the square root.

    $$d_t = g_t + \lambda \theta_{t-1}, \quad s_t = s_{t-1} + d_t^2, \quad \theta_t = \theta_{t-1} - \alpha_t
    \frac{d_t}{\sqrt{s_t} + \epsilon}$$

    Differences from bitsandbytes: those of `rmsprop8bit`.

    Differences from `fse.adagrad8bit`: the storage, as in `adamw8bit`; a learning rate by default, the sum begins from
    0 and not 0.1, eps is outside the square root and 1e-10, and there is weight decay.

    Args:
        eps: added outside the square root.
        weight_decay: a number or a schedule, added to the gradient.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: see
            `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.interop.bitsandbytes.adagrad8bit()
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4), float(state[0].sum_of_squares_absmax["kernel"][0, 0])
    (0.99, 1.0)
    """
    engine = adagrad_engine(0.0, eps, False, rules, state_format, implementation, partition_specs, skip_nonfinite)
    return decayed(engine, learning_rate, weight_decay, coupled=True)


def lion8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `Lion8bit`.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t), \quad m_t =
    b_2 m_{t-1} + (1 - b_2) g_t$$

    Differences from bitsandbytes: those of `adamw8bit`.

    Differences from `fse.lion8bit`: the storage, as in `adamw8bit`; a default learning rate and, in place of 1e-3, no
    weight decay.

    Args:
        b1: weight of the moment in the direction.
        b2: decay rate of the moment.
        learning_rate, weight_decay, rules, state_format, implementation, partition_specs, skip_nonfinite: see
            `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.interop.bitsandbytes.lion8bit(weight_decay=0.1)
    >>> tx.init({"kernel": jnp.ones((64, 512))})[0].mu_absmax["kernel"].shape
    (64, 2)
    """
    engine = lion_engine(b1, b2, None, rules, state_format, implementation, partition_specs, skip_nonfinite)
    return decayed(engine, learning_rate, weight_decay)
