"""JAX primitives that are a reference in plain operations unless a kernel can run.

Which platform a program is for, and for how many devices, is known when it is lowered. So the choice between kernel
and reference is made there, in the lowering rule of a primitive:

    step = primitive("step", reference, {"tpu": kernel_for_tpu, "cuda": kernel_for_gpu})

The reference defines everything else: the types of the results, derivatives, vmap, and platforms without a kernel.
A kernel function imports its Pallas module when it is called, because Pallas is imported only when a kernel is lowered.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding

from .argument_sharding import argument_sharding
from .sharding import is_for_one_device

Function = Callable[..., Sequence[Any]]  # of arrays, and of static values by name


class Program(NamedTuple):
    """The program that a primitive is lowered into.

    kernel_platform: platform of the kernel that could run, by JAX's name; None on platforms without a kernel.
    platforms: all platforms that the program is compiled for.
    one_device: True if it computes on one device, or is the body of a `jax.shard_map` over all mesh axes.
    num_devices: The number of devices whose program XLA partitions; 1 otherwise.
    devices: These devices, where they are known.
    shardings: How the operands are sharded, where they are arguments of the program; None for the others.
    """

    kernel_platform: str | None
    platforms: Sequence[str]
    one_device: bool
    num_devices: int = 1
    devices: tuple[Any, ...] | None = None
    shardings: tuple[NamedSharding | None, ...] = ()


def program_of(context: Any, platform: str | None, seen: Sequence[Any] = ()) -> Program:
    """Returns the program of a lowering rule's context, with the shardings of the operands `seen`."""
    module = context.module_context
    axes = module.axis_context
    one_device = is_for_one_device(axes)
    shardings = () if one_device else tuple(argument_sharding(module.module, x) for x in seen)
    devices = getattr(axes, "num_devices", 1), getattr(axes, "device_assignment", None)
    return Program(platform, module.platforms, one_device, *devices, shardings)


def on_one_device(program: Program, **static: Any) -> bool:
    """Returns whether a kernel may run. XLA partitions a program for several devices, and cannot partition a kernel."""
    del static
    return program.one_device


def kernels_compile_here() -> bool:
    """Returns whether Triton compiles kernels for all GPUs of this process.

    It does so for compute capability 8.0 or higher. The result is True in a process without a GPU, which may compile
    for one ahead of time.
    """
    local = jax.local_devices() if jax.default_backend() == "gpu" else []
    versions = [str(getattr(device, "compute_capability", "8.0")) for device in local]
    return all(version[:1].isdigit() and float(version) >= 8 for version in versions)  # AMD's are like "gfx90a"


def primitive(
    name: str,
    reference: Function,
    kernels: Mapping[str, Function] | None = None,
    *,
    may_run: Callable[..., bool] = on_one_device,
    choose: Callable[..., Function] | None = None,
    types: Callable[..., Sequence[ShapedArray]] | None = None,
    flat: bool = False,
) -> Primitive:
    """Builds a primitive with several results that runs a kernel where one may run, and `reference` elsewhere.

    Args:
        name: The name of the primitive in a jaxpr.
        reference: Computes the results in plain operations.
        kernels: The kernel for each platform, by JAX's name ("tpu", "cuda"); takes and returns what `reference` does.
        may_run: Called as `may_run(program, **static)` when the primitive is lowered. Returns whether the kernel
            replaces the reference, or raises.
        choose: Called as `choose(program, **static)` when the primitive is lowered, instead of `may_run`. Returns the
            function to lower. JAX calls it for every equation, because it may see how each operand is sharded.
        types: Returns the types of the results for those of the arrays. If None, the reference is traced for them.
        flat: True if each element of the last argument has a row in every result. A vmap over this argument alone then
            becomes one larger argument, and the kernel stays.
    """
    new = Primitive(name)
    new.multiple_results = True

    def traced_types(*avals: Any, **static: Any) -> list[ShapedArray]:
        return [ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(partial(reference, **static), *avals)]

    def derivative(primals: Any, tangents: Any, **static: Any) -> Any:
        return jax.jvp(partial(reference, **static), primals, tuple(map(ad.instantiate_zeros, tangents)))

    def batched(args: Any, axes: Any, **static: Any) -> Any:
        if flat and all(axis is None for axis in axes[:-1]):
            results = new.bind(*args[:-1], jnp.moveaxis(args[-1], axes[-1], 0), **static)
            return results, [0] * len(results)
        results = jax.vmap(partial(reference, **static), in_axes=tuple(axes))(*args)
        return results, [0] * len(results)

    new.def_impl(partial(xla.apply_primitive, new))
    new.def_abstract_eval(types or traced_types)
    ad.primitive_jvps[new] = derivative
    batching.primitive_batchers[new] = batched
    if choose is not None:
        mlir.register_lowering(new, rule(choose, sees_operands=True), cacheable=False)
        return new
    mlir.register_lowering(new, rule(kernel_or_reference(reference, None, may_run)))
    for platform, kernel in (kernels or {}).items():
        choose = kernel_or_reference(reference, kernel, may_run)
        mlir.register_lowering(new, rule(choose, platform), platform=platform)
    return new


def kernel_or_reference(
    reference: Function, kernel: Function | None, may_run: Callable[..., bool]
) -> Callable[..., Function]:
    """Returns a function for `rule` that chooses the kernel where it may run, else the reference."""

    def choose(program: Program, **static: Any) -> Function:
        runs = may_run(program, **static)
        return partial(kernel if runs and kernel is not None else reference, **static)

    return choose


def rule(
    choose: Callable[..., Function], platform: str | None = None, *, sees_operands: bool = False
) -> Callable[..., Any]:
    """Returns the lowering rule that lowers the function that `choose` returns.

    Args:
        choose: Called as `choose(program, **static)`.
        platform: The platform that the rule is for, if it has a kernel.
        sees_operands: Whether the program has the shardings of the operands.
    """

    def lower(context: Any, *args: Any, **static: Any) -> Any:
        function = choose(program_of(context, platform, args if sees_operands else ()), **static)
        return mlir.lower_fun(function, multiple_results=True)(context, *args)

    return lower
