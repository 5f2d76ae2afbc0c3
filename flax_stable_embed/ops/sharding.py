"""Shardings that a type says, which it does under a mesh with Explicit axes; elsewhere the compiler chooses."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def explicit_sharding(x: Array) -> NamedSharding | None:
    """The sharding that the type of `x` says; None where it says nothing."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether types say for all axes of a mesh what they cut."""
    return all(kind is AxisType.Explicit for kind in mesh.axis_types)


def where_it_divides(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """A sharding for an array of another shape of that rank: without the cuts that would not give equal pieces."""
    spec = []
    for d, names in zip(shape, sharding.spec):
        ways = prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
        spec.append(names if d % ways == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def is_for_one_device(axis_context: Any) -> bool:
    """Whether a program with this context is one device's own: all there is, or a part that is written by hand."""
    if hasattr(axis_context, "num_devices"):
        return axis_context.num_devices == 1
    if hasattr(axis_context, "manual_axes"):
        mesh = axis_context.mesh
        by_hand = set(axis_context.manual_axes) | set(mesh.manual_axes)
        return mesh.size == 1 or by_hand == set(mesh.axis_names)
    return True  # pmap


def placed_like(x: Array, other: Array) -> Array:
    """`x` with the sharding that the type of `other` says, if it says one."""
    sharding = explicit_sharding(other)
    return x if sharding is None or jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def lying_like(x: Array, other: Any) -> Array:
    """`x` on devices as `other` of its shape lies: by its type, as an array, or under jit as the compiler puts it."""
    if isinstance(other, Tracer):
        # Element by element the compiler cuts both alike. That no number is both it does not see.
        wide, x = other.astype(jnp.float32), placed_like(x, other)
        return jnp.where((wide > 256) & (wide < -256), jnp.zeros_like(x), x)
    placed = isinstance(other, Array) and other.committed  # else it goes along with others, and so must `x`
    return jax.device_put(x, other.sharding) if placed else x


def varying_like(x: Array, *others: Array) -> Array:
    """`x`, the same on all devices of a `jax.shard_map`, as one of which each device has its own where `others` are."""
    axes = tuple(frozenset().union(*map(_varying_axes, others)) - _varying_axes(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _varying_axes(x: Array) -> frozenset:
    aval = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # by the version of JAX
