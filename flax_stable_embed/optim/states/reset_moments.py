"""Sets moments back to their first values: for some elements, rows, or entire parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from ...ops.sharding import placed_like
from ..boxes import unbox
from ..storage.moments import in_memory
from ..trees import Params, flatten, is_array, path_name
from .adapt_state import path_at_the_end
from .convert_state import decoded, encoded, place_of, placed
from .named_state import NamedState, listed

Where = Callable[[str], Any] | Sequence[str] | Any


def reset_moments(tx: optax.GradientTransformation, state: Any, params: Params, where: Where) -> Any:
    r"""Sets moments of some elements, rows or parameters to their values before the first step.

    It is for neurons that are recycled (ReDo), for adapters that start again (ReLoRA), for experts, and for pruning.
    8-bit moments of parameters in `where` are decoded and encoded once, with new scales, so that other elements in
    a block with a reset one keep their values to one rounding. All others keep their bits. Sums of gradients
    (`optax.MultiSteps`) are moments too. Step counts and remainders of `fse.split_weights` stay.

    The count stays, so Adam's bias correction no longer corrects moments that start at zero. With a gradient that does
    not change, the k-th step after a reset has $(1 - b_1^k) / \sqrt{1 - b_2^k}$ times the usual length. With the
    default decays that is 3.2 at the first step, and 6.6 at the 12th. Lower the learning rate for some steps, or that
    of the parameter by a rule (`lr_scale`).

    It runs under `jit`, also with masks that are computed there. Every array stays sharded as it is. Arrays without
    an element to reset are those of `state`.

    Args:
        tx: The optimizer that made `state`.
        state: Its state.
        params: The parameters, or their shapes.
        where: What to reset: a pytree of booleans or boolean arrays with the structure of `params`, or a prefix of it.
            An array is broadcast to the parameter from the left, so that a vector with one element per row is a mask of
            rows. Or paths of parameters, each of which stands for everything below it. Or a function from a path to a
            boolean or an array.

    Returns:
        A state like `state`.

    Raises:
        TypeError: `tx` is not an optax transform, or a mask is not boolean.
        ValueError: `state` is not a state of `tx` for `params`; a mask does not fit its parameter; a path is not among
            the parameters.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> tx, params = fse.adam8bit(1e-3), {"kernel": jnp.ones((64, 64))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> dead = jnp.arange(64) < 3  # rows
    >>> state = fse.reset_moments(tx, state, params, {"kernel": dead})
    >>> moments = fse.convert_state(tx, optax.adam(1e-3), params, state)[0].mu["kernel"]
    >>> moments[2:4, 0].round(3)
    Array([0. , 0.1], dtype=float32)
    """
    source = NamedState("tx", tx, params)
    arrays = source.arrays(state)
    shapes = {path_name(path): unbox(x) for path, x in flatten(params) if is_array(x)}
    masks = _masks(where, params, {path: tuple(x.shape) for path, x in shapes.items()})
    first = dict(source.named(tx.init(params)))
    made = dict(arrays)
    for name in source.shapes:
        path = path_at_the_end(name, shapes)
        if path is None or path not in masks or not _is_moment(source, name):
            continue
        names = source.array_names(name)
        values = [in_memory(jnp.asarray(arrays[k]), "device") for k in names]
        starts = [in_memory(jnp.asarray(first[k]), "device") for k in names]
        x, start = (decoded(v, source.moments.get(name)) for v in (values, starts))
        mask = placed_like(jnp.broadcast_to(_from_left(masks[path], x.ndim), x.shape), x)
        new = encoded(jnp.where(mask, start, x), source.moments.get(name), source.expected[name])
        for k, value in zip(names, new):
            made[k] = placed(value.astype(arrays[k].dtype), *place_of(jnp.asarray(arrays[k])))
    return jax.tree.structure(source.state).unflatten(made[name] for name in source.expected)


def _is_moment(source: NamedState, name: str) -> bool:
    """Returns whether a value of a parameter is a moment or a sum, and not a remainder or a record of rows."""
    is_number = jnp.issubdtype(source.expected[name].dtype, jnp.inexact) or name in source.moments
    return is_number and name not in source.remainders and name not in source.counts


def _masks(where: Where, params: Params, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Returns a boolean array for the path of every parameter that has elements to reset."""
    if callable(where):
        found = {path: where(path) for path in shapes}
    elif isinstance(where, str) or (isinstance(where, list | tuple) and all(isinstance(x, str) for x in where)):
        tops = [where] if isinstance(where, str) else where
        for top in tops:
            if not any(path == top or path.startswith(f"{top}/") for path in shapes):
                raise ValueError(f"`where` names {top!r}, but the paths are {listed(sorted(shapes))}.")
        found = {path: any(path == top or path.startswith(f"{top}/") for top in tops) for path in shapes}
    else:
        try:
            spread = jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), where, params)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "`where` must be a pytree of masks like the parameters or a prefix of it, paths, or a function of a "
                f"path: {error}"
            ) from None
        found = {path_name(path): unbox(m) for path, m in flatten(spread)}
    masks = {}
    for path, mask in found.items():
        if path not in shapes:  # None in the place of a parameter
            continue
        if not hasattr(mask, "dtype") and not isinstance(mask, bool):
            raise TypeError(f"`where` must have booleans or boolean arrays, got {mask!r:.60} for {path!r}.")
        mask = mask if isinstance(mask, Tracer | Array) else jnp.asarray(mask)
        if mask.dtype != jnp.bool_:
            raise TypeError(f"`where` must have booleans or boolean arrays, got {mask.dtype} for {path!r}.")
        shape = shapes[path]
        fits = mask.ndim <= len(shape) and all(n in (1, m) for n, m in zip(mask.shape, shape))
        if not fits:
            raise ValueError(
                f"`where` has a mask of shape {mask.shape} for {path!r}, which has shape {shape}. A mask is broadcast "
                "from the left: a vector is a mask of rows."
            )
        if isinstance(mask, Tracer) or bool(jnp.any(mask)):
            masks[path] = mask
    return masks


def _from_left(mask: Array, ndim: int) -> Array:
    return mask.reshape(*mask.shape, *[1] * (ndim - mask.ndim))
