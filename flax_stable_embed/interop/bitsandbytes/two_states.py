r"""bitsandbytes' optimizers with a first and a second moment: Adam, AdamW, LAMB, AdEMAMix.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p <- (1 - lr w) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

m is stored with the signed map, v with the unsigned one.

Source: bitsandbytes 0.50.2, `optim/` and `backends/`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...optim.arguments import check_numbers
from ...optim.engine.options import Options
from ...optim.fused_update import FusedTransformation
from ...optim.methods.adam import engine as adam_engine
from ...optim.methods.ademamix import engine as ademamix_engine
from ...optim.storage.rules import UserRules
from ...optim.storage.state_format import StateFormat
from ...optim.trees import Specs
from .formula import STATE_FORMAT, correction, decayed, log


def adam8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `Adam8bit`: its `AdamW8bit` with a weight decay of 0 by default.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} +
    \epsilon}$$

    Weight decay is decoupled here, too, as in bitsandbytes.

    Differences from bitsandbytes: those of `adamw8bit`.

    Differences from `fse.adam8bit`: the storage format and the bias corrections, as in `adamw8bit`. The learning rate
    has a default, and there is weight decay.

    Args:
        learning_rate, b1, b2, eps, weight_decay: As in `adamw8bit`.
        rules, state_format, implementation, partition_specs, skip_nonfinite: As in `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: As `adamw8bit`.

    >>> import flax_stable_embed as fse
    >>> tx = fse.interop.bitsandbytes.adam8bit(1e-3)
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    engine = adam_engine(b1, b2, eps, 0.0, None, options, correction=correction)
    return decayed(engine, learning_rate, weight_decay)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `AdamW8bit`: AdamW with its formula, defaults, map and blocks.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} +
    \epsilon}$$

    Moments have the shapes of their parameters. They are uint8 codes with float32 scales, or float32 numbers for
    embeddings, norm scales, biases and small parameters.

    Differences from bitsandbytes:

    - Embeddings, norm scales and biases keep fp32 moments because of their names, not because of the class of their
      module.
    - Blocks do not cross rows. They are the same as bitsandbytes' for vectors and for parameters whose last axis is a
      multiple of 256.
    - A parameter whose last axis is shorter than 32 keeps fp32 moments, like one with fewer than 4096 elements. See
      `min_size` of `fse.StateFormat`.
    - Zero is stored as zero, so that an element that never gets a gradient never moves. This is so on CUDA, but not on
      CPU.
    - Parameters decay before the update, as on CPU and in torch. CUDA decays them after it.

    Differences from `fse.adamw8bit`: weight decay is 1e-2 by default instead of 1e-4, and the learning rate has a
    default. Moments are stored with the `dynamic` codec in blocks of 256. Bias corrections are more accurate.

    Args:
        learning_rate: Global scaling factor of the step, a number or a schedule.
        b1: Exponential decay rate of the first moment, the moving average of gradients.
        b2: Exponential decay rate of the second moment, the moving average of squared gradients.
        eps: Small constant added to the denominator, outside the square root, to avoid dividing by zero.
        weight_decay: Strength of the weight decay, a number or a schedule. It is decoupled: the parameter shrinks by
            the learning rate times this number.
        rules: Pairs (pattern, setting) that say how the moments of single parameters are stored, and that can give them
            hyper-parameters of their own. See `fse.adamw8bit` and `fse.Rule`.
        state_format: The codec, rounding and blocks of 8-bit moments. See `fse.StateFormat`.
        implementation: By default selected by platform and shape: a single fused kernel ("pallas_tpu", "pallas_gpu")
            where one is available, else "xla". A named implementation is used or raises.
        partition_specs: Pytree of `PartitionSpec` or `NamedSharding` with the structure of the parameters: how they are
            sharded. It is only needed to run the kernels on several devices under a mesh with Auto axes. Under a mesh
            with Explicit axes, the types of the arrays have this information.
        skip_nonfinite: If True, an element whose gradient is NaN or infinite keeps its parameter and its moments, as on
            CUDA.

    Returns:
        An optax transform that `fse.fused_update` accepts, too.

    Raises:
        ValueError: If a rule or format is invalid or, in `init`, if a rule matches no parameter.
        NotImplementedError: In `update`, if the platform or the mesh does not have the implementation.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = fse.interop.bitsandbytes.adamw8bit(0.5)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4), state[0].mu["kernel"].dtype, state[0].mu_absmax["kernel"].shape
    (0.495, dtype('uint8'), (64, 2))
    """
    return adam8bit(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        rules=rules,
        state_format=state_format,
        implementation=implementation,
        partition_specs=partition_specs,
        skip_nonfinite=skip_nonfinite,
    )


