"""Runs a kernel on the shard of each device, because XLA cannot partition a kernel.

    one device, or inside of a `jax.shard_map` over all axes   the kernel runs as it is
    Explicit axes only                                         array types say the sharding: a `shard_map` of our own
    other axes, and `partition_specs` is given                 it says the sharding: a `shard_map` of our own
    neither                                                    GPU: `per_shard.py` asks XLA for the sharding
                                                               TPU: the reference, which XLA partitions

TPU's compiler has no custom partitioner, so XLA cannot be asked there. Platform and number of devices are known when
a program is lowered, so the last decision is made by a primitive (`ops/lowering.py`).
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from ..blockwise.blocks import Blocks
from ..lowering import Program, primitive
from ..sharding import explicit_sharding, is_explicit
from .capabilities import PLATFORMS, Name, Spec
from .per_shard import FlatStep, on_every_device, per_shard, spec_of, with_transformations, without_straddling
from .step import Operands, Step


@dataclass(frozen=True)
class Kernel:
    """A kernel as a hashable function of flat operands and of the place of their shard in the global array.

    name: Which kernel.
    reference: The step that it computes, on the shard.
    shape: The shape of the global array.
    required: True if the user named the kernel, so that it is used or raises.
    """

    name: Name
    reference: FlatStep
    shape: tuple[int, ...]
    required: bool

    def split(self, flat: Any) -> tuple[Operands, tuple]:
        """Returns operands and place."""
        n = self.reference.tree.num_leaves
        return self.reference.tree.unflatten(flat[:n]), tuple(flat[n:])

    def outputs(self, *avals: Any) -> list[Any]:
        """Returns the types of output, codes and scales."""
        operands: Any = self.split(avals)[0]
        return [operands.codes[0].update(dtype=self.reference.step.dtype), *operands.codes, *operands.absmax]


def _reference(*flat: Any, kernel: Kernel):
    return jax.tree.leaves(kernel.reference(*jax.tree.leaves(kernel.split(flat)[0])))


def _run_kernel(*flat: Any, kernel: Kernel):
    operands, origin = kernel.split(flat)
    module = import_module(f".{kernel.name}", __package__)  # imports Pallas, so only where a kernel is lowered
    return jax.tree.leaves(module.run(kernel.reference.step, operands, origin, kernel.shape))


def _may_run(program: Program, *, kernel: Kernel) -> bool:
    """Returns whether the kernel replaces the reference in a program.

    Raises:
        NotImplementedError: The user named the kernel, and it cannot run in this program.
    """
    if kernel.name != PLATFORMS.get(program.kernel_platform or ""):
        # A program for several platforms has a part for each. JAX lowers all parts for all platforms, then drops some.
        if kernel.required:
            needed = "TPU" if kernel.name == "pallas_tpu" else "GPUs with CUDA"
            raise NotImplementedError(
                f"`implementation={kernel.name!r}` runs on {needed}, not on {', '.join(program.platforms)}. "
                "Use None, which takes the best one for the platform."
            )
        return False
    if kernel.name == "pallas_gpu":
        # Triton does not compile for GPUs older than Ampere.
        local = jax.local_devices() if jax.default_backend() == "gpu" else []
        return kernel.required or all(float(getattr(d, "compute_capability", 8.0)) >= 8 for d in local)
    if kernel.required and not program.one_device:
        raise NotImplementedError(
            "`implementation='pallas_tpu'` in a program for several devices needs to know how parameters are sharded. "
            "Use a mesh with Explicit axes, or pass `partition_specs` (PartitionSpecs under jax.set_mesh, or "
            "NamedShardings), or use None, which takes 'xla' here."
        )
    return program.one_device


_step_by_kernel = primitive(
    "step_by_kernel",
    _reference,
    dict.fromkeys(PLATFORMS, _run_kernel),
    may_run=_may_run,
    types=lambda *avals, kernel: kernel.outputs(*avals),
)


def kernel_step(name: Name, reference: FlatStep, spec: Spec | None, required: bool):
    """Returns the step by a kernel, as a function of flat operands. Under vmap and derivatives it is the reference.

    Args:
        name: Which kernel.
        reference: The step that it computes.
        spec: The sharding of the parameter; None if its type says it, or if it is not known.
        required: True if the user named the kernel, so that it is used or raises.
    """

    def call(*flat):
        shape, blocks = reference.shape, reference.step.blocks
        local = _OnOneDevice(name, reference, required)
        operands = reference.tree.unflatten(flat)
        sharding = sharding_of(operands.codes[0], spec)
        if sharding is None:
            return per_shard(local, reference)(*flat) if name == "pallas_gpu" else local(reference.step, operands)
        if has_whole_blocks(sharding, blocks, shape):
            return on_every_device(local, reference, sharding.mesh, spec_of(sharding, len(shape)))(*flat)
        if required:
            raise NotImplementedError(
                f"`implementation={name!r}` cannot run with {sharding.spec}: it does not divide an array of shape "
                f"{shape} into equal shards of full blocks ({blocks.size} along axis {blocks.axis}). Set "
                "StateFormat(shards=...) to the number of devices that an axis is sharded over, or use None."
            )
        return reference(*flat)

    return with_transformations(call, reference)


@dataclass(frozen=True)
class _OnOneDevice:
    """A kernel as an implementation for the shard of one device, at `origin` of the global array of `shape`."""

    name: Name
    reference: FlatStep
    required: bool

    def __call__(self, step: Step, operands: Operands, origin: tuple = (), shape: tuple[int, ...] = ()):
        local = operands.g.shape
        kernel = Kernel(self.name, replace(self.reference, shape=local), shape or local, self.required)
        out, *stored = _step_by_kernel.bind(*jax.tree.leaves(operands), *map(jnp.int32, origin), kernel=kernel)
        n = len(step.moments)
        return out, tuple(stored[:n]), tuple(stored[n:])


def sharding_of(x: Any, spec: Spec | None) -> NamedSharding | None:
    """Returns the sharding of an array over several devices, from its type or from `spec`; None if neither says it."""
    context = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in context.axis_types:
        return None
    sharding = explicit_sharding(x)
    if sharding is None and spec is not None:
        sharding = _named(spec, context, x.ndim)
    elif sharding is not None and not is_explicit(sharding.mesh):
        sharding = None
    return None if sharding is None or sharding.mesh.size == 1 else sharding


def _named(spec: Spec, context: Any, ndim: int) -> NamedSharding | None:
    """Returns a spec on the mesh of the context, or on its own; None if it does not fit the mesh or the array."""
    mesh, spec = (spec.mesh, spec.spec) if isinstance(spec, NamedSharding) else (context, spec)
    if mesh.empty or not (context.empty or context == getattr(mesh, "abstract_mesh", mesh)):
        return None
    entries = [name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,))]
    fits = len(spec) <= ndim and all(name is None or name in mesh.axis_names for name in entries)
    return NamedSharding(mesh, spec) if fits else None


def has_whole_blocks(sharding: NamedSharding, blocks: Blocks, shape: tuple[int, ...]) -> bool:
    """Returns whether all devices have the same number of blocks, and no part of one."""
    spec = spec_of(sharding, len(shape))
    return without_straddling(spec, sharding.mesh, shape, blocks) == spec
