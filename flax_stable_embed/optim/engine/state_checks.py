"""Checks that the state which a step gets is its optimizer's own, for these parameters."""

from collections.abc import Sequence
from typing import Any

from jax import Array

from ..storage.format_code import CheckedFormat, check_format, differs
from ..storage.moments import bits_of, checked_scales, is_codes
from ..storage.plan import LeafPlan
from ..storage.rules import Bits, Rules
from ..trees import Updates, flatten, is_none, path_name
from .leaf import Leaf
from .method import Method


def check_fields(method: Method, state: Any, grads: Updates) -> None:
    """Raises unless the state has exactly the moments of this optimizer. Options decide which ones it keeps."""
    kept = [m.name for m in method.moments]
    for name in [name for name in state._fields if f"{name}_absmax" in state._fields]:
        has = getattr(state, name) is not None
        if has != (name in kept) and grads is not None:
            raise ValueError(
                f"The state has {'a' if has else 'no'} `{name}`, but this optimizer keeps "
                f"{', '.join(kept) or 'no moments'}: another one made the state, or this one with other options. "
                "fse.convert_state converts it."
            )


def check_same_paths(
    paths: Sequence[str], tree: Any, who_has: str, *, given: str = "The gradients have", is_leaf: Any = is_none
) -> None:
    """Raises unless a pytree has its leaves at these paths.

    Leaves are paired by position. A renamed or swapped parameter must not get the moments or values of another one.
    """
    for path, (key_path, _) in zip(paths, flatten(tree, is_leaf)):
        if path != path_name(key_path):
            raise ValueError(
                f"{given} a leaf {path!r} where {who_has} {path_name(key_path)!r}: was the state made by `init` of the "
                "same parameters?"
            )


def with_checked_scales(method: Method, path: str, stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the moments and scales of a parameter, with scales in float32. Raises for other dtypes."""
    checked = {}
    for m in method.moments:
        values, scales = stored[m.name], stored[f"{m.name}_absmax"]
        if hasattr(values, "dtype") and hasattr(scales, "dtype"):
            checked[f"{m.name}_absmax"] = checked_scales(path, m.name, values.dtype, scales)
    return stored | checked


def stored_bits(method: Method, path: str, leaf: Leaf) -> Bits:
    """Reads from dtypes and shapes how a parameter's moments are stored.

    Raises:
        ValueError: The parameter, the gradient and the moments do not have one shape, or not one storage, or the state
            has no moments for the parameter.
    """
    g, p, stored = leaf
    if missing := [m.name for m in method.moments if stored[m.name] is None]:
        raise ValueError(
            f"Parameter {path!r} has a gradient, but no `{missing[0]}` in the state: was it None or masked in `init`?"
        )
    if p is not None and p.shape != g.shape:
        raise ValueError(f"Parameter {path!r} has the shape {p.shape}, but its gradient {g.shape}.")
    kinds: list[Bits] = [bits_of(stored[m.name], g.shape) for m in method.moments]
    bits: Bits = "rowwise" if "rowwise" in kinds else (kinds[0] if kinds else 32)
    for m, kind in zip(method.moments, kinds):
        x, rows = stored[m.name], m.second and bits == "rowwise"
        if x.shape != ((*g.shape[:-1], 1) if rows else g.shape) or kind not in (bits, 32):
            raise ValueError(
                f"The gradient of parameter {path!r} has the shape {g.shape}, but its `{m.name}` in the state is "
                f"{x.dtype} of shape {x.shape}: was the state made by `init` of the same parameters?"
            )
    return bits


def check_storage(
    method: Method, rules: Rules, vector: Array, plans: Sequence[LeafPlan], leaves: Sequence[Leaf]
) -> CheckedFormat:
    """Raises unless codes and scales are as the plans say, and `format` agrees with them.

    Moments that are not in 8 bits have one scale. If there are more, a checkpoint loader has cast codes to numbers.
    """
    for plan, leaf in zip(plans, leaves):
        for m in method.moments:
            codes, scales = leaf.stored[m.name], leaf.stored[f"{m.name}_absmax"]
            in_codes = is_codes(codes.dtype)
            want = codes.dtype, (1,) * len(codes.shape)
            if in_codes and plan.blocks is not None:
                want = m.stored(plan.state_format).code.dtype, plan.blocks.absmax_shape(codes.shape)
            if (codes.dtype, scales.shape) != want:
                raise ValueError(
                    f"The state of parameter {plan.path!r} has {codes.dtype} {'codes' if in_codes else 'moments'} and "
                    f"scales of shape {scales.shape}, but rules and `state_format` ask for {want[0]} and {want[1]}"
                    f"{differs(rules, vector)}. Make the optimizer with those that made the state, or convert "
                    "the state: fse.convert_state; and call it outside of shard_map, whose shards do not show the "
                    "global shape."
                )
    return check_format(rules, vector, plans)
