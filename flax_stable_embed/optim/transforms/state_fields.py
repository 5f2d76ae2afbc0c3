"""What lies where in the state of a transform that is not ours: fields, by name, and their leaves, by parameter.

A state is a tree in which the parameters' tree occurs again and again, with other leaves. Leaves are told by the name
of the field that holds such a copy and by the path in it, which is the parameter's.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..boxes import unbox
from ..trees import dotted, entry, flatten, is_array, path_name

# What the fields of optax's states hold: the sign of a moment, or that they are none. Unsigned: means, sums and maxima
# of squares and magnitudes. "State.field" goes before "field". Not here, and so kept: what `quantize_state.py` lists.
MOMENTS: Mapping[str, str] = MappingProxyType(
    {
        "mu": "signed",
        "nu": "unsigned",
        "nu_max": "unsigned",
        "trace": "signed",
        "exp_avg": "signed",
        "exp_avg_sq": "unsigned",
        "EmaState.ema": "signed",
        "ScaleByRssState.sum_of_squares": "unsigned",
        "ScaleByAdaDeltaState.e_g": "unsigned",
        "ScaleByAdaDeltaState.e_x": "unsigned",
        "ScaleByAdanState.m": "signed",
        "ScaleByAdanState.v": "signed",  # of the gradient's differences
        "ScaleByAdanState.n": "unsigned",
        "ScaleByAdemamixState.m1": "signed",
        "ScaleByAdemamixState.m2": "signed",
        "ScaleBySimplifiedAdEMAMixState.m": "signed",
        "ScaleBySimplifiedAdEMAMixState.n": "unsigned",
        "ProdigyState.grad_sum": "signed",
        "DAdaptAdamWState.grad_sum": "signed",
        "SophiaState.nu": "signed",  # the diagonal of a Hessian
        "ScaleBySM3State.mu": "keep",  # one number for each row and each column
        "ScaleBySM3State.nu": "signed",  # SM3's momentum
        "ScaleByNovogradState.nu": "keep",  # one number for each parameter
        "ScaleByRStdDevState.mu": "keep",  # nu - mu^2 of rounded moments can be negative, and its root NaN
        "ScaleByRStdDevState.nu": "keep",
        "ScaleByRStdDevWithCountState.mu": "keep",
        "ScaleByRStdDevWithCountState.nu": "keep",
    }
)


# Why other fields of optax's states stay as they are.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "z": "parameters",
        "params0": "a point of reference",
        "x0": "a point of reference",
        "g": "the previous gradient, to take a difference",
        "previous_gradient": "the previous gradient, to take a difference",
        "acc_grads": "gradients of steps that are not over",
        "v_row": "a factored second moment",
        "v_col": "a factored second moment",
    }
)


COUNTS = ("count", "step_count", "t")  # what optax calls the number of steps taken


class Field(NamedTuple):
    """A field that the table names: its path in the state, the table's key and word for it, and what it holds."""

    path: tuple
    key: str
    kind: str
    tree: Any

    @property
    def name(self) -> str:
        return dotted(self.path)


class Slot(NamedTuple):
    """A leaf of a field: its index among the state's leaves, its field, and the path that it has in it."""

    index: int
    field: Field
    path: str


def find_fields(
    tree: Any, table: Mapping, shapes: dict, is_leaf: Any = None, path: tuple = (), owner: str = ""
) -> Iterator[Field]:
    """The fields that `table` names; not within copies of the parameters, whose names are the user's."""
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
    """Where the leaves of fields lie, in their order."""
    by_path, slots = {field.path: field for field in fields}, []
    for index, (path, _) in enumerate(flatten(inner, is_leaf)):
        for n in range(len(path) + 1):
            if path[:n] in by_path:
                slots.append(Slot(index, by_path[path[:n]], path_name(path[n:])))
    return slots


def fits(field: Field, shapes: dict) -> bool:
    """Whether a field can hold moments: those of some matrix, or of all parameters if it has no matrix."""
    leaves = [(shapes.get(path_name(path)), unbox(x).shape) for path, x in flatten(field.tree) if is_array(x)]
    matrices = [shape == found for shape, found in leaves if len(shape or ()) > 1]
    return any(matrices) if matrices else all(shape == found for shape, found in leaves)


def show(inner: Any) -> str:
    """The fields of a state, with a shape each."""
    shown = {field_of(path): getattr(unbox(x), "shape", "") for path, x in reversed(flatten(inner))}
    return ", ".join(f"{name} {shape}".rstrip() for name, shape in reversed(shown.items())) or "none"


def field_of(path: tuple) -> str:
    """The last attribute on a path, where the parameters begin in states that are tuples with names."""
    last = max((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)), default=0)
    return dotted(path[: last + 1])


def count_index(leaves: list) -> int | None:
    """Where the number of the step is among the leaves."""
    for index, (path, x) in enumerate(leaves):
        if path and entry(path[-1]) in COUNTS and is_array(x) and (x.shape, x.dtype) == ((), jnp.int32):
            return index
    return None


def placeholder_state(tx: optax.GradientTransformation) -> Any:
    """The state of `tx` with a MaskedNode in place of everything that is like the parameters."""
    seen: list = []
    optax.tree.map_params(lambda p: seen.append(p) or (), lambda x: x, ())
    is_placeholder = lambda x: isinstance(x, type(seen[0]))  # noqa: E731
    state = jax.eval_shape(lambda: tx.init(seen[0]))
    return jax.tree.map(lambda x: optax.MaskedNode() if is_placeholder(x) else x, state, is_leaf=is_placeholder)
