r"""bitsandbytes' optimizers with a first and a second moment: Adam, AdamW, LAMB, AdEMAMix.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p <- (1 - lr w) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

m is stored with the signed map, v with the unsigned one. Source: bitsandbytes 0.50.2, `optim/` and `backends/`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from ...ops.blockwise_step.api import Implementation
from ...optim.arguments import check_numbers
from ...optim.fused_update import FusedTransformation
from ...optim.methods.adam import engine as adam_engine
from ...optim.methods.ademamix import engine as ademamix_engine
from ...optim.storage.state_format import StateFormat
from .formula import STATE_FORMAT, correction, decayed, log


def adam8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `Adam8bit`: its `AdamW8bit` without decay; a decay that is given is decoupled here too.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} +
    \epsilon}$$

    See `adamw8bit` for the arguments, the differences (of `fse.adam8bit` too, which has no decay) and the errors.

    >>> import flax_stable_embed as fse
    >>> tx = fse.interop.bitsandbytes.adam8bit(1e-3)
    """
    options = rules, state_format, implementation, partition_specs, skip_nonfinite
    engine = adam_engine(b1, b2, eps, 0.0, None, False, *options, correction=correction)
    return decayed(engine, learning_rate, weight_decay)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    *,
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `AdamW8bit`: formula, defaults, map and blocks.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} +
    \epsilon}$$

    Differences from bitsandbytes: embeddings, norms and biases keep fp32 moments by name and not by the class of their
    module. Blocks lie in rows and do not cross them: they are bitsandbytes' own where the last axis is a multiple of
    256, and for vectors. A parameter whose last axis is shorter than 32 keeps fp32 moments
    (`StateFormat(min_size=...)`). Zero is stored as zero, so that what never gets a gradient never moves, as on CUDA
    and unlike on CPU. Parameters decay before the update, as on CPU and in torch; CUDA decays after it.

    Differences from `fse.adamw8bit`: the defaults (decay 1e-2 in place of 1e-4, the `dynamic` codec in blocks of 256),
    and bias corrections to the last float32 digits.

    Args:
        learning_rate: a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added outside the square root.
        weight_decay: a number or a schedule; decoupled, multiplied by the learning rate.
        rules: which parameters are stored how, and hyper-parameters of their own: see `fse.adamw8bit` and `fse.Rule`.
        state_format: codec, rounding and blocks, see `fse.StateFormat`.
        implementation: None takes what suits platform and shape: one kernel that reads and writes every array once
            ("pallas_tpu", "pallas_gpu") where it can, else "xla". A named one runs or raises.
        partition_specs: a tree of `PartitionSpec` (or `NamedSharding`) like the parameters: how they are cut over a
            mesh with Auto axes, which the kernel has to know on several TPU chips. Under a mesh with Explicit axes
            types say it.
        skip_nonfinite: elements whose gradient is NaN or infinite keep their parameter and moments, as on CUDA.

    Raises:
        ValueError: a rule or format that cannot be; in `init`, a rule that matches no parameter.
        NotImplementedError: in `update`, an implementation that the platform or the mesh does not have.

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
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `LAMB8bit`: Adam, its step clipped where moments are in 32 bits.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \min\left(1, \frac{M \lVert \theta_{t-1} \rVert}{\lVert
    u_t \rVert}\right) u_t, \quad u_t = \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} + \epsilon}$$

    **A parameter with 8-bit moments is not clipped**, as in bitsandbytes, where `LAMB8bit` is Adam for those on CPU and
    refuses to run on CUDA. For the trust ratio of the paper, or for clipping whatever the storage, use
    `fse.lamb8bit(max_unorm=None or M)`; for bitsandbytes' `LAMB32bit`, rules=((".*", 32),).

    Differences from bitsandbytes: those of `adamw8bit`. A parameter of length 0 is not clipped; there it would stay 0
    for ever. The norm is that of the corrected step, as on CUDA; on CPU it lacks the bias corrections.

    Differences from `fse.lamb8bit`: the storage, as in `adamw8bit`; eps 1e-8 and not 1e-6; clipping in place of the
    trust ratio, and only where moments are in fp32.

    Args:
        max_unorm: the longest step at a learning rate of 1, in lengths of the parameter; None or 0 for no limit.
        learning_rate, b1, b2, eps, weight_decay: see `adamw8bit`.
        rules, state_format, implementation, partition_specs, skip_nonfinite: see `adamw8bit`.

    Raises:
        ValueError, NotImplementedError: as `adamw8bit`.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 512)), "bias": jnp.full(512, 0.5)}
    >>> tx = fse.interop.bitsandbytes.lamb8bit(0.1)
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> [round(float(x.ravel()[0]), 4) for x in (params["kernel"], params["bias"])]
    [0.9, 0.45]
    """
    options = rules, state_format, implementation, partition_specs, skip_nonfinite
    engine = adam_engine(b1, b2, eps, 0.0, None, False, *options, correction=correction, name="lamb")
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
    rules: Any = (),
    state_format: StateFormat = STATE_FORMAT,
    implementation: Implementation | None = None,
    partition_specs: Any = None,
    skip_nonfinite: bool = False,
) -> FusedTransformation:
    r"""bitsandbytes' `AdEMAMix8bit`, with its schedules of alpha and b3.

    $$\theta_t = (1 - \alpha_t \lambda) \theta_{t-1} - \alpha_t \frac{m^{(1)}_t / (1 - b_1^t) + a_t m^{(2)}_t}{\sqrt{v_t
    / (1 - b_2^t)} + \epsilon}$$
    $$a_t = a \min(1, t / T_\alpha), \quad \beta_{3,t} = \min\left(b_3, \exp \frac{\ln b_1 \ln b_3}{(1 - t / T_\beta)
    \ln b_3 + (t / T_\beta) \ln b_1}\right)$$

    Steps t count from 1 (optax's schedules from 0). Differences from bitsandbytes: those of `adamw8bit`; and the scale
    of the slow mean's first block survives where the parameter is not a multiple of 256, as on CPU: on CUDA it is
    written over that of the fast mean's last block.

    Differences from `fse.ademamix8bit`: the storage, as in `adamw8bit`; the schedules, which count from 1, and a weight
    decay of 1e-2.

    Args:
        b3: decay rate of the slow mean.
        alpha: weight of the slow mean.
        t_alpha: steps in which alpha grows from 0 to its value, linearly; None or 0 for at once.
        t_beta3: steps in which b3 grows from b1 to its value, linearly in half-lives; None or 0 for at once.
        learning_rate, b1, b2, eps, weight_decay: see `adamw8bit`.
        rules, state_format, implementation, partition_specs, skip_nonfinite: see `adamw8bit`.

    Raises:
        TypeError: `t_alpha`, `t_beta3`, or a `b3` that grows, which is no number.
        ValueError, NotImplementedError: as `adamw8bit`; a negative number of steps, or rates that cannot grow.

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
    options = rules, state_format, implementation, partition_specs, skip_nonfinite
    engine = ademamix_engine(
        b1, b2, b3, alpha_now, eps, 0.0, None, *options, correction=correction, growing_b3=growing_b3
    )
    return decayed(engine, learning_rate, weight_decay)


def _growing_b3(b3: Any, steps: Any) -> Callable:
    """A schedule of b3, which begins at b1, and of 1 - b3, which a difference would leave with three digits."""

    def schedule(before, b1):
        _check_between(b1=b1)  # a rule's, it may be
        low, high, t = 1 / log(b1), 1 / log(b3), (before + 1).astype(jnp.result_type(float))
        power = 1 / (low + t * ((high - low) / steps))
        grows = (t < steps) & (b1 < b3)  # what begins above b3 is b3 throughout
        return jnp.where(grows, jnp.exp(power), b3), jnp.where(grows, -_expm1(power), 1 - b3)

    return schedule


def _expm1(x: Array) -> Array:
    """exp(x) - 1 for x < 0 to a float32 rounding or two; that of XLA's CPU is off by up to five."""
    series = 1 + x / 14
    for n in range(13, 1, -1):
        series = 1 + x / n * series
    return jnp.where(x > -0.5, x * series, jnp.expm1(x))


def _check_between(**rates: Any) -> None:
    for name, rate in rates.items():
        if isinstance(rate, int | float) and not 0 < rate < 1:
            raise ValueError(f"`{name}` must lie between 0 and 1 where `t_beta3` lets b3 grow, got {rate!r}.")


def _check_steps(**steps: Any) -> None:
    check_numbers(**{name: n for name, n in steps.items() if n is not None})
    for name, n in steps.items():
        if isinstance(n, int | float) and n < 0:
            raise ValueError(f"`{name}` must be a number of steps, at least 0, or None; got {n!r}.")


def _is_off(steps: Any) -> bool:
    return steps is None or (isinstance(steps, int | float) and steps == 0)
