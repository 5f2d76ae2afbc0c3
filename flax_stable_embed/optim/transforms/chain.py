"""Chains transforms before an optimizer, so that parameters are still updated in place.

Members that only multiply all gradients by one number, such as clipping by the global norm, do not rewrite the
gradients. The optimizer gets the number, and its kernels multiply:

    gradients are read once for the norm and once by the step, and never written
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..fused_update import (
    FusedTransformation,
    ScalingTransformation,
    check_members,
    is_fused,
    takes_split_parameters,
)
from ..rows.global_norm import clip_by_global_norm
from ..split_parameter import joined


def chain(*transforms: optax.GradientTransformation) -> FusedTransformation:
    """Chains transforms like `optax.chain`, so that `fse.fused_update` works. The last one is an `*8bit` optimizer.

    If `fse.clip_by_global_norm`, `optax.clip_by_global_norm`, `fse.percentile_clipping` or `optax.scale` come right
    before the optimizer, they do not write gradients to memory: the optimizer multiplies by their factor. In float32 an
    update can then differ from that of `optax.chain` in its last bits. With 16-bit gradients it is more accurate,
    because the product is not rounded.

    Raises:
        TypeError: The last transform has no `fused_update`.

    >>> import flax_stable_embed as fse
    >>> tx = chain(optax.clip_by_global_norm(1.0), fse.adamw8bit(1e-3))
    """
    if not transforms or not is_fused(transforms[-1]):
        raise TypeError(
            f"The last member of `chain` must be an 8-bit optimizer of this library, got {transforms[-1:]}. Use "
            "optax.chain for other chains."
        )
    last: FusedTransformation = transforms[-1]
    members = transforms[:-1]
    scaling = _last_factors(members) if hasattr(last, "scaled_step") else []
    others = [optax.with_extra_args_support(tx) for tx in members[: len(members) - len(scaling)]]

    def step(grads, state, params, extra_args, *, fused):
        check_members(state, len(transforms))
        states, scale = [], None
        params32 = jax.tree.map(joined, params) if others else params
        for tx, own in zip(others, state):
            grads, own = tx.update(grads, own, params32, **extra_args)
            states.append(own)
        for factor, own in zip(scaling, state[len(others) :]):
            number, own = factor(grads, own, scale)
            scale = number if scale is None else scale * number
            states.append(own)
        if scale is not None:
            out, own = last.scaled_step(grads, state[-1], params, scale, fused=fused)
        elif fused:
            out, own = last.fused_update(grads, state[-1], params, **extra_args)
        else:
            out, own = last.update(grads, state[-1], params, **extra_args)
        return out, (*states, own)

    def update(updates, state, params=None, **extra_args):
        return step(updates, state, params, extra_args, fused=False)

    def fused(grads, state, params, **extra_args):
        return step(grads, state, params, extra_args, fused=True)

    init = optax.chain(*transforms).init
    return FusedTransformation(init, update, fused, takes_split=takes_split_parameters(last))


def _last_factors(members: Sequence[Any]) -> list[Callable]:
    """Returns the functions for the factors of the last members, as many as only multiply by a number."""
    found: list[Callable] = []
    for tx in reversed(members):
        factor = _factor_of(tx)
        if factor is None:
            break
        found.insert(0, factor)
    return found


def _factor_of(tx: Any) -> Callable | None:
    """Returns the function for the factor of a member, or None if it does something else."""
    if isinstance(tx, ScalingTransformation):
        return tx.factor
    update: Any = getattr(tx, "update", None)
    if not getattr(update, "__module__", "").startswith("optax.") or not getattr(update, "__closure__", None):
        return None
    name = update.__qualname__
    given = dict(zip(update.__code__.co_freevars, (cell.cell_contents for cell in update.__closure__)))
    if name.startswith("clip_by_global_norm.") and given.keys() == {"max_norm"}:
        return clip_by_global_norm(given["max_norm"]).factor
    if name.startswith("scale.") and given.keys() == {"step_size"} and np.ndim(given["step_size"]) == 0:
        return lambda grads, state, scale: (jnp.asarray(given["step_size"], jnp.float32), state)
    return None
