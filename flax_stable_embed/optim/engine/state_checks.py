"""Checks that the state which a step gets is its optimizer's own, for these parameters."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..storage.format_code import CheckedFormat, check_format, differs
from ..storage.moments import bits_of, checked_scales, is_codes
from ..storage.plan import LeafPlan
from ..storage.rules import Bits, Rules
from ..trees import Updates, flatten, is_hole, is_none, path_name
from .leaf import Leaf
from .method import Method


def check_fields(method: Method, state: Any, grads: Updates) -> None:
    """Raises unless the state has exactly the moments of this optimizer, and counts that can count.

    Options decide which moments it keeps.
    """
    kept = [m.name for m in method.moments]
    for name in [name for name in state._fields if f"{name}_absmax" in state._fields]:
        has = getattr(state, name) is not None
        if has != (name in kept) and grads is not None:
            raise ValueError(
                f"The state has {'a' if has else 'no'} `{name}`, but this optimizer keeps "
                f"{', '.join(kept) or 'no moments'}: another one made the state, or this one with other options. "
                "fse.convert_state converts it."
            )
    for name in method.counts:
        count = getattr(state, name)
        dtype = np.dtype(getattr(count, "dtype", type(count)))
        if np.shape(count) != () or not jnp.issubdtype(dtype, jnp.integer) or dtype.itemsize < 4:
            raise ValueError(
                f"`{name}` of the state is {dtype} of shape {np.shape(count)}, where `init` makes an int32 scalar. "
                "Restore the state with the dtypes of fse.abstract_state, or of `init`."
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
        if not (is_hole(values) and is_hole(scales)):
            checked[f"{m.name}_absmax"] = checked_scales(path, m.name, values, scales)
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
        complex_for_real = jnp.issubdtype(x.dtype, jnp.complexfloating) and jnp.isrealobj(g)
        if x.shape != ((*g.shape[:-1], 1) if rows else g.shape) or kind not in (bits, 32) or complex_for_real:
            raise ValueError(
                f"The gradient of parameter {path!r} is {g.dtype} of shape {g.shape}, but its `{m.name}` in the state "
                f"is {x.dtype} of shape {x.shape}: was the state made by `init` of the same parameters? If a parameter "
                "has changed its shape, adapt the state: fse.adapt_state."
            )
    return bits


def unstepped_bits(method: Method, leaf: Leaf) -> tuple[Bits, tuple[int, ...]]:
    """Reads how the moments of a parameter without a gradient are stored, and the parameter's shape."""
    found = [(leaf.stored[m.name], m) for m in method.moments]
    shapes = [x.shape for x, m in found if not m.second] + [x.shape for x, _ in found]
    shape = shapes[0] if leaf.p is None else leaf.p.shape
    kinds: list[Bits] = [bits_of(x, shape) for x, _ in found]
    return "rowwise" if "rowwise" in kinds else kinds[0], shape


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
