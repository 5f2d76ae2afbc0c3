"""Whether a state that a step is given is its optimizer's own, for these parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from ..ops.rows import is_sparse_rows
from ._method import Method
from ._rules import Rules, path_name
from ._storage import bits_of, format_bytes, format_difference, is_codes, is_none


def refuse_sparse_rows(name: str, grads: Any) -> None:
    """Raises where a gradient is of some rows only, which `fse.row_sparse` turns into arrays."""
    if any(map(is_sparse_rows, jax.tree.leaves(grads, is_leaf=is_sparse_rows))):
        raise TypeError(
            f"a gradient is a fse.SparseRows, but {name} takes arrays. Put fse.row_sparse around the optimizer, and it "
            "into fse.row_sparse if it treats rows one by one; or take dense gradients from jax.value_and_grad."
        )


def check_fields(method: Method, state: Any, grads: Any) -> None:
    """The state has the moments of this optimizer and no others: options decide which of them there are."""
    kept = [m.name for m in method.moments]
    for name in [name for name in state._fields if f"{name}_absmax" in state._fields]:
        has = getattr(state, name) is not None
        if has != (name in kept) and grads is not None:
            raise ValueError(
                f"The state has {'a' if has else 'no'} `{name}`, but this optimizer keeps "
                f"{', '.join(kept) or 'no moments'}: another one made the state, or this one with other options. "
                "fse.convert_state converts it."
            )


def check_storage(method: Method, rules: Rules, vector: Array, paths: Sequence[str], columns: dict[str, list]) -> None:
    """Codes and scales are as the rules ask; what dtypes and shapes do not tell, the length of `format` does.

    Numbers have scales of one element: where there are more, a restore has cast codes to numbers.
    """
    in_bytes = []
    for i, path in enumerate(paths):
        for m in method.moments:
            codes, scales = columns[m.name][i], columns[f"{m.name}_absmax"][i]
            if codes is None:
                continue
            in_codes = is_codes(codes.dtype)
            want = codes.dtype, (1,) * len(codes.shape)
            if in_codes:
                state_format, blocks = rules.blocks(path, codes.shape)
                want = m.stored(state_format).code.dtype, blocks.absmax_shape(codes.shape)
                in_bytes += [(path, codes.shape)] if m is method.moments[0] else []
            if (codes.dtype, scales.shape) != want:
                raise ValueError(
                    f"The state of parameter {path!r} has {codes.dtype} {'codes' if in_codes else 'moments'} and "
                    f"scales of shape {scales.shape}, but rules and `state_format` ask for {want[0]} and {want[1]}"
                    f"{differs(rules, vector)}. Make the optimizer with those that made the state, or convert "
                    "the state: fse.convert_state; and call it outside of shard_map, whose pieces do not show the "
                    "global shape."
                )
    check_format(rules, vector, in_bytes)


def check_moments(method: Method, rules: Rules, path: str, g, p, moments) -> int | str:
    """How a parameter's moments are stored, of all of which the gradient must have the shape."""
    if p is not None and p.shape != g.shape:
        raise ValueError(f"Parameter {path!r} has the shape {p.shape}, but its gradient {g.shape}.")
    if not moments:
        return 32
    kinds = [bits_of(m, g.shape) for m in moments]
    bits = "rowwise" if "rowwise" in kinds else kinds[0]
    for m, stored, kind in zip(method.moments, moments, kinds):
        rows = m.second and bits == "rowwise"
        if stored.shape not in ({(*g.shape[:-1], 1)} if rows else {g.shape}) or kind not in (bits, 32):
            raise ValueError(
                f"The gradient of parameter {path!r} has the shape {g.shape}, but its `{m.name}` in the state is "
                f"{stored.dtype} of shape {stored.shape}: was the state made by `init` of the same parameters?"
            )
    dtype = g.dtype if p is None else p.dtype
    if rule := rules.conflict(path, g.shape, dtype, bits):
        raise ValueError(
            f"The state of parameter {path!r} is stored with bits {bits!r}, but `rules` has {rule} for it. Make "
            "the optimizer with the rules that made the state, or convert the state: fse.convert_state."
        )
    return bits


def format_of(rules: Rules, in_bytes: Sequence[tuple[str, tuple[int, ...]]]) -> np.ndarray:
    """A state's `format`, from paths and shapes of the parameters in 8 bits."""
    return format_bytes(rules.formats, [(path, shape, *rules.blocks(path, shape)) for path, shape in in_bytes])


def check_format(rules: Rules, vector: Array, in_bytes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Raises unless a state's `format` is of these rules: by its length, as dtypes and shapes can be the same."""
    if vector.shape != format_of(rules, in_bytes).shape:
        raise ValueError(
            "The state's `format` says that other rules or another `state_format` made it"
            f"{differs(rules, vector)}. Make the optimizer with those that made the state, or convert the state: "
            "fse.convert_state."
        )


def differs(rules: Rules, vector: Array) -> str:
    """What the rules would change in the formats that a state's `format` names, in parentheses."""
    found = format_difference(vector, rules.formats)
    return f" ({found})" if found else ""


def kind_of(state: Any) -> str:
    """What a state is, for an error message."""
    names = [type(x).__name__ for x in state] if type(state) is tuple else []
    return type(state).__name__ + (f" of {', '.join(names)}" if names else "")


def check_same_paths(paths: Sequence[str], tree: Any, who_has: str):
    """Leaves are paired by position: a renamed or swapped parameter must not get another one's moments or values."""
    for path, (key_path, _) in zip(paths, jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)):
        if path != path_name(key_path):
            raise ValueError(
                f"The gradients have a leaf {path!r} where {who_has} {path_name(key_path)!r}: was the state made by "
                "`init` of the same parameters?"
            )
