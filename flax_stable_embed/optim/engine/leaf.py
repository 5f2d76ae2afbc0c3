"""Runs one step of one parameter.

    u, m = rule(gradient_scale * g, *m);   u = rescale(u + weight_decay * p, p);   u = step_size * u
    p = p + u where fused

Moments in 8 bits run in `ops/blockwise_step`, which decodes, applies the rule and encodes. All other moments run here,
with the formula of optax on arrays in float32 (or wider).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...ops.blockwise_step.api import Implementation, step_blockwise
from ...ops.blockwise_step.step import Operands, Step, apply_rule, row_mean_square, square, widest
from ...ops.counter_random import random_bits, rounding_key
from ...ops.dtypes import at_least_float32
from ...ops.rounding import stochastic_round
from ..split_parameter import SplitParameter, joined
from ..storage.moments import in_memory, memory_of, not_differentiated
from ..storage.plan import LeafPlan
from .method import Method
from .tail import Tail


class Leaf(NamedTuple):
    """The arrays of one parameter at one step. `stored` has its moments and scales by the name of their field."""

    g: Any  # None where there is no gradient
    p: Any  # an array or a SplitParameter; None where the caller did not pass parameters
    stored: dict[str, Array]


class LeafStep(NamedTuple):
    """What one step does to every parameter in the same way.

    Attributes:
        method: The optimizer.
        implementation: The code that runs steps on 8-bit moments; None selects it.
        fused: Whether the output is the new parameter instead of the update.
        skip_nonfinite: Whether elements with a non-finite gradient keep their parameter and moments.
        count: The state's count after the step.
    """

    method: Method
    implementation: Implementation | None
    fused: bool
    skip_nonfinite: bool
    count: Array

    def __call__(self, plan: LeafPlan, leaf: Leaf, hyper: dict[str, Any], tail: Tail) -> tuple[Any, dict[str, Array]]:
        """Runs the step of one parameter: `(output, stored)`.

        Moments return to the memory that they came from. The output of a split parameter is the new one.
        """
        memory = {name: plan.memory_kind or memory_of(x) for name, x in leaf.stored.items()}
        stored = {name: in_memory(x, "device") for name, x in leaf.stored.items()}
        if plan.bits in (8, "bf16"):
            stored = {name: not_differentiated(x, plan.path) for name, x in stored.items()}
        leaf = leaf._replace(stored=stored)
        if isinstance(leaf.p, SplitParameter):  # the output is always the new parameter
            out, stored = self._replace(fused=True)._with_tail(plan, leaf, hyper, tail)
            out = leaf.p.with_value(out)
        else:
            out, stored = self._with_tail(plan, leaf, hyper, tail)
        return out, {name: in_memory(x, memory[name]) for name, x in stored.items()}

    def _with_tail(self, plan: LeafPlan, leaf: Leaf, hyper: dict[str, Any], tail: Tail):
        p, dtype = leaf.p, np.dtype(leaf.g.dtype if leaf.p is None else leaf.p.dtype)
        compute = self._compute_dtype(plan, leaf, dtype)
        if tail.gradient_scale is not None:
            if plan.bits == 8 and tail.gradient_ratio is None and tail.rescale is None:
                hyper = hyper | {"gradient_scale": tail.gradient_scale}  # the kernel multiplies
            else:
                leaf = leaf._replace(g=leaf.g.astype(compute) * tail.gradient_scale.astype(compute))
        g = leaf.g
        if not self.fused and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = compute  # updates of integer parameters keep their fractions, as in optax
        wide_p: Any = None if p is None else p.astype(compute)
        clip = tail.clip if plan.bits != 8 else None
        decays_last = clip is not None and tail.weight_decay is not None and not tail.coupled
        if tail.weight_decay is not None and not decays_last:
            hyper = hyper | {"coupled_weight_decay" if tail.coupled else "weight_decay": tail.weight_decay}
        if (ratio := tail.gradient_ratio) is not None:
            given = g.astype(compute)
            if tail.coupled and tail.weight_decay is not None:
                given = given + tail.weight_decay * wide_p
            if plan.stacked:  # a ratio for each slice; a kernel takes only scalars
                g = per_slice(lambda g, p: g * ratio(g, p), plan.stacked)(given, wide_p)
                leaf, hyper = leaf._replace(g=g), {k: v for k, v in hyper.items() if k != "coupled_weight_decay"}
            else:
                hyper = hyper | {"ratio": ratio(given, wide_p)}
        rescale = tail.rescale if clip is None else clip
        if rescale is None:
            if tail.step_size is not None:
                hyper = hyper | {"step_size": tail.step_size}
            return self._rule(plan, leaf, hyper, fused=self.fused, dtype=dtype, compute=compute)
        u, stored = self._rule(plan, leaf, hyper, fused=False, dtype=compute, compute=compute)
        u = per_slice(rescale, plan.stacked)(u, wide_p)
        if decays_last:
            u = u + tail.weight_decay * wide_p
        if tail.step_size is not None:
            u = tail.step_size * u
        if self.skip_nonfinite:
            u = jnp.where(jnp.isfinite(g), u, jnp.full_like(u, -0.0))  # again: by now it may be 0.0, which -0.0 is not
        return (widest(p, wide_p) + u if self.fused else u).astype(dtype), stored

    def _compute_dtype(self, plan: LeafPlan, leaf: Leaf, dtype: np.dtype) -> np.dtype:
        """Returns the dtype of the arithmetic: float32 for 8-bit moments, else that of the moments if they are wide."""
        if plan.bits == 8:
            return np.dtype(np.float32)
        if plan.bits == 32 and self.method.moments:
            return leaf.stored[self.method.moments[0].name].dtype
        return at_least_float32(dtype)

    def _rule(self, plan: LeafPlan, leaf: Leaf, hyper: dict[str, Any], *, fused: bool, dtype, compute):
        """Runs the update rule, with what `apply_rule` adds, on moments in any storage."""
        g, p, stored = leaf
        names = [m.name for m in self.method.moments]
        if plan.bits == "rowwise":
            hyper = hyper | {"square": row_mean_square}
            # Such a square is not in the row's mean, so the element would take a step as long as its gradient.
            g = jnp.where(jnp.isfinite(g) & ~jnp.isfinite(square(g.astype(compute))), jnp.zeros_like(g), g)
        elif plan.bits == "bf16":
            hyper = hyper | {"rounded": True}
        # A np.float64 is a float, but one that would widen float32 arrays under x64. So it becomes a Python float.
        static = tuple((k, float(v) if isinstance(v, float) else v) for k, v in hyper.items() if _is_static(v))
        traced = {k: v for k, v in hyper.items() if not _is_static(v)}
        step = Step(self.method.rule, hyper=static, fused=fused, skip_nonfinite=self.skip_nonfinite, dtype=dtype)
        moments = tuple(stored[name] for name in names)
        if plan.blocks is None:
            p = joined(p)
            out, new = apply_rule(step, g, p, tuple(m.astype(compute) for m in moments), traced, compute)
            new = [self._narrowed(f"{plan.path}/{n}", *pair) for n, *pair in zip(names, new, moments)]
            return out, stored | dict(zip(names, new))
        remainder = weight_key = None
        if isinstance(p, SplitParameter):
            step = replace(step, split=p.bits)
            p, remainder, weight_key = p.p, p.remainder, p.key
        step = step.with_storage(self.method.stored(plan), plan.blocks)
        absmax = tuple(stored[f"{name}_absmax"] for name in names)
        traced = {k: jnp.asarray(v, jnp.float32) for k, v in traced.items()}
        key = None if step.rounding == "nearest" else rounding_key(step.rounding, plan.path, self.count)
        needs_p = fused or "weight_decay" in hyper or "coupled_weight_decay" in hyper
        operands = Operands(g, p if needs_p else None, moments, absmax, traced, key)
        if needs_p:
            operands = operands._replace(remainder=remainder, weight_key=weight_key if fused else None)
        out, codes, absmax = step_blockwise(step, operands, self.implementation, plan.placement, p)
        return out, dict(zip(names, codes)) | {f"{name}_absmax": a for name, a in zip(names, absmax)}

    def _narrowed(self, name: str, new: Array, old: Array) -> Array:
        """Rounds a moment to the dtype that it is stored in.

        In bfloat16 it is rounded stochastically, because rounding to nearest would leave a slow mean where it is.
        """
        if old.dtype != jnp.bfloat16:
            return new.astype(old.dtype)
        return stochastic_round(new.astype(jnp.float32), old.dtype, random_bits(name, self.count, old))


def per_slice(function: Callable[..., Array], stacked: tuple[int, ...]) -> Callable[..., Array]:
    """Returns a function that runs on every slice along the axes `stacked`, and stacks its results along them."""
    for axis in stacked:  # in order, so that the last axis is removed first and the others keep their numbers
        function = jax.vmap(function, in_axes=axis, out_axes=axis)
    return function


def _is_static(hyper: Any) -> bool:
    return hyper is None or isinstance(hyper, int | float) or callable(hyper)
