"""Checks of what users pass, made once, at the border."""

from numbers import Number
from typing import Any

import jax
import numpy as np

from ..ops.embedding.rows import is_sparse_rows
from .trees import is_none


def broadcast_mask(name: str, mask: Any, tree: Any) -> list[bool]:
    """A pytree of booleans, or a prefix of one, as one boolean for each leaf of `tree`; None in both is a leaf too.

    Raises:
        ValueError: it has another structure, or does not hold booleans. `name` is the argument that gave it.
    """

    def spread(m, part):
        if isinstance(m, str) or not hasattr(m, "__bool__"):
            raise ValueError(f"`{name}` must hold booleans, got {m!r}.")
        return jax.tree.map(lambda _: bool(m), part, is_leaf=is_none)

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
    """Raises where a dtype is asked for that optax takes for its moments."""
    if dtype is not None:
        raise TypeError(
            f"`{name}` must be None, got {dtype!r}: moments are stored in 8 bits or fp32. To choose which, use "
            "rules=((pattern, 8 or 32),)."
        )


def check_numbers(**values: Any) -> None:
    """Raises where a hyper-parameter is neither a number nor an array."""
    for name, value in values.items():
        if not isinstance(value, Number) and not hasattr(value, "dtype"):
            raise TypeError(f"`{name}` must be a number, got {value!r}.")


def check_schedules(**values: Any) -> None:
    """Raises where a hyper-parameter is neither a number nor a schedule."""
    check_numbers(**{name: value for name, value in values.items() if not callable(value)})


def refuse_sparse_rows(name: str, grads: Any) -> None:
    """Raises where a gradient is of some rows only, which `fse.row_sparse` turns into arrays."""
    if any(map(is_sparse_rows, jax.tree.leaves(grads, is_leaf=is_sparse_rows))):
        raise TypeError(
            f"a gradient is a fse.SparseRows, but {name} takes arrays. Put fse.row_sparse around the optimizer, and it "
            "into fse.row_sparse if it treats rows one by one; or take dense gradients from jax.value_and_grad."
        )


def kind_of(state: Any) -> str:
    """What a state is, for an error message."""
    names = [type(x).__name__ for x in state] if type(state) is tuple else []
    return type(state).__name__ + (f" of {', '.join(names)}" if names else "")


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def need_params(params: Any, needed: bool) -> None:
    if params is None and needed:
        raise ValueError("this optimizer needs `params`: call `update(grads, state, params)`; got None.")


def check_transform(tx: Any) -> None:
    """Raises where `tx` is not used as an optax transform. (optax.MultiSteps is, but no GradientTransformation.)"""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"`tx` must be an optax transform, got {tx!r}.")
