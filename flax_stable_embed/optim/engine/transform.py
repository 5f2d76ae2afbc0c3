"""Turns engines into optax transforms, and adds the path that writes parameters in place.

`tx.update` returns updates, as everywhere in optax. `fused_update(tx, ...)` also applies them. Then no pytree of
updates is ever in memory, and the state is the same bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from ..arguments import broadcast_mask, check_schedules, need_params
from ..fused_update import FusedTransformation, check_members
from ..trees import is_array
from .engine import Engine
from .tail import Tail

Member = tuple[str, optax.GradientTransformation]

# Stateless members of the corresponding optax chain. They keep their place in the state tuple.
STATELESS = optax.identity()
MASKED_STATELESS = optax.GradientTransformation(
    lambda params: optax.MaskedState(optax.EmptyState()), lambda updates, state, params=None: (updates, state)
)


def scale_by(engine: Engine, tail: Tail = Tail()) -> optax.GradientTransformationExtraArgs:
    """Makes the chainable half: the direction, not yet scaled by a learning rate. `tail` may hold schedules."""
    engine.check_overrides(decays=tail.weight_decay is not None)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        need_params(params, tail.needs_params)
        now = tail
        if callable(tail.weight_decay):
            now = now._replace(weight_decay=tail.weight_decay(state.count))
        return engine.step(updates, state, params, tail=now)

    update.__qualname__ = f"scale_by_{engine.method.name}8bit"  # `fused_update` shows this name in its error
    return optax.GradientTransformationExtraArgs(engine.init, update)


def method_member(engine: Engine) -> Member:
    """Names the member that holds the moments. `optimizer` runs its step."""
    step: Any = engine.step
    return "method", optax.GradientTransformation(engine.init, step)


def decay_member(tail: Tail) -> Member:
    """Names the member that stands for weight decay; its state counts the steps of a schedule."""
    return "decay", optax.add_decayed_weights(tail.weight_decay, tail.mask)


def rate_member(learning_rate: optax.ScalarOrSchedule) -> Member:
    """Names the member that stands for the learning rate; its state counts the steps of a schedule."""
    check_schedules(learning_rate=learning_rate)
    return "rate", optax.scale_by_learning_rate(learning_rate)


def optimizer(
    engine: Engine,
    learning_rate: optax.ScalarOrSchedule,
    *,
    tail: Tail = Tail(),
    members: Sequence[Member] | None = None,
) -> FusedTransformation:
    """Joins method, weight decay and learning rate into one optimizer.

    Args:
        engine: The engine of the method.
        learning_rate: A number or a schedule.
        tail: Everything except the step size. Its weight decay may be a schedule, its masks functions of the updates.
        members: The members of the optax optimizer of the same name, as (name, transform) pairs in its order, because
            the state is a tuple in this order. "method" and "rate" must be among them, "decay" may be. All others only
            keep a place in the state. None means the method, then the rate.
    """
    pairs = [method_member(engine), rate_member(learning_rate)] if members is None else list(members)
    by_name = dict(pairs)
    assert len(by_name) == len(pairs), "two members have one name"
    decays = "decay" in by_name
    engine.check_overrides(decays=decays)

    def init(params):
        if all(map(is_array, jax.tree.leaves(params))):  # false for the placeholders of optax.tree.map_params
            broadcast_mask(tail.mask_name, tail.mask, params)
        states = []
        for _, member in pairs:  # a loop, so that a warning finds the caller's line
            states.append(member.init(params))
        return tuple(states)

    def step(grads, state, params, scale=None, *, fused):
        check_members(state, len(pairs))
        need_params(params, fused or decays or tail.needs_params)
        states = dict(zip(by_name, state))
        now = tail._replace(gradient_scale=scale)
        if decays:
            value, states["decay"] = _decay(tail, states["decay"])
            now = now._replace(weight_decay=value)
        rate = states["rate"]
        now = now._replace(step_size=-1 * (learning_rate(rate.count) if callable(learning_rate) else learning_rate))
        out, states["method"] = engine.step(grads, states["method"], params, fused=fused, tail=now)
        _, states["rate"] = by_name["rate"].update((), rate)
        return out, tuple(states.values())

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return step(updates, state, params, fused=False)

    def fused_update(grads, state, params, **extra_args):
        del extra_args
        return step(grads, state, params, fused=True)

    return FusedTransformation(init, update, fused_update, step, takes_split=True)


def _decay(tail: Tail, state: Any) -> tuple[Any, Any]:
    """Returns the weight decay of this step, and the next state of `optax.add_decayed_weights`."""
    if not callable(tail.weight_decay):
        return tail.weight_decay, state
    inner = state if tail.mask is None else state.inner_state
    following = inner._replace(count=optax.safe_increment(inner.count))
    return tail.weight_decay(inner.count), following if tail.mask is None else state._replace(inner_state=following)
