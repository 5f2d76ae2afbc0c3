"""Flattens pytrees of parameters by path, with their shapes. A hole is a leaf without an array."""

import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import optax

from .boxes import is_box, unbox

# Pytrees that users pass. To a type checker they are `Any`, because JAX has no type for a pytree of a given structure.
Params = Any  # parameters or their shapes, also inside NNX variables or Linen boxes
Updates = Any  # gradients or updates, like the parameters
Mask = Any  # booleans like the parameters or a prefix of them, or a function that returns them
Specs = Any  # PartitionSpec or NamedSharding for each parameter


def is_hole(x: Any) -> bool:
    """Returns whether a leaf stands for a parameter without an array: None, or optax's MaskedNode."""
    return x is None or isinstance(x, optax.MaskedNode)


def is_hole_or_box(x: Any) -> bool:
    """Returns whether `x` is one parameter without an array or in a wrapper. An `is_leaf` predicate."""
    return is_hole(x) or is_box(x)


def flatten(tree: Any, is_leaf: Any = None) -> list[tuple[tuple, Any]]:
    """Returns `(path, leaf)` pairs. By default None, MaskedNode and wrappers are leaves."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf or is_hole_or_box)[0]


def shapes_of(params: Params, is_leaf: Any = None) -> dict[str, tuple | None]:
    """Returns the shape of every parameter by its path; None where there is no array."""
    return {path_name(path): getattr(unbox(x), "shape", None) for path, x in flatten(params, is_leaf)}


def entry(key: Any) -> str:
    """Returns one entry of a key path as a string: "kernel"."""
    return jax.tree_util.keystr((key,), simple=True)


def dotted(path: tuple) -> str:
    """Returns a key path as "0.inner.mu"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


_VALUES_AT_THE_END = re.compile(r"(/(raw_)?value)+$")


def path_name(path: tuple) -> str:
    """Returns a key path as "block/attention/kernel", without any "value" at its end.

    Every NNX variable and Linen box adds a "value", and `init` may see fewer wrappers than `update`. So all of them are
    dropped, even the name of a parameter that is called "value".
    """
    return _VALUES_AT_THE_END.sub("", jax.tree_util.keystr(path, simple=True, separator="/"))


def check_paths(paths: Sequence[str]) -> None:
    """Raises if two parameters have one path."""
    twice = [path for path, n in Counter(paths).items() if n > 1]
    if twice:
        raise ValueError(
            f"Two parameters have the path {twice[0]!r}, by which rules and states know them (without `value` at "
            "its end). Rename one."
        )


def is_array(box: Any) -> bool:
    """Returns whether `box` is an array or a wrapper of one. A MaskedNode, for example, is not."""
    return hasattr(unbox(box), "shape") and hasattr(unbox(box), "dtype")


def is_none(x: Any) -> bool:
    """Returns whether `x` is None. As `is_leaf` it makes None a leaf: a parameter without an array."""
    return x is None


def with_shape(box: Any) -> Any:
    """Replaces a Python number by its shape and dtype. Returns everything else as it is."""
    if not isinstance(box, int | float | complex) or is_array(box):
        return box
    return jax.ShapeDtypeStruct((), jax.typeof(box).dtype)


def nbytes(box: Any) -> int:
    """Returns the bytes of an array or of a `ShapeDtypeStruct`, also in a wrapper."""
    return prod(unbox(box).shape) * unbox(box).dtype.itemsize
