"""Runs a kernel on the shard of each device, because XLA cannot partition a kernel.

    one device, or inside of a `jax.shard_map` over all axes   the kernel runs as it is
    Explicit axes only                                         array types say the sharding: a `shard_map` of our own
    other axes, and the sharding is known (`as_sharded.py`)    the same; what `init` saw counts only on the same devices
    neither, or blocks that straddle devices                   the reference, which XLA partitions

On CPU the loop of `cpu.py` is the kernel. Platform and number of devices are known when a program is lowered, so the
last decision is made by a primitive (`ops/lowering.py`). A compiled program contains no Python function, so it can be
cached, serialized and exported.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..lowering import Program, kernels_compile_here, primitive
from ..sharding import explicit_sharding, is_explicit
from .capabilities import PLATFORMS, Name, Seen, Spec
from .per_shard import has_whole_blocks, like_results, per_shard, sharding_of
from .reference import partitioned
from .step import Operands, Step


@dataclass(frozen=True)
class LocalStep:
    """The step of one device as a function of flat arrays: the operands, and the place of their shard.

    step: Everything static about the step.
    tree: The pytree of the operands.
    shape: The shape of the global array.
    kernels: The kernels that can take it.
    required: True if the user named the kernel, so that it is used or raises.
    """

    step: Step
    tree: Any
    shape: tuple[int, ...]
    kernels: tuple[Name, ...]
    required: bool

    def split(self, flat: Any) -> tuple[Operands, tuple]:
        """Returns operands and place. The place is empty if they are the global arrays."""
        n = self.tree.num_leaves
        return self.tree.unflatten(flat[:n]), tuple(flat[n:])

    def __call__(self, operands: Operands, origin: tuple = ()):
        """Returns output, codes and scales."""
        return self.join(_local_step.bind(*jax.tree.leaves(operands), *map(jnp.int32, origin), local=self))

    def join(self, results: Any):
        """Returns flat results of the primitive as output, codes and scales."""
        outputs = len(self.step.outputs)
        out, stored = results[0] if outputs == 1 else tuple(results[:outputs]), results[outputs:]
        n = len(self.step.moments)
        return out, tuple(stored[:n]), tuple(stored[n:])


def types(*avals: Any, local: LocalStep) -> list[Any]:
    operands: Any = local.split(avals)[0]
    outputs = [operands.codes[0].update(dtype=dtype) for dtype in local.step.outputs]
    return [*outputs, *operands.codes, *operands.absmax]


def _reference(*flat: Any, local: LocalStep):
    return jax.tree.leaves(partitioned(local.step, *local.split(flat), local.shape))


def _run(module: str):
    """Returns the step by the kernel of a module."""

    def run(*flat: Any, local: LocalStep):
        kernel = import_module(f".{module}", __package__)  # imports Pallas, so only where a kernel is lowered
        return jax.tree.leaves(kernel.run(local.step, *local.split(flat), local.shape))

    return run


def _may_run(program: Program, *, local: LocalStep) -> bool:
    """Returns whether the kernel of its platform replaces the reference in a program.

    Raises:
        NotImplementedError: The user named the kernel, and it cannot run in this program.
    """
    name = PLATFORMS.get(program.kernel_platform or "")
    if local.required:
        _check_that_it_runs(local.kernels[0], name, program)
    if program.kernel_platform == "cpu":
        return program.one_device
    if name == "pallas_gpu" and not local.required and not kernels_compile_here():
        return False
    return name in local.kernels and program.one_device


def _check_that_it_runs(name: Name, found: Name | None, program: Program) -> None:
    if name != found:
        needed = "TPU" if name == "pallas_tpu" else "GPUs with CUDA"
        raise NotImplementedError(
            f"`implementation={name!r}` runs on {needed}, not on {', '.join(program.platforms)}. "
            "Use None, which takes the best one for the platform."
        )
    if not program.one_device:
        raise NotImplementedError(
            f"`implementation={name!r}` in a program for several devices needs to know how parameters are sharded. "
            "Use a mesh with Explicit axes, or pass `partition_specs` (PartitionSpecs under jax.set_mesh, or "
            "NamedShardings), or use None, which takes 'xla' here."
        )


MODULES = {"cpu": "cpu"} | PLATFORMS
_local_step = primitive(
    "local_step",
    _reference,
    {platform: _run(module) for platform, module in MODULES.items()},
    may_run=_may_run,
    types=types,
)


@dataclass(frozen=True)
class SeenStep:
    """The step of a parameter that had this sharding when `init` saw it.

    Whether a program is for the devices of that sharding is known when it is lowered.
    """

    local: LocalStep
    sharding: NamedSharding

    def __call__(self, operands: Operands):
        """Returns output, codes and scales."""
        return self.local.join(_seen_step.bind(*jax.tree.leaves(operands), seen=self))


def _seen_reference(*flat: Any, seen: SeenStep):
    return jax.tree.leaves(seen.local(seen.local.tree.unflatten(flat)))


def _seen_per_shard(*flat: Any, seen: SeenStep):
    return jax.tree.leaves(per_shard(seen.local, seen.local.step, seen.local.tree.unflatten(flat), seen.sharding))


def _is_for_the_seen_devices(program: Program, *, seen: SeenStep) -> bool:
    mesh: Any = seen.sharding.mesh  # of devices, because `init` sees only those
    if program.num_devices != mesh.size:
        return False
    return program.devices is None or set(program.devices) == set(mesh.devices.flat)


_seen_step = primitive(
    "seen_step",
    _seen_reference,
    dict.fromkeys(MODULES, _seen_per_shard),
    may_run=_is_for_the_seen_devices,
    types=lambda *avals, seen: types(*avals, local=seen.local),
)


def run_sharded(local: LocalStep, operands: Operands, spec: Spec | None):
    """Runs a step on every device that has a shard of the parameter, and returns `(output, codes, absmax)`.

    Args:
        local: The step of one device.
        operands: The global arrays.
        spec: The sharding of the parameter; None if its type says it, or if it is not known.

    Raises:
        NotImplementedError: The user named a kernel, and a block would straddle devices.
    """
    sharding = sharding_of(operands.codes[0], spec)
    if sharding is None:
        in_kernel = local.required or not _is_partly_explicit(operands)
        return local(operands) if in_kernel else partitioned(local.step, operands)
    if isinstance(spec, Seen) and explicit_sharding(operands.codes[0]) is None:
        fits = has_whole_blocks(sharding, local.step.blocks, local.shape)
        return SeenStep(local, sharding)(operands) if fits else local(operands)
    if has_whole_blocks(sharding, local.step.blocks, local.shape):
        return per_shard(local, local.step, operands, sharding)
    if local.required:
        size, axis = local.step.blocks.size, local.step.blocks.axis
        raise NotImplementedError(
            f"`implementation={local.kernels[0]!r}` cannot run with {sharding.spec}: it does not divide an array of "
            f"shape {local.shape} into equal shards of full blocks ({size} along axis {axis}). Set "
            "StateFormat(shards=...) to the number of devices that an axis is sharded over, or use None."
        )
    if explicit_sharding(operands.codes[0]) is None:
        return partitioned(local.step, operands)
    # Types cannot describe a block that straddles devices, but the compiler can. It combines the scales of its parts
    # and gathers nothing.
    like = like_results(local.step, operands.codes, operands.absmax)
    out = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    return jax.sharding.auto_axes(lambda operands: partitioned(local.step, operands), out_sharding=out)(operands)


def _is_partly_explicit(operands: Operands) -> bool:
    """Returns whether types say the sharding over some mesh axes, and only the compiler knows that over the others."""
    sharding = explicit_sharding(operands.codes[0])
    return sharding is not None and sharding.mesh.size > 1 and not is_explicit(sharding.mesh)
