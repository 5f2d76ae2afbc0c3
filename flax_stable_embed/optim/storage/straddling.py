"""Finds the parameters whose blocks straddle devices for a given sharding, and what to do about it."""

from collections.abc import Iterable
from dataclasses import fields, replace
from warnings import warn

from ...ops.blockwise.blocks import LARGEST, SMALLEST
from ..boxes import unbox
from ..placement import Placed, sharding_at_init
from .defaults import EMBEDDING
from .plan import LeafPlan, PlannedLeaf
from .state_format import StateFormat

FEWEST = 16  # elements per block that are still worth a scale: 2.5 bytes per parameter with two moments


def warn_if_straddling(leaves: Iterable[PlannedLeaf]) -> None:
    """Warns if `init` sees parameters that are sharded so that blocks straddle devices."""
    found = []
    for x in leaves:
        sharding = sharding_at_init(x.path, unbox(x.box))
        if x.plan is not None and sharding is not None and len(sharding.spec) <= len(x.plan.shape):
            if text := straddling(x.plan, Placed(x.plan.shape, sharding).shards):
                found.append(f"{x.path}: {text}")
    if found:
        others = f" The same is true of {len(found) - 1} more, which `fse.describe` lists." if found[1:] else ""
        warn(
            "Some parameters are sharded so that blocks with one scale are on several devices. Every step then moves "
            f"data between them. {found[0]}{others}",
            stacklevel=4,
        )


def straddling(plan: LeafPlan, shards: tuple[int, ...]) -> str:
    """Says which blocks of a parameter straddle devices, and the way out; "" if none do.

    Args:
        plan: The parameter's plan.
        shards: Into how many shards each axis of the parameter is split.
    """
    path, shape = plan.path, plan.shape
    if plan.bits == "rowwise" and shards[-1] > 1:
        return (
            f"axis {len(shape) - 1} of {shape[-1]} is sharded over {shards[-1]} devices, and every row has one second "
            "moment, the mean over its shards. Shard another axis, or use 8 bits."
        )
    if plan.blocks is None or _fit(plan, plan.state_format, shards):
        return ""
    axis, size = plan.blocks
    length = shape[axis] // shards[axis]
    problem = (
        f"axis {axis} of {shape[axis]} is sharded over {shards[axis]} devices, {length} on each, and blocks have {size}"
    )
    ways_out = [x for x in _formats(plan, shards) if _fit(plan, x, shards)]
    if not ways_out:
        return f"{problem}. No blocks fit: shard another axis, or keep fp32 moments with a rule ({path!r}, 32)."
    return f"{problem}. Use {_text(ways_out[0])}, for all parameters or in a rule."


def _fit(plan: LeafPlan, state_format: StateFormat, shards: tuple[int, ...]) -> bool:
    """Returns whether every device has complete blocks, of an axis that is stored in 8 bits."""
    shape = plan.shape
    blocks = state_format.blocks(plan.path, shape, plan.stacked)
    long = not shape or not state_format.min_size or shape[blocks.axis] >= SMALLEST
    return long and all(n == 1 or blocks.fit(axis, d, n) for axis, (d, n) in enumerate(zip(shape, shards)))


def _formats(plan: LeafPlan, shards: tuple[int, ...]) -> list[StateFormat]:
    """Lists formats that may fit instead, the best first."""
    own, (axis, _), shape = plan.state_format, plan.blocks or (0, 0), plan.shape
    free = replace(own, block_size=None)
    within = [k for k in range(len(shape)) if k not in plan.stacked]  # `block_axis` is an index into them
    found = [replace(free, shards=max(shards, default=1))]
    if not EMBEDDING.search(plan.path):  # whose rows do not share scales
        others = sorted(set(within) - {axis}, key=lambda k: (shards[k], -k))
        found += [replace(free, block_axis=within.index(k), shards=shards[k]) for k in others]
    length = shape[axis] // shards[axis]
    sizes = [n for n in range(min(length, LARGEST), FEWEST - 1, -1) if length % n == 0 and axis in within]
    return found + [replace(own, block_size=n, block_axis=within.index(axis)) for n in sizes[:1]]


def _text(state_format: StateFormat) -> str:
    """Writes a format with the arguments that are not the default."""
    pairs = [(field.name, getattr(state_format, field.name), field.default) for field in fields(state_format)]
    return f"StateFormat({', '.join(f'{name}={value!r}' for name, value, default in pairs if value != default)})"
