"""Runs a single-device step on every shard of a mesh, without gathering.

Under a mesh with Auto axes it is a `custom_partitioning` with a sharding rule. This works in scan and cond, and needs
no mesh from the user. Under a mesh with Explicit axes array types say how arrays are sharded, and it is a `shard_map`.

Every device gets its shard of the parameter as full blocks, their scales, and the place of the shard in the global
array, which the hash for stochastic rounding needs. If a block would straddle two shards, the blocked axis is gathered
first.

A custom partitioner supports neither vmap nor differentiation. The reference runs there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from ..blockwise.blocks import Blocks
from ..sharding import explicit_sharding, is_explicit, placed_like
from .step import Operands, Step


@dataclass(frozen=True)
class FlatStep:
    """An implementation as a hashable function of flat arrays, as JAX's custom calls need it."""

    implementation: Callable  # (step, operands) -> (out, codes, absmax)
    step: Step
    tree: Any  # of the operands
    shape: tuple[int, ...]  # of the parameter

    def __call__(self, *flat):
        operands = self.tree.unflatten(flat)
        if not self._straddles(operands):
            return self.implementation(self.step, operands)
        # Types cannot describe a block that straddles shards, but the compiler can. It combines
        # the scales of its parts and gathers nothing.
        out = jax.tree.map(lambda x: jax.typeof(x).sharding, (operands.codes[0], operands.codes, operands.absmax))
        return jax.sharding.auto_axes(partial(self.implementation, self.step), out_sharding=out)(operands)

    def _straddles(self, operands: Operands) -> bool:
        """Returns whether array types say that a block straddles devices, under the mesh of the context."""
        sharding, mesh = explicit_sharding(operands.codes[0]), jax.sharding.get_abstract_mesh()
        if sharding is None or not mesh.axis_types or not is_explicit(mesh):
            return False
        spec = spec_of(sharding, len(self.shape))
        return without_straddling(spec, mesh, self.shape, self.step.blocks) != spec


@cache
def per_shard(local: Callable, reference: FlatStep) -> Callable:
    """Returns a function of flat operands that runs `local(step, operands, origin, global_shape)` on every shard."""
    step, tree = reference.step, reference.tree

    def partition(mesh, arguments, results):
        operands = tree.unflatten(arguments)
        shape = operands.codes[0].shape
        spec = without_straddling(spec_of(operands.codes[0].sharding, len(shape)), mesh, shape, step.blocks)

        def run(*flat):
            return local(step, tree.unflatten(flat), place_of_shard(spec, mesh, shape), shape)

        sharded, scalar = (NamedSharding(mesh, PartitionSpec(*s)) for s in ([names or None for names in spec], ()))

        def place(x):
            return sharded if len(x.shape) == len(shape) else scalar

        return mesh, run, jax.tree.map(place, results), jax.tree.map(place, arguments)

    def rule(mesh, value_types, result_types):
        del value_types, result_types
        return _sharding_rule(reference, mesh)

    @cache
    def partitioned(traced: FlatStep):
        call = custom_partitioning(lambda *flat: traced(*flat))
        call.def_partition(partition, sharding_rule=rule)
        return call

    def call(*flat):
        mesh = next((sharding.mesh for sharding in map(explicit_sharding, flat) if sharding is not None), None)
        if mesh is None:
            return partitioned(replace(reference, implementation=local))(*flat)
        if not is_explicit(mesh):  # some axes are not Explicit, and only the compiler knows the sharding over them
            return reference(*flat)
        sharding = explicit_sharding(tree.unflatten(flat).codes[0])
        spec = without_straddling(spec_of(sharding, len(reference.shape)), mesh, reference.shape, step.blocks)
        return on_every_device(local, reference, mesh, spec)(*flat)

    return with_transformations(call, reference)


