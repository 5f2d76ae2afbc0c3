"""Whether a state that a step is given is its optimizer's own, for these parameters."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from ..storage.format_code import check_format, differs
from ..storage.moments import bits_of, is_codes
from ..storage.rules import Rules
from ..trees import is_none, path_name
from .method import Method


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


def check_same_paths(paths: Sequence[str], tree: Any, who_has: str):
    """Leaves are paired by position: a renamed or swapped parameter must not get another one's moments or values."""
    for path, (key_path, _) in zip(paths, jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)):
        if path != path_name(key_path):
            raise ValueError(
                f"The gradients have a leaf {path!r} where {who_has} {path_name(key_path)!r}: was the state made by "
                "`init` of the same parameters?"
            )
