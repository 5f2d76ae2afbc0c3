"""Which parameters' blocks lie on more than one device for a way to cut them, and what to do about it."""

from dataclasses import fields, replace

from ...ops.blockwise.blocks import LARGEST, SMALLEST
from ..storage.defaults import EMBEDDING
from ..storage.rules import Decision
from ..storage.state_format import StateFormat

FEWEST = 16  # elements a block that is still worth its scale: 2.5 bytes a parameter with two moments


def straddling(path: str, shape: tuple[int, ...], decision: Decision, ways: tuple[int, ...]) -> str:
    """What lies on more than one device of a parameter cut that many ways, and the way out; "" if nothing does."""
    if decision.bits == "rowwise" and ways[-1] > 1:
        return (
            f"axis {len(shape) - 1} of {shape[-1]} is cut {ways[-1]} ways, and every row has one second moment, the "
            "mean over its pieces. Cut another axis, or take 8 bits."
        )
    if decision.blocks is None or _fit(path, shape, decision.format, ways):
        return ""
    axis, size = decision.blocks
    piece = shape[axis] // ways[axis]
    what = f"axis {axis} of {shape[axis]} is cut {ways[axis]} ways, {piece} on a device, and blocks are of {size}"
    ways_out = [x for x in _formats(path, shape, decision, ways) if _fit(path, shape, x, ways)]
    if not ways_out:
        return f"{what}. No blocks fit: cut another axis, or keep fp32 moments by a rule ({path!r}, 32)."
    return f"{what}. Take {_shown(ways_out[0])}, for all or by a rule."


def _fit(path: str, shape: tuple[int, ...], state_format: StateFormat, ways: tuple[int, ...]) -> bool:
    """Whether every device has whole blocks, of an axis that is stored in bytes."""
    blocks = state_format.blocks(path, shape)
    long = not shape or not state_format.min_size or shape[blocks.axis] >= SMALLEST
    return long and all(n == 1 or blocks.fit(axis, d, n) for axis, (d, n) in enumerate(zip(shape, ways)))


def _formats(path: str, shape: tuple[int, ...], decision: Decision, ways: tuple[int, ...]) -> list[StateFormat]:
    """What might do instead, the best first."""
    own, (axis, _) = decision.format, decision.blocks or (0, 0)
    free = replace(own, block_size=None)
    found = [replace(free, shards=max(ways, default=1))]
    if not EMBEDDING.search(path):  # whose rows do not share scales
        others = sorted(set(range(len(shape))) - {axis}, key=lambda k: (ways[k], -k))
        found += [replace(free, block_axis=k, shards=ways[k]) for k in others]
    piece = shape[axis] // ways[axis]
    sizes = [n for n in range(min(piece, LARGEST), FEWEST - 1, -1) if piece % n == 0]
    return found + [replace(own, block_size=n, block_axis=axis) for n in sizes[:1]]


def _shown(state_format: StateFormat) -> str:
    """A format by what is not the default."""
    pairs = [(field.name, getattr(state_format, field.name), field.default) for field in fields(state_format)]
    return f"StateFormat({', '.join(f'{name}={value!r}' for name, value, default in pairs if value != default)})"
