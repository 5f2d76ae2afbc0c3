"""Runs the step of one device on every shard of a mesh in a `jax.shard_map`, without gathering.

Every device gets its shard of the parameter as full blocks, their scales, and the place of the shard in the global
array, which dithered and stochastic rounding need.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ..blockwise.blocks import Blocks
from ..sharding import explicit_sharding, is_explicit, on_every_device, placed_like
from .capabilities import Seen, Spec
from .step import Operands, Step


def per_shard(local: Callable, step: Step, operands: Operands, sharding: NamedSharding):
    """Runs `local(operands, origin)` on every device of a mesh, and returns global `(output, codes, absmax)`.

    Args:
        local: The step of one device. Its `origin` is where the shard starts in the global array, along each axis.
        step: Everything static about it.
        operands: The global arrays.
        sharding: How they are sharded. `has_whole_blocks` is true of it.
    """
    mesh, codes, absmax = sharding.mesh, operands.codes, operands.absmax
    shape = codes[0].shape
    spec = axis_names(sharding, len(shape))
    sharded = PartitionSpec(*[names or None for names in spec])
    # Codes and scales are sharded alike: `has_whole_blocks` says that both have equal shards.
    specs = jax.tree.map(lambda x: sharded if jnp.ndim(x) == len(shape) else PartitionSpec(), operands)
    out_specs = jax.tree.map(lambda _: sharded, like_results(step, codes, absmax))
    if explicit_sharding(codes[0]) is not None:
        operands = jax.tree.map(lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s)), operands, specs)
    mapped = on_every_device(
        lambda shard: local(shard, place_of_shard(spec, mesh, shape)), mesh, in_specs=(specs,), out_specs=out_specs
    )
    return jax.tree.map(placed_like, mapped(operands), like_results(step, codes, absmax))


def like_results(step: Step, codes: tuple, absmax: tuple) -> tuple:
    """Returns arrays that are sharded as the output, the codes and the scales of a step."""
    outputs = len(step.outputs)
    return codes[0] if outputs == 1 else (codes[0],) * outputs, codes, absmax


def sharding_of(x: Any, spec: Spec | None) -> NamedSharding | None:
    """Returns the sharding of an array over several devices, from its type or from `spec`; None if neither says it."""
    context = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in context.axis_types:
        return None
    sharding = explicit_sharding(x)
    if isinstance(spec, Seen):  # only the mesh in the context tells that it is still the same
        spec = None if context.empty else spec.sharding
    if sharding is None and spec is not None:
        sharding = _named(spec, context, x.ndim)
    elif sharding is not None and not is_explicit(sharding.mesh):
        sharding = None
    return None if sharding is None or sharding.mesh.size == 1 else sharding


def _named(spec: PartitionSpec | NamedSharding, context: Any, ndim: int) -> NamedSharding | None:
    """Returns a spec on the mesh of the context, or on its own; None if it does not fit the mesh or the array."""
    mesh, spec = (spec.mesh, spec.spec) if isinstance(spec, NamedSharding) else (context, spec)
    if mesh.empty or not (context.empty or mesh.shape_tuple == context.shape_tuple):
        return None
    if isinstance(mesh, AbstractMesh) and not context.empty:
        mesh = context  # which knows the types of its axes, and may know its devices
    entries = [name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,))]
    fits = len(spec) <= ndim and all(name is None or name in mesh.axis_names for name in entries)
    return NamedSharding(mesh, spec) if fits else None


def has_whole_blocks(sharding: NamedSharding, blocks: Blocks, shape: tuple[int, ...]) -> bool:
    """Returns whether all devices have the same number of blocks, and no part of one."""
    return all(
        not names or blocks.fit(axis, shape[axis], prod(sharding.mesh.shape[name] for name in names))
        for axis, names in enumerate(axis_names(sharding, len(shape)))
    )


def axis_names(spec: NamedSharding | PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """Returns the mesh axes that each axis of an array is sharded over."""
    entries = spec.spec if isinstance(spec, NamedSharding) else spec
    names = [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in entries]
    return names + [()] * (ndim - len(names))


def place_of_shard(spec: list[tuple[str, ...]], mesh: Any, shape: tuple[int, ...]) -> tuple:
    """Returns where the shard of this device starts in an array of `shape`, along each axis."""
    counts = [prod(mesh.shape[name] for name in names) for names in spec]
    return tuple(
        lax.axis_index(names) * (d // n) if names else jnp.int32(0) for names, d, n in zip(spec, shape, counts)
    )