def lamb8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    max_unorm: float | None = 1.0,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `LAMB8bit`: Adam whose step is clipped where moments are in 32 bits.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \min\left(1, \frac{M \lVert \theta_{t-1} \rVert}{\lVert
    u_t \rVert}\right) u_t, \quad u_t = \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} + \epsilon}$$

    **The step of a parameter with 8-bit moments is not clipped.** This is as in bitsandbytes, where `LAMB8bit` does
    plain Adam for such parameters on CPU and refuses to run on CUDA. Use `fse.lamb8bit` for the trust ratio of the
    paper, and `fse.lamb8bit(max_unorm=M)` to clip whatever the storage is. Use rules=((".*", 32),) for bitsandbytes'
    `LAMB32bit`.

    Differences from bitsandbytes: those of `adamw8bit`. The step of a parameter of norm 0 is not clipped; there it
    would stay 0 forever. The norm of the step is taken after the bias corrections, as on CUDA; on CPU it is taken
    before them.

    Differences from `fse.lamb8bit`: the storage format and the bias corrections, as in `adamw8bit`. eps is 1e-8 instead
    of 1e-6. Steps are clipped instead of scaled by a trust ratio, and only where moments are in fp32.

    Args:
        max_unorm: The largest norm of a step at a learning rate of 1, relative to the norm of its parameter (M in the
            equation). None or 0 for no limit.
        learning_rate, b1, b2, eps, weight_decay: As in `adamw8bit`.
        rules, state_format, implementation, partition_specs, skip_nonfinite: As in `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: As `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512)), "bias": jnp.full(512, 0.5)}
    >>> tx = fse.interop.bitsandbytes.lamb8bit(0.1)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> [round(float(x.ravel()[0]), 4) for x in (params["kernel"], params["bias"])]
    [0.9, 0.45]
    """
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    engine = adam_engine(b1, b2, eps, 0.0, None, options, correction=correction, name="lamb")
    return decayed(engine, learning_rate, weight_decay, max_unorm=max_unorm)


def ademamix8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    *,
    rules: UserRules = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Specs = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""Builds bitsandbytes' `AdEMAMix8bit`: Adam with a second, slow mean of gradients, and two schedules.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \frac{m^{(1)}_t / (1 - b_1^t) + a_t m^{(2)}_t}{\sqrt{v_t
    / (1 - b_2^t)} + \epsilon}$$
    $$a_t = a \min(1, t / T_\alpha), \quad \beta_{3,t} = \min\left(b_3, \exp \frac{\ln b_1 \ln b_3}{(1 - t / T_\beta)
    \ln b_3 + (t / T_\beta) \ln b_1}\right)$$

    The step t counts from 1, while optax's schedules count from 0.

    Differences from bitsandbytes: those of `adamw8bit`. Both means keep all of their scales, as on CPU. On CUDA, if the
    size of the parameter is not a multiple of 256, the scale of the slow mean's first block and that of the fast mean's
    last block are stored in the same place.

    Differences from `fse.ademamix8bit`: the storage format and the bias corrections, as in `adamw8bit`. The schedules
    are part of the optimizer, and weight decay is 1e-2 by default.

    Args:
        b3: Exponential decay rate of the slow mean of gradients.
        alpha: Weight of the slow mean in the step.
        t_alpha: Number of steps in which alpha grows linearly from 0 to its value. None or 0 for no growth.
        t_beta3: Number of steps in which b3 grows from b1 to its value, linearly in the half-life of the mean. None or
            0 for no growth.
        learning_rate, b1, b2, eps, weight_decay: As in `adamw8bit`.
        rules, state_format, implementation, partition_specs, skip_nonfinite: As in `adamw8bit`.

    Returns:
        As `adamw8bit`.

    Raises:
        TypeError: If `t_alpha` or `t_beta3` is not a number, or `b3` while `t_beta3` lets it grow.
        ValueError, NotImplementedError: As `adamw8bit`. A ValueError also if a number of steps is negative, or if rates
            outside of (0, 1) should grow.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.interop.bitsandbytes.ademamix8bit(1e-3, t_alpha=1000, t_beta3=1000)
    >>> tx.init({"kernel": jnp.ones((64, 512))})[0].m2_absmax["kernel"].shape
    (64, 2)
    """
    _check_steps(t_alpha=t_alpha, t_beta3=t_beta3)
    growing_b3 = None if _is_off(t_beta3) else _growing_b3(b3, t_beta3)
    if growing_b3 is not None:
        check_numbers(b3=b3)
        _check_between(b1=b1, b3=b3)
    alpha_now = alpha if _is_off(t_alpha) else lambda before: alpha * jnp.minimum(1.0, (before + 1) / t_alpha)
    options = Options(rules, state_format, implementation, partition_specs, skip_nonfinite)
    engine = ademamix_engine(
        b1, b2, b3, alpha_now, eps, 0.0, None, options, correction=correction, growing_b3=growing_b3
    )
    return decayed(engine, learning_rate, weight_decay)


def _growing_b3(b3: Any, steps: Any) -> Callable:
    """Returns a schedule of (b3, 1 - b3), where b3 starts at b1.

    1 - b3 is computed on its own, because the difference of float32 numbers would have only three correct digits.
    """

    def schedule(before, b1):
        _check_between(b1=b1)  # a rule may have replaced it
        low, high, t = 1 / log(b1), 1 / log(b3), (before + 1).astype(jnp.result_type(float))
        power = 1 / (low + t * ((high - low) / steps))
        grows = (t < steps) & (b1 < b3)  # if b1 is above b3, the rate is b3 from the first step
        return jnp.where(grows, jnp.exp(power), b3), jnp.where(grows, -_expm1(power), 1 - b3)

    return schedule


def _expm1(x: Array) -> Array:
    """Returns exp(x) - 1 for x < 0 within two float32 roundings. On CPU, XLA's own is off by up to five."""
    series = 1 + x / 14
    for n in range(13, 1, -1):
        series = 1 + x / n * series
    return jnp.where(x > -0.5, x * series, jnp.expm1(x))


def _check_between(**rates: Any) -> None:
    for name, rate in rates.items():
        if isinstance(rate, int | float) and not 0 < rate < 1:
            raise ValueError(f"`{name}` must be between 0 and 1 if `t_beta3` lets b3 grow, got {rate!r}.")


def _check_steps(**steps: Any) -> None:
    check_numbers(**{name: n for name, n in steps.items() if n is not None})
    for name, n in steps.items():
        if isinstance(n, int | float) and n < 0:
            raise ValueError(f"`{name}` must be a number of steps that is at least 0, or None, got {n!r}.")


def _is_off(steps: Any) -> bool:
    return steps is None or (isinstance(steps, int | float) and steps == 0)
