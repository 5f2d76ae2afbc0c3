r"""bitsandbytes' optimizers with one moment: SGD, LARS, RMSprop, Adagrad, Lion.

All of them store the moment with the signed map, even if it is never negative. In Lion the parameter itself decays. In
the others, weight decay is added to the gradient: g + w p.

Source: bitsandbytes 0.50.2, `optim/` and `backends/`.
"""

import optax

from ...ops.blockwise_step.api import Implementation
from ...optim.engine.options import Options
from ...optim.fused_update import FusedTransformation
from ...optim.methods.adagrad import engine as adagrad_engine
from ...optim.methods.lion import engine as lion_engine
from ...optim.methods.rmsprop import engine as rmsprop_engine
from ...optim.methods.sgd import engine as sgd_engine
from ...optim.storage.rules import UserRules
from ...optim.storage.state_format import StateFormat
from ...optim.trees import Specs
from .formula import STATE_FORMAT, decayed


def sgd8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `SGD8bit`: SGD with momentum.

    $$t_t = g_t + \lambda \theta_{t-1} + b\, t_{t-1}, \quad \theta_t = \theta_{t-1} - \alpha_t t_t$$

    There is no dampening and no Nesterov momentum. bitsandbytes has arguments for both and ignores them.

    Differences from bitsandbytes: those of `adamw8bit`. `momentum` has no default; there the default is 0, which raises
    an error.

    Differences from `fse.sgd8bit`: the storage format, as in `adamw8bit`, and weight decay.

    Args:
        momentum: Decay rate of the trace, the decaying sum of gradients.
        weight_decay: Strength of the weight decay, a number or a schedule. It is multiplied by the parameter and added
            to the gradient.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: As in `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: As `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.interop.bitsandbytes.sgd8bit(0.1, 0.9, weight_decay=0.5)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4)
    0.85
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    engine = sgd_engine(momentum, None, options, sums="gradients")
    return decayed(engine, learning_rate, weight_decay, coupled=True)


def lars8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    max_unorm: float | None = 0.02,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `LARS8bit`: SGD with momentum whose step is clipped where the trace is in 32 bits.

    $$t_t = g_t + \lambda \theta_{t-1} + b\, t_{t-1}, \quad \theta_t = \theta_{t-1} - \alpha_t \min\left(1, \frac{M
    \lVert \theta_{t-1} \rVert}{\lVert t_t \rVert}\right) t_t$$

    **The step of a parameter with an 8-bit trace is not clipped.** This is as in bitsandbytes, where `LARS8bit` does
    plain SGD for such parameters on CPU and refuses to run on CUDA. Use `fse.lars8bit` for the trust ratio of the
    paper, and `fse.lars8bit(max_unorm=M)` to clip whatever the storage is. Use rules=((".*", 32),) for bitsandbytes'
    `LARS32bit`.

    Differences from bitsandbytes: those of `sgd8bit`. The step of a parameter of norm 0 is not clipped; there it would
    stay 0 forever.

    Differences from `fse.lars8bit`: the storage format, as in `adamw8bit`. Steps are clipped instead of scaled by a
    trust ratio. Clipping comes after the trace and applies only where the trace is in fp32.

    Args:
        momentum: Decay rate of the trace, the decaying sum of gradients.
        weight_decay: As in `sgd8bit`.
        max_unorm: The largest norm of a step at a learning rate of 1, relative to the norm of its parameter (M in the
            equation). None or 0 for no limit.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: As in `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: As `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512)), "bias": jnp.ones(512)}
    >>> tx = fse.interop.bitsandbytes.lars8bit(0.1, 0.9)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> [round(float(x.ravel()[0]), 4) for x in (params["kernel"], params["bias"])]
    [0.9, 0.998]
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    engine = sgd_engine(momentum, None, options, name="lars", sums="gradients")
    return decayed(engine, learning_rate, weight_decay, coupled=True, max_unorm=max_unorm)


def rmsprop8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    decay: float = 0.99,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `RMSprop8bit`: neither centered nor with momentum, and eps is outside the square root.

    $$d_t = g_t + \lambda \theta_{t-1}, \quad v_t = b v_{t-1} + (1 - b) d_t^2, \quad \theta_t = \theta_{t-1} - \alpha_t
    \frac{d_t}{\sqrt{v_t} + \epsilon}$$

    Differences from bitsandbytes: those of `adamw8bit`. The numerator is the gradient with the weight decay in it, as
    on CPU. On CUDA it is the gradient alone, which removes nearly all of the decay.

    Differences from `fse.rmsprop8bit`: the storage format, as in `adamw8bit`. The learning rate has a default, eps is
    outside the square root, `decay` is 0.99 instead of 0.9, and there is weight decay. There is neither centering nor
    momentum.

    Args:
        decay: Decay rate of the second moment, the moving average of squared gradients. bitsandbytes calls it `alpha`.
        eps: As in `adamw8bit`.
        weight_decay: As in `sgd8bit`.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: As in `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: As `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.interop.bitsandbytes.rmsprop8bit()
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4), state[0].nu["kernel"].dtype
    (0.9, dtype('uint8'))
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    flags = {"eps_in_sqrt": False, "centered": False, "bias_correction": False}
    engine = rmsprop_engine(decay, eps, 0.0, None, options, **flags)
    return decayed(engine, learning_rate, weight_decay, coupled=True)


def adagrad8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    eps: float = 1e-10,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `Adagrad8bit`: the sum of squares starts at 0, and eps is outside the square root.

    $$d_t = g_t + \lambda \theta_{t-1}, \quad s_t = s_{t-1} + d_t^2, \quad \theta_t = \theta_{t-1} - \alpha_t
    \frac{d_t}{\sqrt{s_t} + \epsilon}$$

    Differences from bitsandbytes: those of `rmsprop8bit`.

    Differences from `fse.adagrad8bit`: the storage format, as in `adamw8bit`. The learning rate has a default, the sum
    starts at 0 instead of 0.1, eps is outside the square root and 1e-10, and there is weight decay.

    Args:
        eps: As in `adamw8bit`.
        weight_decay: As in `sgd8bit`.
        learning_rate, rules, state_format, implementation, partition_specs, skip_nonfinite: As in `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: As `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.interop.bitsandbytes.adagrad8bit()
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4), float(state[0].sum_of_squares_absmax["kernel"][0, 0])
    (0.99, 1.0)
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    engine = adagrad_engine(0.0, eps, options, eps_in_sqrt=False)
    return decayed(engine, learning_rate, weight_decay, coupled=True)


def lion8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `Lion8bit`: steps in the direction of the sign of a mean of gradients.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t), \quad m_t =
    b_2 m_{t-1} + (1 - b_2) g_t$$

    Differences from bitsandbytes: those of `adamw8bit`.

    Differences from `fse.lion8bit`: the storage format, as in `adamw8bit`. The learning rate has a default, and weight
    decay is 0 by default instead of 1e-3.

    Args:
        b1: Weight of the moment in the direction; the gradient has the weight 1 - b1.
        b2: Decay rate of the moment, the moving average of gradients.
        learning_rate, weight_decay, rules, state_format, implementation, partition_specs, skip_nonfinite: As in
            `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: As `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.interop.bitsandbytes.lion8bit(weight_decay=0.1)
    >>> tx.init({"kernel": jnp.ones((64, 512))})[0].mu_absmax["kernel"].shape
    (64, 2)
    """
    engine = lion_engine(b1, b2, None, Options(rules, state_format, implementation, partition_specs, skip_nonfinite))
    return decayed(engine, learning_rate, weight_decay)
