"""Where the kernels run: on one device's own array, since XLA cannot cut them.

On one device, and inside of a `jax.shard_map` over all axes, a kernel runs as it is. Under a mesh with Explicit axes
alone types say how an array is cut, and under others `partition_specs` does: then it runs in a `shard_map` of our own.
Where nothing says it, `per_shard.py` runs `pallas_gpu` on every device's piece; TPU's compiler has no custom
partitioner, so that the reference runs there.

Which of these holds is known when a program is lowered, and so is its platform: the choice is a primitive of its own.
No kernel language is imported before one is lowered.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding

from ..blockwise.blocks import Blocks
from ..sharding import explicit_sharding, is_explicit, is_for_one_device
from .capabilities import Name, Spec
from .per_shard import FlatStep, on_every_device, per_shard, specs_of, whole_blocks, with_transformations
from .step import Operands, Step


@dataclass(frozen=True)
class Kernel:
    """A kernel as a hashable function of flat operands, and of the place of their array in the whole one of `shape`.

    required: it was asked for by name, so that it runs or raises.
    """

    name: Name
    reference: FlatStep
    shape: tuple[int, ...]
    required: bool

    def split(self, flat: Any) -> tuple[Operands, tuple]:
        """Operands and place."""
        n = self.reference.tree.num_leaves
        return self.reference.tree.unflatten(flat[:n]), tuple(flat[n:])

    def outputs(self, *avals: Any) -> list[Any]:
        """The types of output, codes and scales."""
        operands: Any = self.split(avals)[0]
        return [operands.codes[0].update(dtype=self.reference.step.dtype), *operands.codes, *operands.absmax]


_step_by_kernel = Primitive("step_by_kernel")
_step_by_kernel.multiple_results = True
_step_by_kernel.def_abstract_eval(lambda *avals, kernel: kernel.outputs(*avals))


def _by_reference(context: Any, *flat: Any, kernel: Kernel):
    def reference(*flat):
        return jax.tree.leaves(kernel.reference(*jax.tree.leaves(kernel.split(flat)[0])))

    return mlir.lower_fun(reference, multiple_results=True)(context, *flat)


def _by_kernel(module: Any, context: Any, *flat: Any, kernel: Kernel):
    def run(*flat):
        operands, origin = kernel.split(flat)
        return jax.tree.leaves(module.run(kernel.reference.step, operands, origin, kernel.shape))

    return mlir.lower_fun(run, multiple_results=True)(context, *flat)


def _lower_for_tpu(context: Any, *flat: Any, kernel: Kernel):
    if kernel.name != "pallas_tpu":
        return _lower_elsewhere(context, *flat, kernel=kernel)

    alone = is_for_one_device(context.module_context.axis_context)
    if kernel.required and not alone:
        raise NotImplementedError(
            "`implementation='pallas_tpu'` in a program for several devices needs to know how parameters are cut: use "
            "a mesh with Explicit axes, or give `partition_specs` (of PartitionSpec under jax.set_mesh, or of "
            "NamedSharding), or implementation=None, which takes 'xla' here."
        )
    if not alone:
        return _by_reference(context, *flat, kernel=kernel)
    from . import pallas_tpu

    return _by_kernel(pallas_tpu, context, *flat, kernel=kernel)


def _lower_for_cuda(context: Any, *flat: Any, kernel: Kernel):
    if kernel.name != "pallas_gpu" or (not kernel.required and _is_too_old()):
        return _lower_elsewhere(context, *flat, kernel=kernel)

    from . import pallas_gpu

    return _by_kernel(pallas_gpu, context, *flat, kernel=kernel)


def _is_too_old() -> bool:
    """Whether this process has a GPU that Triton does not compile for: older than Ampere."""
    if jax.default_backend() != "gpu":
        return False
    return any(float(getattr(d, "compute_capability", 8.0)) < 8 for d in jax.local_devices())


def _lower_elsewhere(context: Any, *flat: Any, kernel: Kernel):
    """Also in programs for several platforms, whose parts for the others are lowered and then dropped."""
    if not kernel.required:
        return _by_reference(context, *flat, kernel=kernel)
    needed = "TPU" if kernel.name == "pallas_tpu" else "GPUs with CUDA"
    raise NotImplementedError(
        f"`implementation={kernel.name!r}` runs on {needed}, not on {', '.join(context.module_context.platforms)}. "
        "Use None, which takes what there is."
    )


mlir.register_lowering(_step_by_kernel, _lower_for_tpu, platform="tpu")
mlir.register_lowering(_step_by_kernel, _lower_for_cuda, platform="cuda")
mlir.register_lowering(_step_by_kernel, _lower_elsewhere)


def kernel_step(name: Name, reference: FlatStep, spec: Spec | None, required: bool):
    """The step by a kernel, as a function of flat operands; under vmap and where it is differentiated, the reference.

    Args:
        name: which kernel.
        reference: what it computes.
        spec: how the parameter is cut; None where its type says it, or nothing.
        required: it was asked for by name.
    """

    def call(*flat):
        shape, blocks = reference.shape, reference.step.blocks
        local = _OnOneDevice(name, reference, required)
        operands = reference.tree.unflatten(flat)
        sharding = sharding_of(operands.codes[0], spec)
        if sharding is None:
            return per_shard(local, reference)(*flat) if name == "pallas_gpu" else local(reference.step, operands)
        if is_cut_evenly(sharding, blocks, shape):
            return on_every_device(local, reference, sharding.mesh, specs_of(sharding, len(shape)))(*flat)
        if required:
            raise NotImplementedError(
                f"`implementation={name!r}`: {sharding.spec} does not cut an array of {shape} evenly or cuts through "
                f"its blocks of {blocks.size} along axis {blocks.axis}. Set StateFormat(shards=...) to the ways it is "
                "cut, or take None."
            )
        return reference(*flat)

    return with_transformations(call, reference)


@dataclass(frozen=True)
class _OnOneDevice:
    """A kernel as an implementation for one device's own array, which lies at `origin` of one of `shape`."""

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
    """How an array is cut, where its type, or `spec` and a mesh, say it for all axes of a mesh of several devices."""
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
    """A spec on the mesh of the context, or its own; None where it does not fit mesh or array."""
    mesh, spec = (spec.mesh, spec.spec) if isinstance(spec, NamedSharding) else (context, spec)
    if mesh.empty or not (context.empty or context == getattr(mesh, "abstract_mesh", mesh)):
        return None
    entries = [name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,))]
    fits = len(spec) <= ndim and all(name is None or name in mesh.axis_names for name in entries)
    return NamedSharding(mesh, spec) if fits else None


def is_cut_evenly(sharding: NamedSharding, blocks: Blocks, shape: tuple[int, ...]) -> bool:
    """Whether every device has whole blocks, and as many."""
    cuts = specs_of(sharding, len(shape))
    return whole_blocks(cuts, sharding.mesh, shape, blocks) == cuts
