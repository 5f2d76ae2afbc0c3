"""Checks the arguments that users pass, once, when they enter the library."""

from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..ops.embedding.rows import is_sparse_rows
from .boxes import is_never_trained, is_nnx_optimizer, unbox
from .trees import Mask, Params, Updates, flatten, is_none, path_name


def _called_on(mask: Mask, tree: Any) -> Mask:
    """Returns the pytree of a mask, which may be a function of `tree`.

    A pytree can be callable itself, as the modules of Equinox are. The test for a function is optax's: all leaves are
    callable.
    """
    leaves = jax.tree.leaves(mask)
    return mask(tree) if leaves and all(map(callable, leaves)) else mask


def broadcast_mask(name: str, mask: Mask, tree: Any) -> list[bool]:
    """Returns a mask as one boolean for each leaf of `tree`, where None counts as a leaf.

    Args:
        name: The argument that the mask came from, for the error.
        mask: Pytree of booleans with the structure of `tree`, or a prefix of it, or a function that takes `tree` and
            returns one. None means True everywhere.
        tree: Pytree like the parameters.

    Raises:
        ValueError: The mask has another structure, or does not hold booleans.
    """

    def spread(m, part):
        if isinstance(m, str) or not hasattr(m, "__bool__"):
            raise ValueError(f"`{name}` must hold booleans, got {m!r}. True means that it applies.")
        return jax.tree.map(lambda _: bool(m), part, is_leaf=is_none)

    mask = _called_on(mask, tree)
    if mask is None:
        return [True] * len(jax.tree.leaves(tree, is_leaf=is_none))
    if not _is_prefix(mask, tree):
        raise ValueError(
            f"`{name}` must be a pytree of booleans like the parameters, or a function that gives one, but it is "
            f"{jax.tree.structure(mask)}, and the parameters are {jax.tree.structure(tree)}."
        )
    return jax.tree.leaves(jax.tree.map(spread, mask, tree, is_leaf=is_none))


def _is_prefix(a: Any, b: Any) -> bool:
    try:
        jax.tree.map(lambda *_: None, a, b, is_leaf=is_none)
    except (ValueError, TypeError):
        return False
    return True


def refuse_dtype(name: str, dtype: Any) -> None:
    """Raises if a user sets the dtype of moments, as optax's argument `name` does."""
    if dtype is not None:
        raise TypeError(
            f"`{name}` must be None, got {dtype!r}: `rules` choose how moments are stored, in 8 bits or in fp32. "
            "Use rules=((pattern, 8 or 32),)."
        )


# Hyper-parameters that 16 bits round to another optimizer: bfloat16(0.999) is 1, and float16(1e-8) is 0.
_NEEDS_32_BITS = {"b1", "b2", "b3", "decay", "momentum", "eps", "eps_root"}


def check_numbers(**values: Any) -> None:
    """Raises unless every hyper-parameter is a number or an array, and precise enough."""
    for name, value in values.items():
        if not isinstance(value, Number) and not hasattr(value, "dtype"):
            raise TypeError(f"`{name}` must be a number, got {value!r}.")
        dtype = getattr(value, "dtype", None)
        if name in _NEEDS_32_BITS and dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            raise TypeError(
                f"`{name}` is {dtype}, which rounds 0.999 to 1 or 1e-8 to 0. optax.inject_hyperparams casts numbers to "
                "the dtype of the parameters: give it hyperparam_dtype=jnp.float32."
            )


def check_schedules(**values: Any) -> None:
    """Raises unless every hyper-parameter is a number, an array or a schedule."""
    check_numbers(**{name: value for name, value in values.items() if not callable(value)})


def refuse_sparse_rows(name: str, grads: Updates) -> None:
    """Raises if a gradient is a `SparseRows`, which `fse.row_sparse` must turn into an array first."""
    if any(map(is_sparse_rows, jax.tree.leaves(grads, is_leaf=is_sparse_rows))):
        raise TypeError(
            f"A gradient is a fse.SparseRows, but {name} takes arrays. Wrap the optimizer in fse.row_sparse, or take "
            "dense gradients from jax.value_and_grad."
        )


def kind_of(state: Any) -> str:
    """Describes the type of a state, for an error message."""
    names = [type(x).__name__ for x in state] if type(state) is tuple else []
    return type(state).__name__ + (f" of {', '.join(names)}" if names else "")


def is_int(value: Any) -> bool:
    """Returns whether a value is an integer of Python or NumPy. Booleans are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def need_params(params: Params, needed: bool) -> None:
    """Raises if an optimizer that needs the parameters does not get them."""
    if params is None and needed:
        raise ValueError("This optimizer needs `params`, got None. Call `update(grads, state, params)`.")


def check_transform(tx: Any) -> None:
    """Raises unless `tx` has `init` and `update`. optax.MultiSteps has both, but is not a GradientTransformation."""
    if is_nnx_optimizer(tx):
        raise TypeError(
            "`tx` must be an optax transform, got an nnx.Optimizer. Pass the transform in it: optimizer.tx."
        )
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"`tx` must be an optax transform, with `init` and `update`, got {tx!r}.")


def check_params(params: Params) -> None:
    """Raises if parameters have variables that are not trained, as a model has."""
    for path, box in flatten(params):
        is_key = jnp.issubdtype(getattr(unbox(box), "dtype", np.float32), jax.dtypes.prng_key)
        if is_key or is_never_trained(box):
            found = "a random key" if is_key else f"an nnx.{type(box).__name__}"
            raise TypeError(
                f"The parameters have {found} at {path_name(path)!r}, as a model or an nnx.Optimizer has. Pass the "
                "parameters of the model only: nnx.state(model, nnx.Param)."
            )


def check_fields(state: Any, *names: str) -> None:
    """Raises if a field of a wrapper's state has no array, as after a loader that leaves arrays out."""
    for name in names:
        if getattr(state, name) is None:
            raise ValueError(
                f"`{name}` of the {type(state).__name__} is None, where `init` makes an array. Restore the state as "
                "`init` makes it."
            )
