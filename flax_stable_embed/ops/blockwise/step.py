"""One optimizer step on one array whose moments are stored in blocks of bytes.

    m_k = decode(codes_k) * absmax_k;   u, m' = rule(g, *m);   out = finish(u, p);   codes_k, absmax_k = encode(m'_k)

The rule knows no storage and this file knows no rule. The update is computed from the fresh moments, before they are
rounded, in float32 whatever the parameter's dtype. A `Step` holds all that is static, so that every implementation
(`xla.py`, one file each) has the same two arguments: what to do, and the arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from .blocks import Blocks
from .codecs import CODECS, Code


class Moment(NamedTuple):
    """How one moment is stored."""

    signed: bool
    codec: str
    stochastic: bool = False

    @property
    def code(self) -> Code:
        return CODECS[self.codec](self.signed)


@dataclass(frozen=True)
class Step:
    """Everything static about the step of one array; hashable, so it can be a static argument.

    `rule(g, *moments, **hyper) -> (u, moments)` is a module-level function in float32. Then, where they are among the
    hyper-parameters: `u += weight_decay * p`, and `u *= step_size`. The output is `u` in `dtype`, or `p + u` when
    `fused`, where `dtype` is that of `p`. With `skip_nonfinite`, elements whose gradient is not finite keep moments and
    parameter.
    """

    rule: Callable
    hyper: tuple[tuple[str, float], ...] = ()
    moments: tuple[Moment, ...] = ()
    blocks: Blocks = Blocks(0, 1)
    fused: bool = False
    skip_nonfinite: bool = False
    dtype: np.dtype = np.dtype(np.float32)

    def with_storage(self, moments: tuple[Moment, ...], blocks: Blocks) -> "Step":
        """The same step on moments that are stored in bytes."""
        return replace(self, moments=moments, blocks=blocks)

    @property
    def stochastic(self) -> bool:
        return any(moment.stochastic for moment in self.moments)


class Operands(NamedTuple):
    """The arrays of one step. `codes` and `absmax` have one entry a moment; `hyper` holds traced scalars by name."""

    g: Array
    p: Any  # None where nothing needs the parameter
    codes: tuple[Array, ...]
    absmax: tuple[Array, ...]
    hyper: dict[str, Any]
    key: Array | None = None  # uint32 (), for stochastic rounding


def apply_rule(step: Step, g: Array, p: Any, moments: tuple[Array, ...], hyper: dict[str, Any]):
    """The arithmetic of a step, in the dtype of the moments: `(output, new moments)`."""
    hyper = {**dict(step.hyper), **hyper}
    weight_decay, step_size = hyper.pop("weight_decay", None), hyper.pop("step_size", None)
    compute = moments[0].dtype
    g_in: Any = g.astype(compute)
    p_in: Any = None if p is None else p.astype(compute)
    u, new = step.rule(g_in, *moments, **hyper)
    if weight_decay is not None:
        u = u + weight_decay * p_in
    if step_size is not None:
        u = step_size * u
    if step.skip_nonfinite:
        finite = jnp.isfinite(g_in)
        u = jnp.where(finite, u, jnp.full_like(u, -0.0))  # p + -0.0 is p to the bit, for -0.0 too
        new = tuple(jnp.where(finite, after, before) for after, before in zip(new, moments))
    return (p_in + u if step.fused else u).astype(step.dtype), new
