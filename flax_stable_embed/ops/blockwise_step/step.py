"""One optimizer step on one array whose moments are stored in 8 bits, in blocks.

    m_k = decode(codes_k) * absmax_k;   u, m' = rule(g, *m);   out = finish(u, p);   codes_k, absmax_k = encode(m'_k)

An update rule knows nothing about storage, and this file knows nothing about update rules. The update is computed from
the new moments before they are rounded, in float32 whatever the parameter's dtype. A `Step` holds everything static.
Every implementation (one file each) therefore takes the same two arguments: the `Step` and the arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..blockwise.blocks import Blocks
from ..blockwise.codecs import CODECS, Code, Codec
from ..counter_random import Rounding
from ..split_weights import REMAINDERS

Output = Array | tuple[Array, ...]  # of a step: one array, or a new parameter that is split
Need = Literal["square", "rounded", "step_size"]


@dataclass(frozen=True)
class UpdateRule:
    """The formula of an optimizer. It declares which values it needs from the step around it.

    Attributes:
        formula: `formula(g, *moments, **hyper) -> (u, moments)`, a module-level function of float32 arrays.
        needs: Keyword arguments that `apply_rule` adds to the hyper-parameters:
            "square": the function from a gradient to the squares that second moments average, of their shape.
            "rounded": whether the moments that the formula gets were rounded when they were stored.
            "step_size": the step size, or None. The formula then multiplies by it, and `apply_rule` does not.
    """

    formula: Callable
    needs: tuple[Need, ...] = ()

    @property
    def name(self) -> str:
        return self.formula.__name__

    def __call__(self, g, *moments, **hyper):
        return self.formula(g, *moments, **hyper)


def update_rule(*needs: Need) -> Callable[[Callable], UpdateRule]:
    """Declares a function to be an update rule: `@update_rule("square")` above `def adam(g, m, v, *, square, ...)`."""
    return lambda formula: UpdateRule(formula, needs)


class Moment(NamedTuple):
    """How one moment is stored."""

    signed: bool
    codec: Codec
    rounding: Rounding = "nearest"

    @property
    def code(self) -> Code:
        return CODECS[self.codec](self.signed)


@dataclass(frozen=True)
class Step:
    """Everything static about the step of one array; hashable, so it can be a static argument.

    `apply_rule` runs `rule`, and adds weight decay and the step size. The output is `u` in `dtype`. When `fused` it is
    `p + u`, and `dtype` is that of `p`. With `skip_nonfinite`, elements whose gradient is not finite keep their moments
    and their parameter.

    With `split`, the parameter is a bfloat16 and a remainder, of 24 or 32 bits in all (`ops/split_weights.py`), and
    `dtype` is float32. When fused, the output is the pair of the new ones.
    """

    rule: UpdateRule
    hyper: tuple[tuple[str, Any], ...] = ()
    moments: tuple[Moment, ...] = ()
    blocks: Blocks = Blocks(0, 1)
    fused: bool = False
    skip_nonfinite: bool = False
    dtype: np.dtype = np.dtype(np.float32)
    split: int | None = None

    def with_storage(self, moments: tuple[Moment, ...], blocks: Blocks) -> "Step":
        """Returns the same step on moments that are stored in 8 bits."""
        return replace(self, moments=moments, blocks=blocks)

    @property
    def rounding(self) -> Rounding:
        """The rounding of the moments that are not rounded to nearest, if there are any. All of them have the same."""
        others: list[Rounding] = [moment.rounding for moment in self.moments if moment.rounding != "nearest"]
        return others[0] if others else "nearest"

    @property
    def outputs(self) -> tuple[np.dtype, ...]:
        """The dtypes of the output: two if it is a split parameter, else one."""
        return (np.dtype(jnp.bfloat16), REMAINDERS[self.split]) if self.split and self.fused else (self.dtype,)

    @property
    def rounds_weights(self) -> bool:
        """Whether the output is rounded by the bits of `weight_bits`."""
        return self.fused and self.split == 24


class Operands(NamedTuple):
    """The arrays of one step. `codes` and `absmax` have one entry per moment. `hyper` holds traced scalars by name."""

    g: Array
    p: Any  # None where nothing needs the parameter
    codes: tuple[Array, ...]
    absmax: tuple[Array, ...]
    hyper: dict[str, Any]
    key: Array | None = None  # uint32 (), from `rounding_key`, if not all moments are rounded to nearest
    remainder: Array | None = None  # if the parameter is split
    weight_key: Array | None = None  # uint32 (), from `rounding_key` for dither, if the parameter has 24 bits


def apply_rule(step: Step, g: Array, p: Any, moments: tuple[Array, ...], hyper: dict[str, Any], compute: Any = None):
    """Runs the arithmetic of a step in the dtype `compute` (float32 if None): `(output, new moments)`.

    Four hyper-parameters act around the rule, where they are given. `gradient_scale` multiplies the gradient, and
    `coupled_weight_decay * p` is added to it, before the rule. `weight_decay * p` is added to the direction after it.
    `step_size` multiplies the sum.
    """
    compute = jnp.float32 if compute is None else compute
    hyper = {**dict(step.hyper), **hyper}
    scale, coupled = hyper.pop("gradient_scale", None), hyper.pop("coupled_weight_decay", None)
    weight_decay = hyper.pop("weight_decay", None)
    on_offer = {
        "square": hyper.pop("square", square),
        "rounded": hyper.pop("rounded", bool(step.moments)),
        "step_size": hyper.pop("step_size", None),
    }
    hyper |= {name: on_offer[name] for name in step.rule.needs}
    step_size = None if "step_size" in step.rule.needs else on_offer["step_size"]
    g_in: Any = g.astype(compute)
    p_in: Any = None if p is None else p.astype(compute)
    if scale is not None:
        g_in = g_in * scale
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
        # The second moment of an entire row ("rowwise") has already left out such elements.
        new = tuple(jnp.where(finite, x, old) if x.shape == g.shape else x for x, old in zip(new, moments))
    return (widest(p, p_in) + u if step.fused else u).astype(step.dtype), new


def without_overflow(moments: Sequence[Array]) -> tuple[Array, ...]:
    """Zeroes all moments where one is not finite. If g^2 alone overflowed to zero, m / sqrt(0) would follow."""
    finite = reduce(jnp.logical_and, map(jnp.isfinite, moments))
    return tuple(jnp.where(finite, x, 0.0) for x in moments)


def widest(p: Any, wide: Any) -> Array:
    """Returns the parameter to add to: `wide`, its copy in the dtype of the arithmetic, or itself if it is float64."""
    return p if p.dtype == np.float64 else wide


def square(g: Array) -> Array:
    """Returns |g|^2, element by element."""
    return g**2 if jnp.isrealobj(g) else g.real**2 + g.imag**2


def row_mean_square(g: Array) -> Array:
    """Returns the mean of g^2 over the last axis, kept with size 1. Squares that are not finite count as zero."""
    squares = g**2
    return jnp.mean(jnp.where(jnp.isfinite(squares), squares, 0.0), axis=-1, keepdims=True)
