"""Shardings that a type says, which it does under a mesh with Explicit axes; elsewhere the compiler chooses."""

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding


def explicit_sharding(x: Array) -> NamedSharding | None:
    """The sharding that the type of `x` says; None where it says nothing."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether types say for all axes of a mesh what they cut."""
    return all(kind is AxisType.Explicit for kind in mesh.axis_types)


def placed_like(x: Array, other: Array) -> Array:
    """`x` with the sharding that the type of `other` says, if it says one."""
    sharding = explicit_sharding(other)
    return x if sharding is None or jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def varying_like(x: Array, *others: Array) -> Array:
    """`x`, the same on all devices of a `jax.shard_map`, as one of which each device has its own where `others` are."""
    axes = tuple(frozenset().union(*map(_varying_axes, others)) - _varying_axes(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _varying_axes(x: Array) -> frozenset:
    aval = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # by the version of JAX
