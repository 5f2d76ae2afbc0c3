"""Engines as optax transforms, and the path on which the parameters are written in place.

`tx.update` returns updates, as everywhere in optax. `fused_update(tx, ...)` applies them as well: no tree of updates is
ever in memory, and the state is the same to the last bit.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import optax

from ._engine import Engine, Tail, broadcast_mask
from ._method import check_schedules
from ._state_checks import kind_of
from ._storage import is_array


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


def scale_by(engine: Engine, tail: Tail = Tail()) -> optax.GradientTransformationExtraArgs:
    """The chainable half: the method's direction, not yet scaled by a learning rate. `tail` may hold schedules."""
    engine.check_overrides(decays=tail.weight_decay is not None)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _need_params(params, tail.needs_params)
        now = tail
        if callable(tail.weight_decay):
            now = now._replace(weight_decay=tail.weight_decay(state.count))
        return engine.step(updates, state, params, tail=_with_masks(now, updates))

    update.__qualname__ = f"scale_by_{engine.method.name}8bit"  # what `fused_update` calls it in its error
    return optax.GradientTransformationExtraArgs(engine.init, update)


# Members of optax's namesakes that keep nothing, and whose place in the state is kept.
KEEPS_NOTHING = optax.identity()
MASKED_KEEPS_NOTHING = optax.GradientTransformation(
    lambda params: optax.MaskedState(optax.EmptyState()), lambda updates, state, params=None: (updates, state)
)


def optimizer(
    engine: Engine,
    learning_rate: optax.ScalarOrSchedule,
    *,
    tail: Tail = Tail(),
    members: tuple[str | optax.GradientTransformation, ...] = ("method", "rate"),
) -> FusedTransformation:
    """Method, weight decay and learning rate as one optimizer.

    Args:
        engine: the method's.
        learning_rate: a number or a schedule.
        tail: everything but the step size; its weight decay may be a schedule, its masks functions of the updates.
        members: the state's order, which is that of the members of optax's namesake: "method", "decay", "rate", or a
            transform whose state only holds a place.
    """
    check_schedules(learning_rate=learning_rate)
    decay_tx = optax.add_decayed_weights(tail.weight_decay, tail.mask) if "decay" in members else None
    rate_tx = optax.scale_by_learning_rate(learning_rate)
    engine.check_overrides(decays=decay_tx is not None)
    inits: list[Any] = [
        {"method": engine.init, "decay": decay_tx and decay_tx.init, "rate": rate_tx.init}[m]
        if isinstance(m, str)
        else m.init
        for m in members
    ]

    def init(params):
        if all(map(is_array, jax.tree.leaves(params))):  # and not what stands for them in optax.tree.map_params
            broadcast_mask(tail.mask_name, _with_masks(tail, params).mask, params)
        states = []
        for one in inits:  # a loop, so that a warning finds the caller's line
            states.append(one(params))
        return tuple(states)

    def step(fused, grads, state, params):
        _check_members(state, len(members))
        _need_params(params, fused or decay_tx is not None or tail.needs_params)
        states = dict(zip(members, state))
        now = tail
        if decay_tx is not None:
            value, states["decay"] = _decay(tail.weight_decay, tail.mask, states["decay"])
            now = now._replace(weight_decay=value)
        rate = states["rate"]
        now = now._replace(step_size=-1 * (learning_rate(rate.count) if callable(learning_rate) else learning_rate))
        out, states["method"] = engine.step(grads, states["method"], params, fused=fused, tail=_with_masks(now, grads))
        _, states["rate"] = rate_tx.update((), rate)
        return out, tuple(states.values())

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return step(False, updates, state, params)

    def fused(grads, state, params, **extra_args):
        del extra_args
        return step(True, grads, state, params)

    return FusedTransformation(init, update, fused)


def _check_members(state: Any, n: int) -> None:
    if not isinstance(state, tuple) or len(state) != n:
        raise TypeError(
            f"`state` must be a tuple of {n}, as `init` makes it, got {kind_of(state)}. The order is update(grads, "
            "state, params); `fse.convert_state` converts the state of another optimizer."
        )


def _need_params(params: Any, needed: bool) -> None:
    if params is None and needed:
        raise ValueError("this optimizer needs `params`: call `update(grads, state, params)`; got None.")


def _with_masks(tail: Tail, grads: Any) -> Tail:
    """Masks that are functions of the updates, called."""
    masks = (m(grads) if callable(m) else m for m in (tail.mask, tail.gradient_mask))
    return tail._replace(**dict(zip(("mask", "gradient_mask"), masks)))


def _decay(weight_decay, mask, state):
    """The weight decay of this step, and the next state of `optax.add_decayed_weights`."""
    if not callable(weight_decay):
        return weight_decay, state
    inner = state if mask is None else state.inner_state
    following = inner._replace(count=optax.safe_increment(inner.count))
    return weight_decay(inner.count), following if mask is None else state._replace(inner_state=following)


def check_transform(tx: Any) -> None:
    """Raises where `tx` is not used as an optax transform. (optax.MultiSteps is, but no GradientTransformation.)"""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"`tx` must be an optax transform, got {tx!r}.")


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
        _check_members(state, len(transforms))
        states = []
        for tx, one in zip(prefixes, state):
            grads, one = tx.update(grads, one, params, **extra_args)
            states.append(one)
        params, one = last.fused_update(grads, state[-1], params, **extra_args)
        return params, (*states, one)

    return FusedTransformation(whole.init, whole.update, fused)
