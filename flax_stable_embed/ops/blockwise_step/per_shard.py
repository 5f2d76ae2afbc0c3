"""Runs a step that is written for one device's own array on every device of a mesh, with nothing gathered.

A `custom_partitioning` with a sharding rule works under meshes with Auto axes, in scan and cond, and asks the user for
no mesh; under those with Explicit axes types say how arrays are cut, and a `shard_map` follows them. Every device gets
its piece of the parameter, whole blocks and their scales, and the piece's place in the whole, which the stochastic hash
needs. Where a block would straddle two shards the blocked axis is gathered first.
A custom partitioner knows neither vmap nor differentiation: there the reference takes over.
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
    """An implementation as a hashable function of flat arrays, which is what JAX's custom calls want."""

    implementation: Callable  # (step, operands) -> (out, codes, absmax)
    step: Step
    tree: Any  # of the operands
    shape: tuple[int, ...]  # of the parameter

    def __call__(self, *flat):
        operands = self.tree.unflatten(flat)
        if not self._straddles(operands):
            return self.implementation(self.step, operands)
        # Types cannot say how the parts of a block lie, but the compiler can: it combines scales and gathers nothing.
        out = jax.tree.map(lambda x: jax.typeof(x).sharding, (operands.codes[0], operands.codes, operands.absmax))
        return jax.sharding.auto_axes(partial(self.implementation, self.step), out_sharding=out)(operands)

    def _straddles(self, operands: Operands) -> bool:
        """Whether types of the mesh in the context say that a block lies on several devices."""
        sharding, mesh = explicit_sharding(operands.codes[0]), jax.sharding.get_abstract_mesh()
        if sharding is None or not mesh.axis_types or not is_explicit(mesh):
            return False
        cuts = spec_of(sharding, len(self.shape))
        return without_straddling(cuts, mesh, self.shape, self.step.blocks) != cuts


@cache
def per_shard(local: Callable, reference: FlatStep) -> Callable:
    """`local(step, operands, origin, global_shape)` on every device's piece, as a function of flat operands."""
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
        if not is_explicit(mesh):  # some axes are not Explicit: only the compiler can say how it cuts them
            return reference(*flat)
        sharding = explicit_sharding(tree.unflatten(flat).codes[0])
        cuts = without_straddling(spec_of(sharding, len(reference.shape)), mesh, reference.shape, step.blocks)
        return on_every_device(local, reference, mesh, cuts)(*flat)

    return with_transformations(call, reference)


def on_every_device(local: Callable, reference: FlatStep, mesh: Any, cuts: list[tuple[str, ...]]) -> Callable:
    """`local` in a `shard_map` over all axes of a mesh, each device with its piece of arrays that are cut by `cuts`."""
    step, tree, shape = reference.step, reference.tree, reference.shape
    cut = PartitionSpec(*[names or None for names in cuts])

    def run(*flat):
        return local(step, tree.unflatten(flat), place_of_shard(cuts, mesh, shape), shape)

    def call(*flat):
        n, operands = len(step.moments), tree.unflatten(flat)
        codes, absmax = operands.codes, operands.absmax
        specs = tuple(cut if jnp.ndim(x) == len(shape) else PartitionSpec() for x in flat)
        in_context = isinstance(mesh, AbstractMesh) and not jax.sharding.get_abstract_mesh().empty
        where = None if in_context else mesh
        options = {"in_specs": specs, "out_specs": (cut, (cut,) * n, (cut,) * n), "check_vma": False}
        if explicit_sharding(codes[0]) is not None:
            flat = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(flat, specs)]
        results = jax.shard_map(run, mesh=where, **options)(*flat)
        return jax.tree.map(placed_like, results, (codes[0], codes, absmax))

    return call


def with_transformations(call: Callable, reference: FlatStep) -> Callable:
    """`call`, but under vmap and where it is differentiated, which it does not know, the reference."""

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
    """The mesh axes that cut each axis of an array; none where XLA does not tell."""
    spec = getattr(sharding, "spec", None) or ()
    spec = [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec]
    return spec + [()] * (ndim - len(spec))


def place_of_shard(spec: list[tuple[str, ...]], mesh, shape: tuple[int, ...]) -> tuple:
    """Where a device's own piece begins in an array of `shape`, along each axis."""
    ways = [prod(mesh.shape[name] for name in names) for names in spec]
    return tuple(lax.axis_index(names) * (d // n) if names else jnp.int32(0) for names, d, n in zip(spec, shape, ways))


def without_straddling(spec, mesh, shape: tuple[int, ...], blocks: Blocks) -> list[tuple[str, ...]]:
    """`spec` without the cuts that would leave unequal pieces or straddle a block."""
    ways = [prod(mesh.shape[name] for name in names) for names in spec]
    return [names if blocks.fit(axis, shape[axis], ways[axis]) else () for axis, names in enumerate(spec)]


def _sharding_rule(reference: FlatStep, mesh) -> SdyShardingRule:
    """How shardings travel: axis by axis between all arrays; along the blocked axis from blocks to their scales.

    Where some cut of this mesh would straddle blocks, scales go their own way: else XLA could cut the blocks by a part
    of a mesh axis, which no PartitionSpec can say.
    """
    shape, blocks = reference.shape, reference.step.blocks
    d, count = shape[blocks.axis], blocks.count(shape)
    axes = [f"axis{k}" for k in range(len(shape))]
    along, fixed, sizes = axes[blocks.axis], (), {}
    if d != count * blocks.size or count == 1:
        fixed = (along, "count")
    elif all(count % ways == 0 for ways in _possible_shard_counts(mesh) if d % ways == 0):
        along, fixed, sizes = CompoundFactor("count", "inside"), ("inside",), {"inside": blocks.size}
    whole = ArrayMapping(*axes[: blocks.axis], along, *axes[blocks.axis + 1 :])
    scales = ArrayMapping(*axes[: blocks.axis], "count", *axes[blocks.axis + 1 :])
    leaves = range(reference.tree.num_leaves)
    operands = reference.tree.unflatten(leaves)
    mapping = dict.fromkeys(leaves, ArrayMapping())  # scalars
    mapping |= dict.fromkeys([operands.g, operands.p, *operands.codes], whole) | dict.fromkeys(operands.absmax, scales)
    results = (whole, *[whole for _ in operands.codes], *[scales for _ in operands.absmax])
    operands = tuple(mapping[i] for i in leaves)
    return SdyShardingRule(operands, results, need_replication_factors=fixed, **sizes)  # pyright: ignore[reportArgumentType]


def _possible_shard_counts(mesh) -> set[int]:
    """In how many pieces some of the mesh's axes can cut an axis."""
    cuts = {1}
    for size in mesh.shape.values():
        cuts |= {size * ways for ways in cuts}
    return cuts
