r"""Updates parameters in place through `optax.apply_updates`, for code that has no other way to apply updates.

    p', m' = fused_update(tx, g, m, p);   u holds p';   p + u = p'

`optax.apply_updates` computes `p + u`. Here `u` is an object that holds the new parameter, and `p + u` returns it. So
no array of updates exists, and nothing is added. The object is a pytree whose arrays are sealed: only `p + u` can
compute with them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.tree_util import GetAttrKey

from ...ops.sealed import is_sealed, seal, sealed_type, words_of
from ...ops.sharding import placed_like
from ..arguments import check_transform
from ..derivatives import refuse_derivative
from ..fused_update import FusedTransformation, fused_update, is_fused, name_of
from ..trees import is_none

_ADVICE = (
    "An update of fse.in_place holds a new parameter, and only optax.apply_updates can use it. Put transforms that "
    "change updates before it: fse.in_place(fse.chain(transform, tx))."
)

_NO_DERIVATIVE = (
    "A derivative reaches an update of fse.in_place that has passed through jax.jit, jax.checkpoint, jax.lax.cond, "
    "jax.tree.map or the like, where it would become zero. To differentiate through a step, use the optimizer without "
    "fse.in_place, or call optax.apply_updates in the function that calls `update`."
)


_SEALED = {
    words: sealed_type(
        f"fse_new_parameter_{words}",
        words=words,
        tag="update of fse.in_place, only for optax.apply_updates",
        error=_ADVICE,
    )
    for words in (1, 2, 4)
}


def _sealed(x: Array) -> Array:
    """Returns an array in a sealed dtype, bit for bit. XLA compiles this and `_unsealed` to nothing."""
    if jnp.iscomplexobj(x):
        parts = jnp.stack([x.real, x.imag], axis=-1)
        words = lax.bitcast_convert_type(parts, jnp.uint32).reshape(*x.shape, x.dtype.itemsize // 4)
    elif x.dtype.itemsize == 8:
        words = lax.bitcast_convert_type(x, jnp.uint32)
    elif x.dtype == jnp.bool_:
        words = x.astype(jnp.uint32)[..., None]
    else:
        bits = lax.bitcast_convert_type(x, f"uint{_bits(x.dtype)}")
        words = bits.astype(jnp.uint32)[..., None]
    return seal(words, _SEALED[words.shape[-1]])


def _unsealed(sealed: Array, dtype: np.dtype) -> Array:
    """Returns the array that was sealed."""
    words = words_of(sealed)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real = np.finfo(dtype).dtype
        parts = words if real.itemsize == 4 else words.reshape(*words.shape[:-1], 2, 2)
        parts = lax.bitcast_convert_type(parts, real)
        return lax.complex(parts[..., 0], parts[..., 1])
    if dtype.itemsize == 8:
        return lax.bitcast_convert_type(words, dtype)
    if dtype == jnp.bool_:
        return words[..., 0].astype(dtype)
    return lax.bitcast_convert_type(words[..., 0].astype(f"uint{_bits(dtype)}"), dtype)


def _bits(dtype: np.dtype) -> int:
    """Returns the bits of one number: 4 for int4, whose elements take a byte each."""
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


@jax.tree_util.register_pytree_with_keys_class
class InPlaceUpdate:
    """Stands for the update of one parameter: `p + update` is the new parameter.

    Zeros of it, as `jax.tree.map(jnp.zeros_like, updates)` makes them, mean no update. So a `jnp.where` or a `lax.cond`
    with such zeros keeps the parameter bit for bit. Everything else that computes with its arrays raises an error.

    As a pytree it is two sealed arrays: `new`, and `is_update`, which has one element and the rank of the parameter. So
    `jax.vmap` and `jax.lax.scan` stack both along the same axis, and the members of a batch can differ in `is_update`.

    Attributes:
        dtype: The dtype of the parameter.
    """

    __array_ufunc__ = None  # NumPy's arrays leave `p + update` to `__radd__`

    def __init__(self, old: Array, new: Array):
        self.dtype = np.dtype(new.dtype)
        self._old, self._new = old, new
        self._leaves: tuple[Any, ...] | None = None  # once it was flattened: the sealed arrays

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the parameter."""
        return (self._new if self._leaves is None else self._leaves[0]).shape

    def tree_flatten(self):
        if self._leaves is None:
            new = refuse_derivative(self._new, _NO_DERIVATIVE)
            return (_sealed(new), _sealed(jnp.ones([1] * new.ndim, jnp.uint32))), self.dtype
        return self._leaves, self.dtype

    def tree_flatten_with_keys(self):
        (new, is_update), dtype = self.tree_flatten()
        return ((GetAttrKey("new"), new), (GetAttrKey("is_update"), is_update)), dtype

    @classmethod
    def tree_unflatten(cls, dtype, leaves):
        made = object.__new__(cls)
        made.dtype, made._old, made._new, made._leaves = dtype, None, None, tuple(leaves)
        return made

    def __repr__(self) -> str:
        return f"InPlaceUpdate({self.dtype}{list(getattr(self, 'shape', ('?',)))}, for optax.apply_updates)"

    def __radd__(self, p: Any) -> Any:
        """Returns the new parameter.

        Raises:
            ValueError: `p` is not the parameter that was updated.
            TypeError: The arrays of the update were changed.
        """
        if self._leaves is None:
            if p is not self._old:
                raise ValueError(
                    "optax.apply_updates got other parameters than the `update` of fse.in_place. Pass the very "
                    f"parameters that `update` got. (This one has the shape {np.shape(p)}, the update {self.shape}.) "
                    "A wrapper that keeps parameters of its own, such as optax.contrib.schedule_free, needs the "
                    "optimizer without fse.in_place."
                )
            return self._new
        new, is_update = self._leaves
        if not all(map(is_sealed, (new, is_update))):
            raise TypeError(_ADVICE)
        if (new.shape, self.dtype) != (np.shape(p), jnp.result_type(p)):
            raise ValueError(
                f"optax.apply_updates got a parameter {jnp.result_type(p)}{list(np.shape(p))} for an update of "
                f"fse.in_place of {self.dtype}{list(new.shape)}. Pass the very parameters that `update` got."
            )
        aligned = is_update.ndim == new.ndim and all(n in (1, d) for n, d in zip(is_update.shape, new.shape))
        if is_update.size != 1 and not aligned:  # parts of updates were joined along an axis of the parameter
            raise TypeError(_ADVICE)
        keeps, p = _unsealed(is_update, np.dtype(np.uint32)) == 0, jnp.asarray(p)
        if keeps.size != 1:  # on a mesh with Explicit axes, JAX wants three arrays of one sharding
            keeps = placed_like(jnp.broadcast_to(keeps, p.shape), p)
        return jnp.where(keeps, refuse_derivative(p, _NO_DERIVATIVE), _unsealed(new, self.dtype))

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(_ADVICE)

    __add__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = __abs__ = _refuse
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __array__ = __getitem__ = astype = _refuse


