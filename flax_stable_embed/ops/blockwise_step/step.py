"""One optimizer step on one array whose moments are stored in blocks of bytes.

    m_k = decode(codes_k) * absmax_k;   u, m' = rule(g, *m);   out = finish(u, p);   codes_k, absmax_k = encode(m'_k)

The rule knows no storage and this file knows no rule. The update is computed from the fresh moments, before they are
rounded, in float32 whatever the parameter's dtype. A `Step` holds all that is static, so that every implementation
(`xla.py`, one file each) has the same two arguments: what to do, and the arrays.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..blockwise.blocks import Blocks
from ..blockwise.codecs import CODECS, Code, Codec


class Moment(NamedTuple):
    """How one moment is stored."""

    signed: bool
    codec: Codec
    stochastic: bool = False

    @property
    def code(self) -> Code:
        return CODECS[self.codec](self.signed)


@dataclass(frozen=True)
class Step:
    """Everything static about the step of one array; hashable, so it can be a static argument.

    `rule(g, *moments, **hyper) -> (u, moments)` is a module-level function in float32; around it `apply_rule` decays
    and scales. The output is `u` in `dtype`, or `p + u` when `fused`, where `dtype` is that of `p`. With
    `skip_nonfinite`, elements whose gradient is not finite keep moments and parameter.
    """

    rule: Callable
    hyper: tuple[tuple[str, Any], ...] = ()
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


def apply_rule(step: Step, g: Array, p: Any, moments: tuple[Array, ...], hyper: dict[str, Any], compute: Any = None):
    """The arithmetic of a step, in the dtype `compute` (float32 if None): `(output, new moments)`.

    Hyper-parameters around the rule, each only where it is given: `coupled_weight_decay * p` is added to the gradient
    before it; `weight_decay * p` is added to its direction, which then is multiplied by `step_size`.
    A rule asks by a parameter of this name for:
        square: the function from a gradient to the squares that its second moments average, of their shape.
        rounded: whether the moments that it gets were rounded when they were stored.
        step_size: to multiply by it itself; None where there is none.
    """
    compute = jnp.float32 if compute is None else compute
    hyper = {**dict(step.hyper), **hyper}
    asked = _parameters(step.rule)
    coupled, weight_decay = hyper.pop("coupled_weight_decay", None), hyper.pop("weight_decay", None)
    step_size = None if "step_size" in asked else hyper.pop("step_size", None)
    on_offer = {"square": hyper.pop("square", square), "rounded": hyper.pop("rounded", bool(step.moments))}
    hyper |= {name: value for name, value in on_offer.items() if name in asked}
    g_in: Any = g.astype(compute)
    p_in: Any = None if p is None else p.astype(compute)
    given = g_in
    if coupled is not None:
        g_in = g_in + coupled * p_in
    u, new = step.rule(g_in, *moments, **hyper)
    if weight_decay is not None:
        u = u + weight_decay * p_in
    if step_size is not None:
        u = step_size * u
    if step.skip_nonfinite:
        finite = jnp.isfinite(given)
        u = jnp.where(finite, u, jnp.full_like(u, -0.0))  # p + -0.0 is p to the bit, for -0.0 too
        # A second moment of a whole row has left such elements out by itself.
        new = tuple(jnp.where(finite, x, old) if x.shape == g.shape else x for x, old in zip(new, moments))
    return (widest(p, p_in) + u if step.fused else u).astype(step.dtype), new


def without_overflow(moments: Sequence[Array]) -> tuple[Array, ...]:
    """Zero in all moments where one is not finite: alone, g^2 overflows first, and m / sqrt(0) would follow."""
    finite = reduce(jnp.logical_and, map(jnp.isfinite, moments))
    return tuple(jnp.where(finite, x, 0.0) for x in moments)


def widest(p: Any, wide: Any) -> Array:
    """A parameter to add to: `wide`, its copy in the dtype of the arithmetic, or itself where it has more digits."""
    return p if p.dtype == np.float64 else wide


@cache
def _parameters(rule: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(rule).parameters)


def square(g: Array) -> Array:
    """|g|^2, element by element."""
    return g**2 if jnp.isrealobj(g) else g.real**2 + g.imag**2


def row_mean_square(g: Array) -> Array:
    """The mean of g^2 over the last axis, which stays with extent 1. Squares that are not finite count as zero."""
    squares = g**2
    return jnp.mean(jnp.where(jnp.isfinite(squares), squares, 0.0), axis=-1, keepdims=True)
