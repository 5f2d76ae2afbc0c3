"""Which parameters' blocks lie on more than one device for a way to cut them, and what to do about it."""

from dataclasses import fields, replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ..ops.blockwise.blocks import LARGEST, SMALLEST
from ._boxes import is_box, unbox
from ._rules import EMBEDDING, Decision, StateFormat, path_name

FEWEST = 16  # elements a block that is still worth its scale: 2.5 bytes a parameter with two moments


def cuts_of(shardings: Any, params: Any) -> dict[str, tuple[int, ...]]:
    """In how many pieces each axis of each parameter is cut, by path; without `shardings`, as the parameters lie.

    Raises:
        TypeError: `shardings` holds something else than shardings.
        ValueError: it is no tree like the parameters, names axes that a mesh does not have, or cuts unequal pieces.
    """
    pairs = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]
    arrays = {path_name(path): unbox(box) for path, box in pairs if hasattr(unbox(box), "shape")}
    if shardings is None:
        found = {path: getattr(x, "sharding", None) for path, x in arrays.items()}
        found = {path: sharding for path, sharding in found.items() if isinstance(sharding, NamedSharding)}
        return {path: _ways(path, sharding, arrays[path].shape) for path, sharding in found.items()}
    pairs = jax.tree_util.tree_flatten_with_path(shardings, is_leaf=_is_sharding)[0]
    given = {path_name(path): sharding for path, sharding in pairs}
    for path, sharding in given.items():
        if not _is_sharding(sharding):
            raise TypeError(
                f"`shardings` must be a tree of PartitionSpec or NamedSharding like the parameters, got "
                f"{sharding!r:.80} at {path!r}."
            )
    if different := [path for path in (*arrays, *given) if path not in arrays or path not in given]:
        has, lacks = ("parameters", "`shardings`") if different[0] in arrays else ("`shardings`", "parameters")
        raise ValueError(
            f"`shardings` must be a tree like the parameters, but the {has} have {different[0]!r} and the {lacks} do "
            "not. PartitionSpec() says that nothing is cut, None that it is not known."
        )
    return {path: _ways(path, sharding, arrays[path].shape) for path, sharding in given.items() if sharding is not None}


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | Sharding)


def _ways(path: str, sharding: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """In how many pieces each axis is cut."""
    if isinstance(sharding, PartitionSpec):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError(
                f"`shardings` has {sharding} for parameter {path!r}, which needs a mesh: use jax.set_mesh(mesh), or "
                "give NamedSharding(mesh, spec)."
            )
        try:
            sharding = NamedSharding(mesh, sharding)
        except ValueError as error:
            raise ValueError(f"`shardings` has {sharding} for parameter {path!r}: {error}") from None
    try:
        pieces = sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:  # the latter for a spec that is longer than the shape
        raise ValueError(f"Parameter {path!r} of shape {shape} cannot be cut as its sharding says: {error}") from None
    return tuple(d // piece if piece else 1 for d, piece in zip(shape, pieces))


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
