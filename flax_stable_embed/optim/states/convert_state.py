"""Converts the state of one optimizer into a state of another: with other codecs, blocks or rules, or into optax's own.

`named_state.py` reads both states as named values, in which a moment is one float32 value, however it is stored.
`pairing.py` finds the value of the source for each value of the target. Then every value is stored as the target stores
it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from ...ops.split_weights import convert_remainder
from ..engine.records import StoredMoment
from ..storage.moments import dequantize_moment, in_memory, is_codes, memory_of, quantize_moment
from ..trees import Params
from .named_state import NamedState
from .pairing import pair


def convert_state(
    tx_from: optax.GradientTransformation,
    tx_to: optax.GradientTransformation,
    params: Params,
    state: Any,
    *,
    allow_reset: Sequence[str] = (),
) -> Any:
    """Converts a state of `tx_from` into a state of `tx_to`, so that a run can continue with another optimizer.

    It converts between an optimizer of optax and the one of this library with the same name, in both directions;
    between codecs, roundings, block sizes and rules; and between a transform and `quantize_state` of it. The optimizers
    may be inside chain, masked, partition, MultiSteps or inject_hyperparams.

    Codes are copied if both optimizers store them in the same way. Otherwise a moment is decoded to float32 and stored
    with rounding to nearest. From 8 bits to float32 and back, every code stays the same, with one exception: with the
    `dynamic` codec, the largest element of a block loses 0.7% each time it is stored, if it is negative. "rowwise"
    stores the mean of each row. Decoded, every element of the row has that mean. The second moment of centered RMSprop
    is raised to the square of the mean where rounding has made it smaller, because optax would compute NaN.

    Remainders of `fse.split_weights` keep the weights, to the bits that they have room for. They are zero where the
    source has none, because the bfloat16 parameters are then all that is known. To continue a float32 run, use
    `fse.from_master_weights`. To leave `split_weights`, take `fse.master_weights` and allow to reset "remainder".

    A step count of moments is taken from the count of the same moments. Any other count, such as the count of a
    schedule, is taken from the nearest one of its kind. A count on which only random bits depend may start at 0. A
    count that the target does not have is dropped. Nothing else is dropped or reset, unless `allow_reset` names it.

    Values of the same name must mean the same, and a state does not always tell. `nu` is a maximum of magnitudes in
    Adamax, but an average of squares in Adam: there is no error. A trace of gradients (SGD) and a trace of steps (LARS,
    RMSprop) are told apart in the optimizers of optax and of this library, but not in a chain of your own.

    It runs under `jit`. The result shares no memory with `state`. Every array is sharded as `tx_to.init(params)` shards
    it. Under `jit` and a mesh with Auto axes, the compiler chooses.

    Args:
        tx_from: The optimizer that made `state`.
        tx_to: The optimizer that the run continues with.
        params: The parameters, or their shapes.
        state: A state as `tx_from.init(params)` makes it. Dicts and lists in place of its tuples, as in a checkpoint,
            are allowed.
        allow_reset: Names of fields, such as "nu" or "acc_grads". They start again if only the target has them, and
            are dropped if only the source has them. If all moments of an optimizer start again, so does their count. If
            only some do, the count continues, and the bias correction of the moments that start again is too small.
            With "count" in the list the count starts again too, and the bias correction of the other moments is too
            large. "count" also allows to merge several counts into one, which is the largest of them.

    Returns:
        A state with the structure of `tx_to.init(params)`. With `nnx.Optimizer`: pass `nnx.as_pure` (`nnx.pure` before
        Flax 0.12.7) of the parameters and of `opt_state`, then call `nnx.update(new.opt_state, nnx.state(returned))`.

    Raises:
        ValueError: Before any work: `state` is not a state of `tx_from`; a value exists only in the source or only in
            the target; a trace sums other terms in the target; or moments with different step counts would get a single
            count. (Under `jit`, where counts are not known, the first of them is taken.)

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"embedding": jnp.ones((512, 64)), "kernel": jnp.ones((64, 512))}
    >>> before, after = optax.adamw(1e-3), fse.adamw8bit(1e-3)
    >>> state = before.init(params)  # and many steps
    >>> state = fse.convert_state(before, after, params, state)
    >>> {name: str(x.dtype) for name, x in state[0].mu.items()}
    {'embedding': 'float32', 'kernel': 'int8'}
    """
    source, target = NamedState("tx_from", tx_from, params), NamedState("tx_to", tx_to, params)
    arrays = source.arrays(state)
    pairs = pair(source, target, arrays, (allow_reset,) if isinstance(allow_reset, str) else allow_reset)
    made = dict(target.named(tx_to.init(params)))
    places = {name: place_of(x) for name, x in made.items()}
    for name in pairs:  # free the memory of arrays that are replaced below
        for replaced in target.array_names(name):
            made.pop(replaced)
    right = source.is_right(arrays)

    def stored(name: str) -> list[Array]:
        return [in_memory(jnp.asarray(arrays[k]), "device") for k in source.array_names(name)]

    for name, origin in pairs.items():
        values = stored(origin)
        if not same_codes(source.moments.get(origin), target.moments.get(name)):
            x = decoded(values, source.moments.get(origin))
            if (mean := source.means.get(origin)) is not None and not is_codes(target.expected[name].dtype):
                # Rounded moments need not satisfy nu >= mu^2, and the root of a negative variance is NaN.
                x = jnp.maximum(x, jnp.square(decoded(stored(mean), source.moments.get(mean))) * (1 + 2.0**-20))
            if name in target.remainders:
                x = convert_remainder(x, target.expected[name].dtype)
            values = encoded(x, target.moments.get(name), target.expected[name])
        for k, x in zip(target.array_names(name), values):
            dtype = target.expected[k].dtype
            x = x if x.dtype == dtype else x.astype(dtype)
            x = _unless_wrong(right, x, jnp.nan) if jnp.issubdtype(dtype, jnp.inexact) else x
            made[k] = placed(x, *places[k])
    for name in target.formats:
        made[name] = _unless_wrong(right, made[name], 255)
    return jax.tree.structure(target.state).unflatten(made[name] for name in target.expected)


def _unless_wrong(right: bool | Array, x: Array, wrong: float) -> Array:
    """Returns an array of the result. Under `jit` a wrong state cannot raise, so the result cannot train."""
    return x if right is True else jnp.where(right, x, wrong)


def same_codes(a: StoredMoment | None, b: StoredMoment | None, shift: int = 0) -> bool:
    """Returns whether both store a moment as the same codes. `b` may have more axes in front, by `shift`."""
    if a is None or b is None or a.moment is None or b.moment is None or a.blocks is None:
        return False
    moved = a.blocks._replace(axis=a.blocks.axis + shift)
    return (a.moment.signed, a.moment.codec, moved) == (b.moment.signed, b.moment.codec, b.blocks)


def decoded(values: list[Array], stored: StoredMoment | None) -> Array:
    """Returns a value from the arrays that store it."""
    if stored is None:
        return values[0]
    if stored.moment is not None and stored.blocks is not None:
        codes, scales = values
        return dequantize_moment(codes, scales, stored.moment, stored.blocks)
    return jnp.broadcast_to(values[0], stored.shape)  # "rowwise": one value per row


def encoded(x: Array, stored: StoredMoment | None, want: Any) -> tuple[Array, ...]:
    """Returns the arrays that store a value. `want` has the shape and dtype of the first one."""
    if stored is not None and stored.moment is not None and stored.blocks is not None:
        return quantize_moment(x.astype(jnp.float32), stored.moment, stored.blocks)
    if x.shape != want.shape:  # "rowwise"
        x = jnp.mean(x, axis=-1, keepdims=True)
    return (x if x.dtype == want.dtype else x.astype(want.dtype),)


def place_of(x: Array) -> tuple[Any, str]:
    """Returns the sharding and the memory of an array.

    The sharding is None if the array is not committed to devices, like counts that `init` makes.
    """
    if isinstance(x, Tracer):
        return jax.typeof(x).sharding, memory_of(x)
    return x.sharding if x.committed else None, memory_of(x)


def placed(x: Array, sharding: Any, memory_kind: str) -> Array:
    """Puts an array on the devices and into the memory of the array that it replaces."""
    if not isinstance(x, Tracer):
        return jax.device_put(x, sharding, may_alias=False)  # a count that is taken twice could not be donated
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return in_memory(jax.sharding.reshard(x, sharding) if explicit else x, memory_kind)
