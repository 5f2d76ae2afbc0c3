"""Checks `order` and `transpose`: which parameter of torch is which of ours, and how its axes are ordered."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Key = int | str


def pair(order: Sequence[str | None] | Mapping[Any, str | None], keys: Iterable[Key], paths: Iterable[str]) -> dict:
    """Returns a dictionary from torch's keys (indices or names) to our paths, without the keys that `order` drops.

    Raises:
        TypeError: If `order` is a single string.
        ValueError: If a path or key does not exist, appears twice or is missing.
    """
    if isinstance(order, str):
        raise TypeError(
            f"`order` must be a sequence of paths or a mapping to paths, got the string {order!r}. Use [{order!r}]."
        )
    named = dict(order) if isinstance(order, Mapping) else dict(enumerate(order))
    keys, paths = list(keys), list(paths)
    _check("torch has no parameters with the keys", named.keys() - set(keys), "Its keys are", keys)
    _check("it lacks torch's parameters", set(keys) - named.keys(), "Map a parameter to None to drop it. It has", named)
    pairs = {key: path for key, path in named.items() if path is not None}
    chosen = list(pairs.values())
    _check("`params` has no paths", set(chosen) - set(paths), "Its paths are", paths)
    _check("it repeats", {path for path in chosen if chosen.count(path) > 1}, "It has", chosen)
    _check("it lacks our parameters", set(paths) - set(chosen), "It has", chosen)
    return pairs


def _check(problem: str, found: set, way_out: str, there: Iterable) -> None:
    if found:
        shown = ", ".join(map(repr, sorted(found, key=str)))
        raise ValueError(f"`order` does not fit: {problem} {shown}. {way_out}: {', '.join(map(repr, there))}.")


class Axes:
    """The order of axes of each parameter, from the user's `transpose`. The first pattern that matches wins."""

    def __init__(self, transpose: Mapping[str, Sequence[int]], paths: Iterable[str]):
        self.patterns = {re.compile(pattern): tuple(axes) for pattern, axes in transpose.items()}
        paths = list(paths)
        for pattern in self.patterns:
            if not any(pattern.search(path) for path in paths):
                raise ValueError(
                    f"`transpose` has the pattern {pattern.pattern!r}, but it matches none of the paths "
                    f"{', '.join(paths)}."
                )

    def of(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the axes of torch's tensor in the order of our parameter.

        Raises:
            ValueError: If the axes do not fit, or if `transpose` says nothing about a square kernel, for which both
                orders fit.
        """
        found = next((axes for pattern, axes in self.patterns.items() if pattern.search(path)), None)
        straight = tuple(range(len(shape)))
        if found is None:
            if len(shape) > 1 and shape == shape[::-1] and path.split("/")[-1] == "kernel":
                raise ValueError(
                    f"{path!r} of shape {shape} fits both as stored and transposed. A kernel of Flax is the transpose "
                    f"of torch's weight: if this one is, set transpose={{{path!r}: {straight[::-1]}}}, otherwise "
                    f"{straight}."
                )
            return straight
        if tuple(sorted(found)) != straight:
            raise ValueError(
                f"`transpose` has {found} for {path!r} of shape {shape}. It must be a permutation of {straight}."
            )
        return found


def check_shape(key: Key, path: str, theirs: tuple[int, ...], ours: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Raises a ValueError unless a tensor of torch, with its axes in our order, has our shape."""
    if len(theirs) == len(axes) and tuple(theirs[axis] for axis in axes) == ours:
        return
    hint = "Check `order`."
    if theirs == ours[::-1]:
        hint = f"If it is transposed, set transpose={{{path!r}: {tuple(reversed(range(len(ours))))}}}."
    raise ValueError(
        f"Parameter {key!r} of torch has the shape {theirs}, but {path!r} has {ours} (axes {axes}). {hint}"
    )
