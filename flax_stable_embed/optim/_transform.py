"""Engines as optax transforms, and the path on which the parameters are written in place.

`tx.update` returns updates, as everywhere in optax. `fused_update(tx, ...)` applies them as well: no tree of updates is
ever in memory, and the state is the same to the last bit.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import optax

from ._engine import Engine, Tail


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


def scale_by(engine: Engine) -> optax.GradientTransformationExtraArgs:
    """The chainable half: the method's direction, neither scaled nor decayed."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return engine.step(updates, state, params)

    update.__qualname__ = f"scale_by_{engine.method.rule.__name__}8bit"  # what `fused_update` calls it in its error
    return optax.GradientTransformationExtraArgs(engine.init, update)


def optimizer(
    engine: Engine,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: Any = None,
) -> FusedTransformation:
    """Method, decoupled weight decay (None for an optimizer without), learning rate; state as of optax's namesake."""
    decay_tx = None if weight_decay is None else optax.add_decayed_weights(weight_decay, mask)
    rate_tx = optax.scale_by_learning_rate(learning_rate)

    def init(params):
        tail = () if decay_tx is None else (decay_tx.init(params),)
        return (engine.init(params), *tail, rate_tx.init(params))

    def step(fused, grads, state, params):
        core, *decay, rate = state
        if params is None and (fused or decay):
            raise ValueError("this optimizer needs `params`: call `update(grads, state, params)`; got None.")
        tail = Tail(step_size=-1 * (learning_rate(rate.count) if callable(learning_rate) else learning_rate))
        if decay:
            value, decay = _decay(weight_decay, mask, decay[0])
            active = None if isinstance(value, int | float) and value == 0 else value
            tail = tail._replace(weight_decay=active, mask=mask(grads) if callable(mask) else mask)
        out, core = engine.step(grads, core, params, fused=fused, tail=tail)
        _, rate = rate_tx.update((), rate)
        return out, (core, *decay, rate)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return step(False, updates, state, params)

    def fused(grads, state, params, **extra_args):
        del extra_args
        return step(True, grads, state, params)

    return FusedTransformation(init, update, fused)


def _decay(weight_decay, mask, state):
    """The weight decay of this step, and the next state of `optax.add_decayed_weights`."""
    if not callable(weight_decay):
        return weight_decay, (state,)
    inner = state if mask is None else state.inner_state
    following = inner._replace(count=optax.safe_increment(inner.count))
    return weight_decay(inner.count), (following if mask is None else state._replace(inner_state=following),)


def _is_fused(tx: Any) -> TypeGuard[FusedTransformation]:
    return isinstance(tx, FusedTransformation) and hasattr(tx, "fused_update")


def fused_update(
    tx: optax.GradientTransformation, grads: Any, state: Any, params: Any, **extra_args
) -> tuple[Any, Any]:
    """One step that writes the parameters: `(params, state)`, with no tree of updates in between.

    The state is the same tree with the same bits as `tx.update` gives; float32 parameters agree within 1 ulp of the
    largest of |parameter|, |update| and |their sum|; bfloat16 parameters are rounded once here, twice by
    `optax.apply_updates`.
    Under `jit`, donate `state` and `params`.

    Args:
        tx: an `*8bit` optimizer of this library, or `fse.chain(..., one of them)`.
        grads: the gradients, a tree like `params`.
        state: from `tx.init(params)`.
        params: the parameters.
        **extra_args: passed on to the members of a chain.

    Raises:
        TypeError: `tx` hides its optimizer, as optax's wrappers do.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx, params = fse.adamw8bit(0.5, weight_decay=0.0), {"kernel": jnp.ones((64, 64))}
    >>> params, state = fse.fused_update(tx, params, tx.init(params), params)
    >>> round(float(params["kernel"][0, 0]), 4)
    0.5
    """
    if not _is_fused(tx):
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
    if not transforms or not _is_fused(transforms[-1]):
        raise TypeError(
            f"the last member of `chain` must be an 8-bit optimizer of this library, got {transforms[-1:]}. "
            "For other chains use optax.chain."
        )
    last = transforms[-1]
    prefixes = [optax.with_extra_args_support(tx) for tx in transforms[:-1]]
    whole = optax.chain(*transforms)

    def fused(grads, state, params, **extra_args):
        states = []
        for tx, one in zip(prefixes, state):
            grads, one = tx.update(grads, one, params, **extra_args)
            states.append(one)
        params, one = last.fused_update(grads, state[-1], params, **extra_args)
        return params, (*states, one)

    return FusedTransformation(whole.init, whole.update, fused)