def in_place(tx: optax.GradientTransformation) -> FusedTransformation:
    r"""Wraps an optimizer so that `optax.apply_updates` writes its parameters in place, as `fse.fused_update` does.

    $$p', m' = \mathrm{fused\_update}(\mathrm{tx}, g, m, p), \quad p + u = p' \text{ for the update } u$$

    Use it where you cannot call `fse.fused_update` yourself: `TrainState`, `nnx.Optimizer`, and frameworks that call
    `tx.update` and `optax.apply_updates`. The compiled step then reads and writes each parameter once, and no update is
    in memory. Parameters and state have the same bits as with `fse.fused_update`.

    Put it around everything that changes gradients or updates: `fse.in_place(fse.chain(clip, tx))`. `optax.chain`,
    `optax.masked`, `optax.partition` and `optax.inject_hyperparams` may be around it:
    `optax.inject_hyperparams(lambda learning_rate: fse.in_place(fse.adamw8bit(learning_rate)))`. Transforms that
    compute with updates, such as `optax.scale`, `optax.global_norm` of updates or `optax.MultiSteps`, may not.
    Zeros made from updates, `jax.tree.map(jnp.zeros_like, updates)`, are allowed, also in `jnp.where` and
    `jax.lax.cond`. They leave parameters as they are, bit for bit. So do zeros for single members under `jax.vmap`.

    A derivative through a step is that of `fse.fused_update` if the function that calls `update` also calls
    `optax.apply_updates`. Where updates pass through `jax.jit`, `jax.checkpoint`, `jax.lax.cond` or `jax.tree.map` in
    between, a derivative raises an error.

    Args:
        tx: A transform with `fused_update`: an `*8bit` optimizer, `fse.chain`, `fse.stochastic_round_updates`,
            `fse.row_sparse` or `fse.with_max_norm`.

    Returns:
        An optax transform with the state of `tx`. Its updates are for `optax.apply_updates` alone.

    Raises:
        TypeError: `tx` has no `fused_update`, because a wrapper of optax hides it, for example. Or something computes
            with the updates, or takes a derivative through updates that passed through `jax.jit` or the like.
        ValueError: In `update`: there are no parameters. In `optax.apply_updates`: the parameters are not those that
            `update` got.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"kernel": jnp.ones((64, 64))}
    >>> tx = fse.in_place(fse.adamw8bit(0.5, weight_decay=0.0))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["kernel"]
    InPlaceUpdate(float32[64, 64], for optax.apply_updates)
    >>> round(float(optax.apply_updates(params, updates)["kernel"][0, 0]), 4)
    0.5
    """
    check_transform(tx)
    if not is_fused(tx):
        raise TypeError(
            f"`tx` must be an 8-bit optimizer, fse.chain(..., one), or a wrapper of this library around one, but "
            f"{name_of(tx)!r} hides what is in it. Put fse.in_place inside of optax's wrappers, and use fse.chain "
            "instead of optax.chain."
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("fse.in_place needs `params`, got None. Call `update(grads, state, params)`.")
        new, state = fused_update(tx, updates, state, params, **extra_args)
        return jax.tree.map(_update_of, params, new, is_leaf=is_none), state

    return FusedTransformation(tx.init, update, tx.fused_update)


def _update_of(old: Any, new: Any) -> Any:
    return None if old is None else InPlaceUpdate(old, jnp.asarray(new))
