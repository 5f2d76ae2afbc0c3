"""Parameters in a wrapper: NNX variables and Linen boxes, which carry sharding metadata next to the array.

Codes get the parameter's own wrapper. Scales have another extent along the blocked axis, so their wrapper keeps a name
for that axis only where it is sure to divide.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from ..ops.blockwise.blocks import Blocks

# Where NNX keeps the names of mesh or logical axes, by flax version.
_SHARDING_KEYS = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")


def is_box(x: Any) -> bool:
    """Whether `x` is an NNX variable or a Linen box."""
    return isinstance(x, nnx.Variable | meta.AxisMetadata)


def unbox(x: Any) -> Any:
    """The array in the wrapper, in however many there are, or `x` itself."""
    while is_box(x):
        x = _content(x)
    return x


def _content(box: Any) -> Any:
    if isinstance(box, nnx.Variable):
        return box.get_raw_value()
    # Flax's own `unbox` asks for the named sharding, which shapes and arrays made elsewhere do not have.
    return box.value if hasattr(box, "value") else box.unbox()


def as_jax(x: Any) -> Any:
    """A parameter, in its wrapper if it has one, as an array of JAX where it is one of numpy; all else as it is."""
    array = unbox(x)
    return rebox(x, jnp.asarray(array)) if isinstance(array, np.ndarray) else x


def optim_bits(x: Any) -> int | None:
    """The `optim_bits` of an NNX variable's metadata, which asks for a precision."""
    return x.get_metadata().get("optim_bits") if isinstance(x, nnx.Variable) else None


def rebox(box: Any, value: Any) -> Any:
    """`value` in the wrapper of `box`, if it has one."""
    if isinstance(box, nnx.Variable):
        return box.replace(value)
    return box.replace_boxed(rebox(_content(box), value)) if isinstance(box, meta.AxisMetadata) else value


def rebox_scales(box: Any, scales: Any, blocks: Blocks | None, shards: int) -> Any:
    """`scales` in the wrapper of `box`, with names for axes that divide; `blocks=None` stands for a placeholder."""

    def keep(names: Any) -> Any:
        if isinstance(names, NamedSharding):
            return NamedSharding(names.mesh, keep(names.spec), memory_kind=names.memory_kind)
        kept = [None if blocks is None else name for name in ((names,) if isinstance(names, str) else names)]
        if blocks is not None and blocks.axis < len(kept):
            if not _divides(scales.shape[blocks.axis], kept[blocks.axis], unbox(box), shards):
                kept[blocks.axis] = None
        return PartitionSpec(*kept) if isinstance(names, PartitionSpec) else tuple(kept)

    if isinstance(box, nnx.Variable):
        found = {key: value for key, value in box.get_metadata().items() if key in _SHARDING_KEYS and value is not None}
        return box.replace(scales, **{key: keep(value) for key, value in found.items()})
    if isinstance(box, meta.AxisMetadata):
        names = getattr(box, "names", None)
        box = box.replace_boxed(rebox_scales(_content(box), scales, blocks, shards))
        return box if names is None else box.replace(names=keep(names))
    return scales


def _divides(n: int, names: Any, p: Any, shards: int) -> bool:
    """Whether `n` blocks can be cut as `names` says: by the mesh where it is known, else by the promise of `shards`."""
    if names is None:
        return True
    mesh = jax.sharding.get_abstract_mesh()
    sharding = getattr(p, "sharding", None)
    if mesh.empty and isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
    names = (names,) if isinstance(names, str) else names
    if not mesh.empty and all(name in mesh.shape for name in names):
        return n % prod(mesh.shape[name] for name in names) == 0
    return n % shards == 0
