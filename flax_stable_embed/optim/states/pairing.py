"""Finds the partner of every value of a converted state: a value of the source for each value of the target.

Values of the same name are partners. A moment that has another place in the chain of the target is found by the end of
its name, "mu/block/kernel". A step count is taken from the count of the same moments.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jax.core import Tracer
from jax.tree_util import GetAttrKey

from ..trees import path_name
from .named_state import NamedState, last_part, listed


class _Problems:
    """What prevents a conversion, and the fields that a caller may give up to make it possible, both in order."""

    def __init__(self):
        self.texts: list[str] = []
        self.fields: dict[str, None] = {}

    def add(self, text: str, field: str = "") -> None:
        self.texts.append(text)
        if field:
            self.fields[field] = None

    def check(self) -> None:
        """Raises if there are problems."""
        if not self.texts:
            return
        names = tuple(self.fields)
        hint = f", or name the fields that may be reset or dropped: allow_reset={names}" if names else ""
        raise ValueError(
            f"The state cannot be converted: {listed(self.texts)}. Choose a `tx_to` that keeps the same values{hint}."
        )


def pair(source: NamedState, target: NamedState, arrays: dict[str, Any], allow_reset: Sequence[str]) -> dict[str, str]:
    """Returns the name of the source's value for each value of the target.

    Raises:
        ValueError: A value has no partner, or not the right one, and `allow_reset` does not name it.
    """
    problems = _Problems()
    pairs = _pair_values(source, target, allow_reset, problems)
    pairs |= _pair_counts(pairs, source, target, arrays, allow_reset, problems)
    problems.check()
    return pairs


def _pair_values(
    source: NamedState, target: NamedState, allow_reset: Sequence[str], problems: _Problems
) -> dict[str, str]:
    """Pairs everything except counts: by name, then by the end of the name."""
    fields = source.moment_fields | target.moment_fields
    source_end, target_end = ({k: _end(path, fields) for k, path in x.paths.items()} for x in (source, target))
    values = [name for name in target.shapes if name not in target.counts]
    pairs = {name: name for name in values if name in source.shapes}
    unpaired = {name: None for name in source.shapes if name not in pairs and name not in source.counts}  # in order
    by_end = defaultdict(list)
    for origin in unpaired:
        by_end[source_end[origin]].append(origin)
    for name in values:
        if name in pairs:
            continue
        end = target_end[name]
        same = by_end[end] if _field(end) in fields else []
        if len(same) > 1:
            problems.add(f"{name} of the target may be {' or '.join(same)} of the source")
        elif same:
            pairs[name] = same.pop()
            unpaired.pop(pairs[name])
        elif name not in target.remainders and not _is_allowed(name, allow_reset):
            problems.add(f"{name} of the target has no source", _field(end))
    for origin in unpaired:
        if not _is_allowed(origin, allow_reset):
            problems.add(f"{origin} of the source has no place in the target", _field(source_end[origin]))
    for name, origin in list(pairs.items()):
        there, here = source.sums.get(origin), target.sums.get(name)
        if there and here and there != here:
            if _is_allowed(name, allow_reset):
                pairs.pop(name)
                continue
            text = f"{origin} of the source sums {there}, and {name} of the target {here}"
            problems.add(text, _field(target_end[name]))
        old, new = source.shapes[origin], target.shapes[name]
        if old != new:
            problems.add(f"{origin} has the shape {old} in the source and {new} in the target")
    return pairs


def _pair_counts(
    pairs: dict[str, str],
    source: NamedState,
    target: NamedState,
    arrays: dict[str, Any],
    allow_reset: Sequence[str],
    problems: _Problems,
) -> dict[str, str]:
    """Pairs the step counts, given the pairs of all other values."""
    of_same_moments, found = _counts_of_same_moments(pairs, source, target), {}
    for name in target.counts:
        counted = [k for k in target.moments if name in target.counts_of(k).values()]
        reset = [k for k in counted if k not in pairs]
        if reset and (len(reset) == len(counted) or _is_allowed(name, allow_reset)):
            continue  # the bias correction of moments that start again needs a count that does so too
        origins = of_same_moments.get(name) or _nearest_counts(name, source, target)
        steps = {origin: int(arrays[origin]) for origin in origins if not isinstance(arrays[origin], Tracer)}
        if origins:
            found[name] = max(steps, key=lambda origin: steps[origin]) if steps else origins[0]
        if _is_allowed(name, allow_reset):
            continue
        if len(set(steps.values())) > 1:
            options = " or ".join(f"{origin} = {n}" for origin, n in steps.items())
            problems.add(f"{name} of the target may be {options} of the source", "count")
        elif not origins and name.rpartition("/")[0] not in target.without_counts:
            problems.add(f"{name} of the target has no step count to take in the source", "count")
    return found


def _counts_of_same_moments(pairs: dict[str, str], source: NamedState, target: NamedState) -> dict[str, list[str]]:
    """Finds, for each count of the target, the counts of the source that counted the steps of the same moments."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for name, origin in pairs.items():
        theirs = source.counts_of(origin)
        for field, count in target.counts_of(name).items():
            if field in theirs:
                found[count][theirs[field]] = None
    return {name: list(origins) for name, origins in found.items()}


def _nearest_counts(name: str, source: NamedState, target: NamedState) -> list[str]:
    """Returns the source's counts that may stand for a count without moments: the nearest ones of its kind."""
    counts = [k for k in source.counts if last_part(k) == last_part(name)]
    counts = [k for k in counts if (k in source.value_counts) == (name in target.value_counts)] or counts
    nearest = max((_common_parts(k, name) for k in counts), default=0)
    return [name] if name in counts else [k for k in counts if _common_parts(k, name) == nearest]


def _end(path: tuple, moment_fields: set[str]) -> str:
    """Returns the end of a path, from its field on: "mu/block/kernel". It is "" if the path has no field.

    The end is the same wherever a state is in a chain. The field is the first one on the path that has the name of a
    moment, because parameters may have such names too. If there is none, it is the last field.
    """
    at = [i for i, key in enumerate(path) if isinstance(key, GetAttrKey) and key.name not in ("value", "raw_value")]
    first = next((i for i in at if path[i].name in moment_fields), at[-1] if at else len(path))
    return path_name(path[first:])


def _field(end: str) -> str:
    """Returns the field at which an end of a path begins: "mu"."""
    return end.partition("/")[0]


def _common_parts(a: str, b: str) -> int:
    """Counts the parts that two names share at their beginning."""
    parts = list(zip(a.split("/"), b.split("/")))
    return next((i for i, (x, y) in enumerate(parts) if x != y), len(parts))


def _is_allowed(name: str, allow_reset: Sequence[str]) -> bool:
    return any(part in allow_reset for part in name.split("/"))
