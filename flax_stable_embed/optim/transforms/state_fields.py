"""Finds moments in the state of any transform: the fields that hold them, by name, and their leaves, by parameter.

A state contains several copies of the pytree of parameters, with other leaves. A leaf is identified by the field that
holds the copy, and by its path inside the copy, which is the path of a parameter.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..boxes import unbox
from ..trees import dotted, entry, flatten, is_array, path_name

# The fields of optax's states that hold moments, and those with the same names that hold something else ("keep"). Each
# with its rounding where the user's format does not set one. Unsigned are averages, sums and maxima of squares and
# magnitudes. "State.field" has precedence over "field". A field that is not here stays as it is; the docstring of
# `quantize_state` lists them.
MOMENTS: Mapping[str, str] = MappingProxyType(
    {
        "mu": "signed, nearest",
        "nu": "unsigned, dither",
        "nu_max": "unsigned, nearest",  # a maximum, which rounding up would raise for good
        "trace": "signed, nearest",
        "exp_avg": "signed, nearest",
        "exp_avg_sq": "unsigned, dither",
        "EmaState.ema": "signed, nearest",
        "ScaleByRmsState.nu": "unsigned, nearest",  # optax's decay for it is 0.9
        "ScaleByRmsWithCountState.nu": "unsigned, nearest",
        "ScaleByRssState.sum_of_squares": "unsigned, dither",
        "ScaleByAdaDeltaState.e_g": "unsigned, nearest",
        "ScaleByAdaDeltaState.e_x": "unsigned, nearest",
        "ScaleByAdanState.m": "signed, nearest",
        "ScaleByAdanState.v": "signed, nearest",  # differences of gradients
        "ScaleByAdanState.n": "unsigned, dither",
        "ScaleByAdemamixState.m1": "signed, nearest",
        "ScaleByAdemamixState.m2": "signed, dither",
        "ScaleBySimplifiedAdEMAMixState.m": "signed, nearest",
        "ScaleBySimplifiedAdEMAMixState.n": "unsigned, dither",
        "ProdigyState.grad_sum": "signed, nearest",
        "DAdaptAdamWState.grad_sum": "signed, nearest",
        "SophiaState.nu": "signed, nearest",  # the diagonal of a Hessian
        "ScaleBySM3State.mu": "keep",  # one number per row and per column
        "ScaleBySM3State.nu": "signed, nearest",  # SM3's momentum
        "ScaleByNovogradState.nu": "keep",  # one number per parameter
        "ScaleByRStdDevState.mu": "keep",  # nu - mu^2 of rounded moments may be negative, and its root NaN
        "ScaleByRStdDevState.nu": "keep",
        "ScaleByRStdDevWithCountState.mu": "keep",
        "ScaleByRStdDevWithCountState.nu": "keep",
    }
)

# The reasons why other fields of optax's states stay as they are, for the report of `describe`.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "z": "parameters",
        "params0": "a point of reference",
        "x0": "a point of reference",
        "g": "the previous gradient, to take a difference",
        "previous_gradient": "the previous gradient, to take a difference",
        "acc_grads": "gradients of an unfinished step",
        "v_row": "a factored second moment",
        "v_col": "a factored second moment",
    }
)

COUNTS = ("count", "step_count", "t")  # the names that optax has for the number of steps


class Field(NamedTuple):
    """A field of a state that the table of moments lists.

    Attributes:
        path: Its key path in the state.
        key: Its key in the table: "mu" or "ScaleByAdamState.mu".
        kind: Its value in the table: "signed" or "unsigned", alone or with its rounding after a comma, or "keep".
        tree: Its content.
    """

    path: tuple
    key: str
    kind: str
    tree: Any

    @property
    def signed(self) -> bool:
        return self.kind.startswith("signed")

    @property
    def slow(self) -> bool:
        """Whether it changes so slowly that it is dithered by default, as second moments are."""
        return self.kind.partition(", ")[2] == "dither" or self.kind == "unsigned"

    @property
    def name(self) -> str:
        """Its path as a string, which is unique in the state."""
        return dotted(self.path)


class Slot(NamedTuple):
    """A leaf of a field: its index among the leaves of the state, the field, and its path inside the field."""

    index: int
    field: Field
    path: str


def find_fields(
    tree: Any, table: Mapping, shapes: dict, is_leaf: Any = None, path: tuple = (), owner: str = ""
) -> Iterator[Field]:
    """Yields the fields that `table` lists. Does not look inside copies of the parameters, whose names users choose."""
    name = entry(path[-1]) if path else ""
    key = next((key for key in (f"{owner}.{name}", name) if key in table), None)
    if key is not None:
        yield Field(path, key, table[key], tree)
        return
    leaves = [path_name(path) for path, _ in flatten(tree, is_leaf)]
    if leaves and all(leaf in shapes for leaf in leaves):
        return
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    for at, child in children:
        if at:
            yield from find_fields(child, table, shapes, is_leaf, (*path, *at), type(tree).__name__)


def find_slots(inner: Any, fields: list[Field], is_leaf: Any = None) -> list[Slot]:
    """Returns the leaves of the fields, in the order of the leaves of the state."""
    by_path, slots = {field.path: field for field in fields}, []
    for index, (path, _) in enumerate(flatten(inner, is_leaf)):
        for n in range(len(path) + 1):
            if path[:n] in by_path:
                slots.append(Slot(index, by_path[path[:n]], path_name(path[n:])))
    return slots


def can_hold_moments(field: Field, shapes: dict) -> bool:
    """Returns whether leaves of a field have their parameters' shapes: a matrix, or everything if there is none."""
    leaves = [(shapes.get(path_name(path)), unbox(x).shape) for path, x in flatten(field.tree) if is_array(x)]
    matrices = [shape == found for shape, found in leaves if len(shape or ()) > 1]
    return any(matrices) if matrices else all(shape == found for shape, found in leaves)


def fields_text(inner: Any) -> str:
    """Lists the fields of a state, each with one shape, for an error message."""
    shown = {field_of(path): getattr(unbox(x), "shape", "") for path, x in reversed(flatten(inner))}
    return ", ".join(f"{name} {shape}".rstrip() for name, shape in reversed(shown.items())) or "none"


def field_of(path: tuple) -> str:
    """Returns a path up to its last attribute. In states that are NamedTuples, the rest is the path of a parameter."""
    last = max((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)), default=0)
    return dotted(path[: last + 1])


def count_index(leaves: list) -> int | None:
    """Returns the index of the leaf that counts steps; None if there is none."""
    for index, (path, x) in enumerate(leaves):
        if path and entry(path[-1]) in COUNTS and is_array(x) and (x.shape, x.dtype) == ((), jnp.int32):
            return index
    return None


def placeholder_state(tx: optax.GradientTransformation) -> Any:
    """Makes the state of `tx` with a MaskedNode in place of every pytree that is like the parameters."""
    seen: list = []
    optax.tree.map_params(lambda p: seen.append(p) or (), lambda x: x, ())
    is_placeholder = lambda x: isinstance(x, type(seen[0]))  # noqa: E731
    state = jax.eval_shape(lambda: tx.init(seen[0]))
    return jax.tree.map(lambda x: optax.MaskedNode() if is_placeholder(x) else x, state, is_leaf=is_placeholder)
