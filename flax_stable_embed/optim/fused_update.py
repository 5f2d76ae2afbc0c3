"""Transforms that can write the parameters themselves: fused_update and chain."""

from collections.abc import Callable
from typing import Any, TypeGuard

import optax

from .arguments import kind_of


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transform that can write the parameters itself: `fused_update(grads, state, params, **extra_args)`."""

    fused_update: Callable

    def __new__(cls, init, update, fused_update=None):
        """A pair `(init, update)`, as optax unpacks it, with `fused_update` beside it.

        To JAX it is a tree of two functions: one that was taken apart and put together has lost the third.
        """
        self = super().__new__(cls, init, update)
        if fused_update is not None:
            self.fused_update = fused_update
        return self

    def __getnewargs__(self):
        """What a copy is made from."""
        return (*self, getattr(self, "fused_update", None))


def check_members(state: Any, n: int) -> None:
    if not isinstance(state, tuple) or len(state) != n:
        raise TypeError(
            f"`state` must be a tuple of {n}, as `init` makes it, got {kind_of(state)}. The order is update(grads, "
            "state, params); `fse.convert_state` converts the state of another optimizer."
        )


def is_fused(tx: Any) -> TypeGuard[FusedTransformation]:
    """Whether a transform can write the parameters itself."""
    return isinstance(tx, FusedTransformation) and hasattr(tx, "fused_update")


def fused_update(
    tx: optax.GradientTransformation, grads: Any, state: Any, params: Any, **extra_args
) -> tuple[Any, Any]:
    """One step that writes the parameters: `(params, state)`, with no tree of updates in between.

    The state is the same tree with the same bits as `tx.update` gives; float32 parameters agree within 1 ulp of the
    largest of |parameter|, |update| and |their sum|; bfloat16 parameters are rounded once here, twice by
    `optax.apply_updates`.
    Under `jit`, donate parameters and state, and take them in the order in which they are returned, parameters first:
    JAX pairs donated with returned arrays of the same shape and dtype one by one, and where a moment's memory is given
    to a parameter, XLA must copy both. Optimizers that need norms of whole parameters (LAMB, LARS) hold their
    directions meanwhile, as `update` does.

    Args:
        tx: an `*8bit` optimizer of this library, `fse.stochastic_round_updates` of any optimizer, or `fse.chain(...,
            one of them)`.
        grads: the gradients, a tree like `params`.
        state: from `tx.init(params)`.
        params: the parameters.
        **extra_args: passed on to the members of a chain.

    Raises:
        TypeError: `tx` hides its optimizer, as optax's wrappers do.

    >>> import functools, jax, jax.numpy as jnp, flax_stable_embed as fse
    >>> tx, params = fse.adamw8bit(0.5, weight_decay=0.0), {"kernel": jnp.ones((64, 64))}
    >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
    ... def step(params, state, grads):
    ...     return fse.fused_update(tx, grads, state, params)
    >>> params, state = step(params, tx.init(params), {"kernel": jnp.ones((64, 64))})
    >>> round(float(params["kernel"][0, 0]), 4)
    0.5
    """
    if not is_fused(tx):
        name = getattr(getattr(tx, "update", tx), "__qualname__", repr(tx)).split(".<locals>")[0]
        raise TypeError(
            f"`tx` must be an 8-bit optimizer or `fse.chain(..., one)`, but {name!r} hides what is in it, and only the "
            "optimizer itself can write parameters. Use tx.update and optax.apply_updates with it, or fse.chain for "
            "optax.chain."
        )
    return tx.fused_update(grads, state, params, **extra_args)


def chain(*transforms: optax.GradientTransformation) -> FusedTransformation:
    """`optax.chain` whose last member is an `*8bit` optimizer, and which keeps that one's `fused_update`.

    Raises:
        TypeError: the last member cannot be fused.

    >>> import flax_stable_embed as fse
    >>> tx = chain(optax.clip_by_global_norm(1.0), fse.adamw8bit(1e-3))
    """
    if not transforms or not is_fused(transforms[-1]):
        raise TypeError(
            f"the last member of `chain` must be an 8-bit optimizer of this library, got {transforms[-1:]}. "
            "For other chains use optax.chain."
        )
    last = transforms[-1]
    prefixes = [optax.with_extra_args_support(tx) for tx in transforms[:-1]]
    whole = optax.chain(*transforms)

    def fused(grads, state, params, **extra_args):
        check_members(state, len(transforms))
        states = []
        for tx, one in zip(prefixes, state):
            grads, one = tx.update(grads, one, params, **extra_args)
            states.append(one)
        params, one = last.fused_update(grads, state[-1], params, **extra_args)
        return params, (*states, one)

    return FusedTransformation(whole.init, whole.update, fused)