def on_every_device(local: Callable, reference: FlatStep, mesh: Any, spec: list[tuple[str, ...]]) -> Callable:
    """Returns a function of flat operands that runs `local` in a `shard_map` over all axes of a mesh.

    `spec` has the mesh axes that each axis of the arrays is sharded over.
    """
    step, tree, shape = reference.step, reference.tree, reference.shape
    sharded = PartitionSpec(*[names or None for names in spec])

    def run(*flat):
        return local(step, tree.unflatten(flat), place_of_shard(spec, mesh, shape), shape)

    def call(*flat):
        n, operands = len(step.moments), tree.unflatten(flat)
        codes, absmax = operands.codes, operands.absmax
        specs = tuple(sharded if jnp.ndim(x) == len(shape) else PartitionSpec() for x in flat)
        in_context = isinstance(mesh, AbstractMesh) and not jax.sharding.get_abstract_mesh().empty
        out_specs = sharded, (sharded,) * n, (sharded,) * n
        if explicit_sharding(codes[0]) is not None:
            flat = [jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(flat, specs)]
        mapped = jax.shard_map(
            run, mesh=None if in_context else mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        return jax.tree.map(placed_like, mapped(*flat), (codes[0], codes, absmax))

    return call


def with_transformations(call: Callable, reference: FlatStep) -> Callable:
    """Returns `call` with the reference under vmap and derivatives, which `call` does not support."""

    @custom_vmap
    def batched(*flat):
        return call(*flat)

    @batched.def_vmap
    def _(axis_size, in_batched, *flat):
        out = jax.vmap(reference, [0 if b else None for b in in_batched], axis_size=axis_size)(*flat)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def differentiable(*flat):
        return batched(*flat)

    differentiable.defjvp(lambda primals, tangents: jax.jvp(reference, primals, tangents))
    return differentiable


def spec_of(sharding, ndim: int) -> list[tuple[str, ...]]:
    """Returns the mesh axes that each axis of an array is sharded over; none if XLA does not tell."""
    spec = getattr(sharding, "spec", None) or ()
    spec = [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec]
    return spec + [()] * (ndim - len(spec))


def place_of_shard(spec: list[tuple[str, ...]], mesh, shape: tuple[int, ...]) -> tuple:
    """Returns where the shard of this device starts in an array of `shape`, along each axis."""
    counts = [prod(mesh.shape[name] for name in names) for names in spec]
    return tuple(
        lax.axis_index(names) * (d // n) if names else jnp.int32(0) for names, d, n in zip(spec, shape, counts)
    )


def without_straddling(spec, mesh, shape: tuple[int, ...], blocks: Blocks) -> list[tuple[str, ...]]:
    """Returns `spec` with every axis replicated that would have unequal shards, or blocks that straddle shards."""
    counts = [prod(mesh.shape[name] for name in names) for names in spec]
    return [names if blocks.fit(axis, shape[axis], counts[axis]) else () for axis, names in enumerate(spec)]


def _sharding_rule(reference: FlatStep, mesh) -> SdyShardingRule:
    """Returns how XLA propagates shardings: axis by axis between all arrays, and along the blocked axis to the scales.

    If the shards of this mesh could straddle blocks, the sharding of the scales is independent. Otherwise XLA could
    shard the blocks over a part of a mesh axis, which no PartitionSpec can express.
    """
    shape, blocks = reference.shape, reference.step.blocks
    d, count = shape[blocks.axis], blocks.count(shape)
    axes = [f"axis{k}" for k in range(len(shape))]
    along, fixed, sizes = axes[blocks.axis], (), {}
    if d != count * blocks.size or count == 1:
        fixed = (along, "count")
    elif all(count % shards == 0 for shards in _possible_shard_counts(mesh) if d % shards == 0):
        along, fixed, sizes = CompoundFactor("count", "inside"), ("inside",), {"inside": blocks.size}
    arrays = ArrayMapping(*axes[: blocks.axis], along, *axes[blocks.axis + 1 :])
    scales = ArrayMapping(*axes[: blocks.axis], "count", *axes[blocks.axis + 1 :])
    leaves = range(reference.tree.num_leaves)
    operands = reference.tree.unflatten(leaves)
    mapping = dict.fromkeys(leaves, ArrayMapping())  # scalars
    mapping |= dict.fromkeys([operands.g, operands.p, *operands.codes], arrays) | dict.fromkeys(operands.absmax, scales)
    results = (arrays, *[arrays for _ in operands.codes], *[scales for _ in operands.absmax])
    operands = tuple(mapping[i] for i in leaves)
    return SdyShardingRule(operands, results, need_replication_factors=fixed, **sizes)  # pyright: ignore[reportArgumentType]


def _possible_shard_counts(mesh) -> set[int]:
    """Returns the numbers of shards that an axis can have, over any of the axes of a mesh."""
    counts = {1}
    for size in mesh.shape.values():
        counts |= {size * count for count in counts}
    return counts
