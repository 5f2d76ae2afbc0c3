"""Paths of parameters, holes, and what lies at a path."""

import re
from math import prod
from typing import Any

import jax
import optax

from .boxes import is_box, unbox


def is_hole(x: Any) -> bool:
    """Whether there is no array where a parameter has its place."""
    return x is None or isinstance(x, optax.MaskedNode)


def is_hole_or_box(x: Any) -> bool:
    """Whether `x` has the place of one parameter; for trees in which arrays are in wrappers."""
    return is_hole(x) or is_box(x)


def flatten(tree: Any, is_leaf: Any = None) -> list[tuple[tuple, Any]]:
    """Leaves with their paths; None and MaskedNode are leaves, and so are wrappers unless `is_leaf` says otherwise."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf or is_hole_or_box)[0]


def shapes_of(params: Any, is_leaf: Any = None) -> dict[str, tuple | None]:
    """The shape of every parameter by its path; None where there is no array."""
    return {path_name(path): getattr(unbox(x), "shape", None) for path, x in flatten(params, is_leaf)}


def entry(key: Any) -> str:
    """One entry of a path, as a word."""
    return jax.tree_util.keystr((key,), simple=True)


def dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


_VALUES = re.compile(r"(/(raw_)?value)+$")


def path_name(path: tuple) -> str:
    """A key path as "block/attention/kernel", without the "value"s at its end.

    NNX variables and Linen boxes add one each, and `init` may see fewer of them than `update`: so all are dropped, that
    of a parameter of this name too.
    """
    return _VALUES.sub("", jax.tree_util.keystr(path, simple=True, separator="/"))


def is_array(box: Any) -> bool:
    """Whether there is an array in the wrapper, and not, say, optax's MaskedNode."""
    return hasattr(unbox(box), "shape") and hasattr(unbox(box), "dtype")


def is_none(x: Any) -> bool:
    """Whether a parameter has no array in a tree, as an `is_leaf`."""
    return x is None


def with_shape(box: Any) -> Any:
    """Python numbers as shapes; all else as it is."""
    if not isinstance(box, int | float | complex) or is_array(box):
        return box
    return jax.ShapeDtypeStruct((), jax.typeof(box).dtype)


def nbytes(box: Any) -> int:
    """Bytes of an array, also in a wrapper and also where only its shape is known."""
    return prod(unbox(box).shape) * unbox(box).dtype.itemsize
