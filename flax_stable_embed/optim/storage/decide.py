"""What the rules say of every parameter of a tree."""

from collections import Counter
from typing import Any, NamedTuple
from warnings import warn

import jax
import optax

from ..boxes import is_box, optim_bits, unbox
from ..trees import is_array, path_name, with_shape
from .defaults import LIKE_AN_EMBEDDING
from .rules import Decision, Rules


class Decided(NamedTuple):
    """One parameter, in its wrapper, and what the rules say of it; None where there is no array."""

    key_path: tuple
    path: str
    box: Any
    decision: Decision | None


def decide(rules: Rules, params: Any) -> tuple[list[Decided], Any]:
    """What the rules say of every parameter, and the parameters' tree."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    decided = []
    for key_path, box in leaves:
        path, box = path_name(key_path), with_shape(box)
        one = rules.decide(path, unbox(box).shape, unbox(box).dtype, optim_bits(box)) if is_array(box) else None
        decided.append(Decided(key_path, path, box, one))
    twice = [path for path, n in Counter(x.path for x in decided).items() if n > 1]
    if twice:
        raise ValueError(
            f"Two parameters have the path {twice[0]!r}, by which rules and states know them (without `value` at its "
            "end). Rename one."
        )
    _check_rules(rules, params, decided)
    return decided, tree


def _check_rules(rules: Rules, params: Any, leaves: list[Decided]) -> None:
    hidden = any(isinstance(x, optax.MaskedNode) for x in jax.tree.leaves(params, is_leaf=_is_masked_node))
    named = [(x.path, unbox(x.box).shape) for x in leaves if x.decision]
    if not named or hidden or any(x.decision is None for x in leaves):
        return  # a placeholder, or parameters that a mask hides: a rule may match elsewhere
    if unmatched := rules.unmatched(named):
        paths = ", ".join(path for path, _ in named[:8]) + (", ..." if len(named) > 8 else "")
        raise ValueError(
            f"`rules` has patterns that match no parameter: {', '.join(unmatched)}. The parameters are: {paths}. "
            "Correct the pattern, or drop it. (A variable that is tied has one path, the first of them.)"
        )
    decisions = [(x.path, x.decision) for x in leaves if x.decision]
    if not any(d.reason == "embedding" for _, d in decisions):
        default = [path for path, d in decisions if d.bits == 8 and d.reason == "default"]
        if suspects := [path for path in default if LIKE_AN_EMBEDDING.search(path)]:
            warn(
                "No parameter is named like an embedding, yet these might be one and get 8-bit moments: "
                f"{', '.join(suspects)}. To keep them in fp32, or to confirm: rules=(({suspects[0]!r}, 32 or 8),).",
                stacklevel=5,
            )


def _is_masked_node(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
