"""Engines as optax transforms, and the path on which the parameters are written in place.

`tx.update` returns updates, as everywhere in optax. `fused_update(tx, ...)` applies them as well: no tree of updates is
ever in memory, and the state is the same to the last bit.
"""

from typing import Any

import jax
import optax

from ..arguments import _need_params, broadcast_mask, check_schedules
from ..fused_update import FusedTransformation, _check_members
from ..trees import is_array
from .engine import Engine
from .tail import Tail


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
