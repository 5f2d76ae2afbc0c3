"""Parameters in a wrapper: NNX variables and Linen boxes, which carry sharding metadata next to the array.

Codes get the parameter's own wrapper. Scales have another extent along the blocked axis, so their wrapper keeps a name for
that axis only where it is sure to divide.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from ..ops.blockwise.blocks import Blocks

# Where NNX keeps the names of mesh or logical axes, by flax version.
_SHARDING_KEYS = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")


def is_box(x: Any) -> bool:
    """Whether `x` is an NNX variable or a Linen box."""
    return isinstance(x, nnx.Variable | meta.AxisMetadata)


def unbox(x: Any) -> Any:
    """The array in the wrapper, or `x` itself."""
    if isinstance(x, nnx.Variable):
        return x.get_raw_value()
    return unbox(x.unbox()) if isinstance(x, meta.AxisMetadata) else x


def optim_bits(x: Any) -> int | None:
    """The `optim_bits` of an NNX variable's metadata, which asks for a precision."""
    return x.get_metadata().get("optim_bits") if isinstance(x, nnx.Variable) else None


def rebox(box: Any, value: Any) -> Any:
    """`value` in the wrapper of `box`, if it has one."""
    if isinstance(box, nnx.Variable):
        return box.replace(value)
    return box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value


def rebox_scales(box: Any, scales: Any, blocks: Blocks | None, shards: int) -> Any:
    """`scales` in the wrapper of `box`, with names for axes that divide; `blocks=None` stands for a placeholder."""

    def keep(names: Any) -> Any:
        if blocks is None or not isinstance(names, Sequence) or isinstance(names, str):
            return (
                None
                if names is None
                else type(names)(*[None] * len(names))
                if _is_spec(names)
                else (None,) * len(names)
            )
        kept = [
            n if axis != blocks.axis or _divides(scales.shape[axis], n, box, shards) else None
            for axis, n in enumerate(names)
        ]
        return type(names)(*kept) if _is_spec(names) else tuple(kept)

    if isinstance(box, nnx.Variable):
        found = {key: value for key, value in box.get_metadata().items() if key in _SHARDING_KEYS and value is not None}
        return box.replace(scales, **{key: keep(value) for key, value in found.items()})
    if isinstance(box, meta.AxisMetadata):
        inner = rebox_scales(box.unbox(), scales, blocks, shards) if is_box(box.unbox()) else scales
        box = box.replace_boxed(inner)
        return box.replace(names=keep(box.names)) if hasattr(box, "names") else box
    return scales


def _is_spec(names: Any) -> bool:
    return isinstance(names, jax.sharding.PartitionSpec)


def _divides(n: int, names: Any, box: Any, shards: int) -> bool:
    """Whether `n` blocks can be cut as `names` says: by the mesh where it is known, else by the promise of `shards`."""
    if names is None:
        return True
    mesh = jax.sharding.get_abstract_mesh()
    sharding = getattr(unbox(box), "sharding", None)
    if mesh.empty and isinstance(sharding, jax.sharding.NamedSharding):
        mesh = sharding.mesh
    names = (names,) if isinstance(names, str) else names
    if not mesh.empty and all(name in mesh.shape for name in names):
        return n % prod(mesh.shape[name] for name in names) == 0
    return n % shards == 0
