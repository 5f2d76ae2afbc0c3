"""Updates parameters in place: `fused_update`, and the two kinds of transforms that `fse.chain` knows."""

from collections.abc import Callable
from typing import Any, TypeGuard

import optax

from .arguments import kind_of
from .trees import Params, Updates


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transform that also has `fused_update(grads, state, params, **extra_args) -> (params, state)`.

    Some also have `scaled_step(grads, state, params, scale, *, fused)`, a step on `scale * grads`. It does not write
    the product to memory, because the kernels multiply. It returns what `update` does, or `fused_update` if `fused`.

    If `takes_split`, then `update`, `fused_update` and `scaled_step` take a `SplitParameter` in the place of a
    parameter, and return the new one.
    """

    fused_update: Callable
    scaled_step: Callable
    takes_split: bool

    def __new__(cls, init, update, fused_update=None, scaled_step=None, *, takes_split=False):
        """Makes the pair `(init, update)`, which optax unpacks, with `fused_update` as an attribute.

        To JAX it is a pytree of two functions. If it is flattened and unflattened, it loses the attribute.
        """
        self = super().__new__(cls, init, update)
        if fused_update is not None:
            self.fused_update = fused_update
        if scaled_step is not None:
            self.scaled_step = scaled_step
        self.takes_split = takes_split
        return self

    def __getnewargs_ex__(self):
        """Returns the arguments from which `copy` makes a copy."""
        functions = (*self, getattr(self, "fused_update", None), getattr(self, "scaled_step", None))
        return functions, {"takes_split": takes_split_parameters(self)}


class ScalingTransformation(optax.GradientTransformationExtraArgs):
    """An optax transform that multiplies all gradients by one number.

    `factor(grads, state, scale)` returns that number for the gradients `scale * grads`, and the next state. So
    `fse.chain` can give the number to the optimizer instead of writing the product to memory.
    """

    factor: Callable

    def __new__(cls, init, update, factor):
        """Makes the pair `(init, update)`, which optax unpacks, with `factor` as an attribute."""
        self = super().__new__(cls, init, update)
        self.factor = factor
        return self

    def __getnewargs__(self):
        """Returns the arguments from which `copy` makes a copy."""
        return (*self, self.factor)


def check_members(state: Any, n: int) -> None:
    """Raises unless the state of a chain is a tuple of `n` states."""
    if not isinstance(state, tuple) or len(state) != n:
        raise TypeError(
            f"`state` must be a tuple of {n}, as `init` makes it, got {kind_of(state)}. The order is update(grads, "
            "state, params); `fse.convert_state` converts the state of another optimizer."
        )


def is_fused(tx: Any) -> TypeGuard[FusedTransformation]:
    """Returns whether a transform can update the parameters in place."""
    return isinstance(tx, FusedTransformation) and hasattr(tx, "fused_update")


def takes_split_parameters(tx: Any) -> bool:
    """Returns whether the `fused_update` of a transform takes split parameters."""
    return is_fused(tx) and getattr(tx, "takes_split", False)


def name_of(tx: Any) -> str:
    """Returns the name of the function that made a transform, for an error message."""
    return getattr(getattr(tx, "update", tx), "__qualname__", repr(tx)).split(".<locals>")[0]


def fused_update(
    tx: optax.GradientTransformation, grads: Updates, state: Any, params: Params, **extra_args
) -> tuple[Any, Any]:
    """Runs one step and returns the new `(params, state)`, without a pytree of updates in memory.

    The state has the same structure and the same bits as the state that `tx.update` returns. float32 parameters agree
    with `optax.apply_updates` within 1 ulp of the largest of |parameter|, |update| and |their sum|. bfloat16 parameters
    are rounded once here, but twice with `optax.apply_updates`.

    Under `jit`, donate parameters and state. Let your function take them in the order in which it returns them,
    parameters first. JAX pairs donated and returned arrays of the same shape and dtype in their order, and if the
    memory of a moment goes to a parameter, XLA must copy both. Optimizers that need the norm of a full parameter (LAMB,
    LARS) keep their directions in memory until the norm is known, as `update` does.

    Args:
        tx: An `*8bit` optimizer of this library, `fse.stochastic_round_updates` of any optimizer, or `fse.chain(...)`
            with one of them as its last member.
        grads: The gradients, a pytree like `params`.
        state: The state from `tx.init(params)`, or from the step before.
        params: The parameters.
        **extra_args: Passed on to the members of a chain.

    Returns:
        The new parameters and the new state.

    Raises:
        TypeError: `tx` is not such a transform, because a wrapper of optax hides it, for example.

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
        raise TypeError(
            f"`tx` must be an 8-bit optimizer or `fse.chain(..., one)`, but {name_of(tx)!r} hides what is in it, and "
            "only the optimizer itself can update parameters in place. Use fse.chain instead of optax.chain, or "
            "tx.update and optax.apply_updates."
        )
    return tx.fused_update(grads, state, params, **extra_args)
