"""Which parameter of torch is which of ours, and how the axes of its tensors lie: what the user says, checked."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Key = int | str


def pair(order: Sequence[str | None] | Mapping[Any, str | None], keys: Iterable[Key], paths: Iterable[str]) -> dict:
    """Our path for each of torch's keys (an index, or a name); those for None are left out.

    Raises:
        TypeError: `order` is one string.
        ValueError: a path or key that does not exist, is named twice or is missing.
    """
    if isinstance(order, str):
        raise TypeError(
            f"`order` must be paths in torch's order or a mapping to paths, got {order!r}; try [{order!r}]."
        )
    named = dict(order) if isinstance(order, Mapping) else dict(enumerate(order))
    keys, paths = list(keys), list(paths)
    _check("no parameter of torch has the keys", named.keys() - set(keys), "They are", keys)
    _check("it leaves out torch's parameters", set(keys) - named.keys(), "Give None for one to drop. It has", named)
    pairs = {key: path for key, path in named.items() if path is not None}
    chosen = list(pairs.values())
    _check("there are no parameters", set(chosen) - set(paths), "They are", paths)
    _check("it names twice", {path for path in chosen if chosen.count(path) > 1}, "It has", chosen)
    _check("it leaves out our parameters", set(paths) - set(chosen), "It has", chosen)
    return pairs


def _check(what: str, found: set, way_out: str, there: Iterable) -> None:
    if found:
        shown = ", ".join(map(repr, sorted(found, key=str)))
        raise ValueError(f"`order` does not fit: {what} {shown}. {way_out}: {', '.join(map(repr, there))}.")


class Axes:
    """`transpose`: for a pattern of paths, the axes of torch's tensor in our order. The first match wins."""

    def __init__(self, transpose: Mapping[str, Sequence[int]], paths: Iterable[str]):
        self.patterns = {re.compile(pattern): tuple(axes) for pattern, axes in transpose.items()}
        paths = list(paths)
        for pattern in self.patterns:
            if not any(pattern.search(path) for path in paths):
                raise ValueError(
                    f"`transpose` has the pattern {pattern.pattern!r}, which matches none of {', '.join(paths)}."
                )

    def of(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes for a parameter of ours.

        Raises:
            ValueError: they do not fit, or a square kernel where only the user knows.
        """
        found = next((axes for pattern, axes in self.patterns.items() if pattern.search(path)), None)
        straight = tuple(range(len(shape)))
        if found is None:
            if len(shape) > 1 and shape == shape[::-1] and path.split("/")[-1] == "kernel":
                raise ValueError(
                    f"{path!r} of shape {shape} fits as it is and transposed, and the kernels of Flax are torch's "
                    f"weights transposed. Say which: transpose={{{path!r}: {straight[::-1]}}}, or {straight} if not."
                )
            return straight
        if tuple(sorted(found)) != straight:
            raise ValueError(f"`transpose` has {found} for {path!r} of shape {shape}, which is no order of {straight}.")
        return found


def check_shape(key: Key, path: str, theirs: tuple[int, ...], ours: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Raises where a tensor of torch, its axes in our order, is not of our shape."""
    if len(theirs) == len(axes) and tuple(theirs[axis] for axis in axes) == ours:
        return
    hint = "Check `order`."
    if theirs == ours[::-1]:
        hint = f"If it is the transposed one: transpose={{{path!r}: {tuple(reversed(range(len(ours))))}}}."
    raise ValueError(f"torch's parameter {key!r} has the shape {theirs}, but {path!r} has {ours} (axes {axes}). {hint}")
