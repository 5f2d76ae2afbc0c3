"""Shardings carried by array types.

Under a mesh with Explicit axes, the type of an array says how it is sharded, and JAX wants every result placed. Under
Auto axes types say nothing and the compiler chooses. The functions here do nothing in that case.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from .jax_compat import as_varying, varying_axes


def explicit_sharding(x: Array) -> NamedSharding | None:
    """Returns the sharding in the type of `x`; None if its mesh has no Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether array types say how they are sharded over every axis of a mesh."""
    return all(kind is AxisType.Explicit for kind in mesh.axis_types)


def on_every_device(function: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any):
    """Returns a `jax.shard_map` of a function. An abstract mesh is that of the context, if there is one."""
    in_context = isinstance(mesh, AbstractMesh) and not jax.sharding.get_abstract_mesh().empty
    return jax.shard_map(
        function, mesh=None if in_context else mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def where_it_divides(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Returns a sharding for another shape of the same rank.

    An axis that does not divide into equal shards is replicated.
    """
    spec = []
    for d, names in zip(shape, sharding.spec):
        shards = prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
        spec.append(names if d % shards == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def is_for_one_device(axis_context: Any) -> bool:
    """Returns whether a program computes on one device, or is the body of a `jax.shard_map` over all mesh axes."""
    if hasattr(axis_context, "num_devices"):
        return axis_context.num_devices == 1
    if hasattr(axis_context, "manual_axes"):
        mesh = axis_context.mesh
        manual = set(axis_context.manual_axes) | set(mesh.manual_axes)
        return mesh.size == 1 or manual == set(mesh.axis_names)
    return True  # pmap


def placed_like(x: Array, other: Array) -> Array:
    """Returns `x` with the sharding in the type of `other`, if there is one."""
    sharding = explicit_sharding(other)
    return x if sharding is None or jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def replicated(x: Array) -> Array:
    """Returns `x` replicated over its mesh, if its type says how it is sharded."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def varying_like(x: Array, *others: Array) -> Array:
    """Returns `x` typed as varying over the mesh axes of a `jax.shard_map` that `others` vary over.

    Inside of `shard_map` the type of an array says whether devices hold the same value or each its own.
    """
    axes = tuple(frozenset().union(*map(varying_axes, others)) - varying_axes(x))
    return as_varying(x, axes) if axes else x
