"""Runs a step by the implementation that suits platform and shape, or by a named one.

    None          a kernel where the platform has one that can take the array, else XLA
    "xla"         the reference, compiled by XLA; on CPU in chunks that fit the caches (`cpu.py`)
    "pallas_tpu"  one Mosaic kernel for TPU
    "pallas_gpu"  one Triton kernel for GPU

None works everywhere. A named implementation is used or raises an error.
"""

from typing import Any, Literal

import jax

from ..blockwise.blocks import Blocks
from ..lowering import kernels_compile_here
from ..sharded_like import sharded_like
from ..sharding import varying_like
from . import capabilities
from .as_sharded import run_as_sharded
from .capabilities import PLATFORMS, Name, Seen, Spec
from .lowering import LocalStep
from .per_shard import has_whole_blocks, sharding_of
from .step import Operands, Step

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


def step_blockwise(
    step: Step,
    operands: Operands,
    implementation: Implementation | None = None,
    spec: Spec | None = None,
    parameter: jax.Array | None = None,
):
    """Runs one step and returns `(output, codes, absmax)`. The output of a split parameter is a pair.

    Args:
        step: Everything static about the step.
        operands: Its arrays.
        implementation: Name of the implementation. If None, the best one for platform and shape.
        spec: The sharding of the parameter, for a mesh with Auto axes, where array types do not say it.
        parameter: The parameter, which may show its sharding even if the step does not read it.

    Raises:
        ValueError: The named implementation cannot take this array.
        NotImplementedError: The named implementation cannot run on the platform or mesh of the program.
    """
    check_implementation(implementation)
    if operands.g.shape:
        out, codes, absmax = _step(step, operands, implementation, spec, parameter)
        codes = tuple(map(sharded_like, codes, operands.codes))  # the compiler may gather them otherwise
        if step.fused:
            out = jax.tree.map(lambda x: sharded_like(x, operands.p), out)
        return out, codes, absmax
    fields = ("g", "p", "codes", "absmax", "remainder")
    arrays = jax.tree.map(lambda x: x.reshape(1), {name: getattr(operands, name) for name in fields})
    operands = operands._replace(**arrays)
    return jax.tree.map(lambda x: x.reshape(()), _step(step, operands, implementation, None))


def _step(
    step: Step, operands: Operands, implementation: Implementation | None, spec: Spec | None, parameter: Any = None
):
    flat, tree = jax.tree.flatten(operands)
    flat = [varying_like(x, *flat) for x in flat]  # inside of shard_map results vary over the axes of any operand
    shape = operands.g.shape
    dtypes = {x.dtype for x in (operands.g, operands.p, step) if x is not None}
    why_not: dict[Name, str | None] = {
        name: capabilities.refusal(name, step.blocks, shape, *dtypes) for name in PLATFORMS.values()
    }
    if implementation is None:
        kernels: tuple[Name, ...] = tuple(name for name, why in why_not.items() if why is None)
    elif implementation == "xla":
        kernels = ()
    elif why := why_not[implementation]:
        raise ValueError(refused(implementation, shape, why))
    else:
        kernels = (implementation,)
    local = LocalStep(step, tree, shape, kernels, implementation not in (None, "xla"))
    return run_as_sharded(local, tree.unflatten(flat), spec, parameter if operands.p is None else operands.p)


def refused(name: str, shape: tuple[int, ...], why: str) -> str:
    """Returns the error for a named implementation that cannot take an array."""
    return (
        f"`implementation={name!r}` cannot take an array of shape {shape}: {why}. Use None, which takes 'xla' there, "
        "or a rule with another StateFormat."
    )


def check_implementation(implementation: str | None) -> None:
    """Checks that `implementation` is None or the name of an implementation."""
    if implementation not in (None, "xla", "pallas_tpu", "pallas_gpu"):
        raise ValueError(f"`implementation` must be None, 'xla', 'pallas_tpu' or 'pallas_gpu', got {implementation!r}.")


def what_runs(
    implementation: Implementation | None,
    path: str,
    blocks: Blocks,
    parameter: jax.Array,
    spec: Spec | None = None,
    *,
    platform: str | None = None,
    devices: int | None = None,
) -> str:
    """Returns the name of the implementation that runs a parameter's step, and the reason if it is no kernel.

    Args:
        implementation: The one that the user asked for, or None.
        path: The path of the parameter, for errors.
        blocks: The blocks of its moments.
        parameter: The parameter, or its shape and dtype.
        spec: The sharding of the parameter, for a mesh with Auto axes.
        platform: "cpu", "tpu", "gpu" or "cuda". If None, the platform of this process.
        devices: The number of devices that the program runs on. If None, all devices of this process.

    Raises:
        ValueError: A named implementation cannot take this array.
    """
    platform = {"gpu": "cuda"}.get(platform, platform) if platform else _platform()
    name: Implementation = implementation or PLATFORMS.get(platform, "xla")
    why = None if name == "xla" else capabilities.refusal(name, blocks, parameter.shape, parameter.dtype)
    if implementation and why:
        raise ValueError(f"Parameter {path!r}: {refused(name, parameter.shape, why)}")
    if implementation or name == "xla":
        return name
    if not why and name == "pallas_gpu" and not kernels_compile_here():
        why = "the kernel needs a GPU with compute capability 8.0"
    if not why and (devices or jax.device_count()) > 1:
        sharding = sharding_of(parameter, spec.sharding if isinstance(spec, Seen) else spec)
        if sharding is None:
            why = "describe does not know its sharding" if spec is None else "no mesh is set for its PartitionSpec"
        elif not has_whole_blocks(sharding, blocks, parameter.shape):
            why = f"{sharding.spec} does not divide it into shards of full blocks"
    return f"xla: {why}" if why else name


def _platform() -> str:
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower() else backend
