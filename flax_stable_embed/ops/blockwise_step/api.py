"""Which implementation runs a step: by platform and shape, or by name."""

from functools import partial
from typing import Literal

import jax
from jax import lax

from ..blockwise.blocks import Blocks
from ..sharding import varying_like
from . import capabilities, cpu, lowering, reference
from .capabilities import Spec
from .per_shard import FlatStep, per_shard
from .step import Operands, Step

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


def step_blockwise(
    step: Step, operands: Operands, implementation: Implementation | None = None, spec: Spec | None = None
):
    """Runs the step and returns `(output, codes, absmax)`; `implementation=None` works everywhere.

    `spec` says how the parameter is cut, for a mesh where its type does not.

    Raises:
        ValueError: a named implementation that cannot take this array.
        NotImplementedError: one that the program's platform or mesh does not have.
    """
    check_implementation(implementation)
    if operands.g.shape:
        return _step(step, operands, implementation, spec)
    g, p, codes, absmax = jax.tree.map(lambda x: x.reshape(1), operands[:4])
    operands = operands._replace(g=g, p=p, codes=codes, absmax=absmax)
    return jax.tree.map(lambda x: x.reshape(()), _step(step, operands, implementation, None))


@partial(jax.jit, static_argnums=(0, 2, 3))
def _step(step: Step, operands: Operands, implementation: Implementation | None, spec: Spec | None):
    flat, tree = jax.tree.flatten(operands)
    flat = [varying_like(x, *flat) for x in flat]  # inside of shard_map results vary wherever an operand does
    shape = operands.g.shape
    plain = FlatStep(reference.plain, step, tree, shape)
    dtypes = {x.dtype for x in (operands.g, operands.p, step) if x is not None}
    if implementation == "pallas_tpu" or implementation == "pallas_gpu":
        if why := capabilities.refusal(implementation, step.blocks, shape, *dtypes):
            raise ValueError(refused(implementation, shape, why))
        return lowering.kernel_step(implementation, plain, spec, required=True)(*flat)
    by_platform = {"cpu": per_shard(cpu.chunked, plain)}
    for platform, name in capabilities.PLATFORMS.items():
        if implementation is None and capabilities.refusal(name, step.blocks, shape, *dtypes) is None:
            by_platform[platform] = lowering.kernel_step(name, plain, spec, required=False)
    return lax.platform_dependent(*flat, **by_platform, default=plain)


def refused(name: str, shape: tuple[int, ...], why: str) -> str:
    """The error of a named implementation that cannot take an array."""
    return (
        f"`implementation={name!r}` cannot take an array of shape {shape}: {why}. Use None, which takes 'xla' there, "
        "or a rule with another StateFormat."
    )


def check_implementation(implementation: str | None) -> None:
    """Raises unless `implementation` is None or the name of one that exists."""
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
    """Names what runs the step of a parameter, with the reason where it is not the platform's kernel.

    Args:
        implementation: The one that the user asked for, or None.
        path: The parameter's path, for errors.
        blocks: Its blocks.
        parameter: The parameter, or its shape and dtype.
        spec: How it is sharded, for a mesh where its type does not say it.
        platform: "cpu", "tpu", "gpu" or "cuda"; None for the platform of this process.
        devices: The number of devices that the program runs on; None for all of this process.

    Raises:
        ValueError: A named implementation cannot take this array.
    """
    platform = {"gpu": "cuda"}.get(platform, platform) if platform else _platform()
    name: Implementation = implementation or capabilities.PLATFORMS.get(platform, "xla")
    why = None if name == "xla" else capabilities.refusal(name, blocks, parameter.shape, parameter.dtype)
    if implementation and why:
        raise ValueError(f"Parameter {path!r}: {refused(name, parameter.shape, why)}")
    if implementation or name != "pallas_tpu":
        return f"xla: {why}" if why else name
    if not why and (devices or jax.device_count()) > 1:
        sharding = lowering.sharding_of(parameter, spec)
        if sharding is None:
            why = "no partition_specs"
        elif not lowering.has_whole_blocks(sharding, blocks, parameter.shape):
            why = f"{sharding.spec} does not cut it into whole blocks"
    return f"xla: {why}" if why else name


def _platform() -> str:
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower() else backend
