"""Unwraps and rewraps parameters: NNX variables and Linen boxes carry sharding metadata next to the array.

The state of a wrapped parameter is wrapped, too. Codes have the parameter's shape, so they take its wrapper as it is.
Scales are shorter along the blocked axis. Their wrapper keeps the mesh axis names of that axis only if the number of
blocks is known to be divisible by the number of shards.
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

# Metadata in which NNX stores the names of mesh axes or logical axes, depending on the version of Flax.
_SHARDING_KEYS = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")


def is_box(x: Any) -> bool:
    """Returns whether `x` is an NNX variable or a Linen box."""
    return isinstance(x, nnx.Variable | meta.AxisMetadata)


def is_nnx_optimizer(x: Any) -> bool:
    """Returns whether `x` is an `nnx.Optimizer`, which has a transform but is none."""
    return isinstance(x, nnx.Optimizer)


def is_never_trained(x: Any) -> bool:
    """Returns whether `x` is an NNX variable of a kind that no optimizer trains, such as batch statistics."""
    return isinstance(x, nnx.BatchStat | nnx.Cache | nnx.Intermediate | nnx.RngState | nnx.OptState)


def unbox(x: Any) -> Any:
    """Returns the array inside all wrappers of `x`, or `x` itself if it has none."""
    while is_box(x):
        x = _content(x)
    return x


def _content(box: Any) -> Any:
    if isinstance(box, nnx.Variable):
        return box.get_raw_value()
    # Flax's own `unbox` applies the named sharding, which fails for ShapeDtypeStructs and arrays placed otherwise.
    return box.value if hasattr(box, "value") else box.unbox()


def as_jax(x: Any) -> Any:
    """Converts a NumPy array to a JAX array inside its wrapper; returns anything else unchanged."""
    array = unbox(x)
    return rebox(x, jnp.asarray(array)) if isinstance(array, np.ndarray) else x


def optim_bits(x: Any) -> Any:
    """Returns the `optim_bits` in the metadata of an NNX variable, by which a module asks for a precision, or None."""
    return x.get_metadata().get("optim_bits") if isinstance(x, nnx.Variable) else None


def rebox(box: Any, value: Any) -> Any:
    """Puts `value` into the wrapper of `box`; returns it as it is if `box` is not a wrapper."""
    if isinstance(box, nnx.Variable):
        return box.replace(value)
    return box.replace_boxed(rebox(_content(box), value)) if isinstance(box, meta.AxisMetadata) else value


def rebox_scales(box: Any, scales: Any, blocks: Blocks | None, shards: int) -> Any:
    """Puts scales into the wrapper of `box`, with the mesh axis names that fit their shape.

    Args:
        box: The parameter.
        scales: Its scales, with the rank of the parameter.
        blocks: The blocks of the parameter. None if it is not in 8 bits: the scales are then a placeholder with one
            element, whose axes have no names.
        shards: The number of shards that the block layout promises to fit (`StateFormat.shards`).
    """

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
    """Returns whether an axis of `n` blocks can be sharded over the mesh axes `names`.

    If no mesh is known, `names` are assumed to stand for `shards` devices.
    """
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
