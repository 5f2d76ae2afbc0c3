"""The primitives of normalized rows: the function, its derivative and its gradient.

The derivative of the function is a primitive, and the gradient is the transpose of that primitive. vmap, derivatives of
derivatives and platforms without a kernel take JAX's result for the reference.

Where a kernel runs is decided when a program is lowered, for its platform and devices:

    one device                        the kernel, if it can take the arrays
    several, and known shardings      the kernel on each device (`on_meshes.py`)
    several otherwise                 the reference, which XLA partitions
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from ...lowering import Program, kernels_compile_here, primitive
from .capabilities import MOST_TOKENS_ON_TPU
from .on_meshes import forward_on, gradient_on, placement
from .packing import unpacked
from .reference import Options, reference

MODULES = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}  # the kernels for each platform, by JAX's name


def _kernels(kernel: Callable[..., Any]) -> dict[str, Any]:
    return {platform: partial(kernel, module) for platform, module in MODULES.items()}


def _import(module: str) -> Any:
    """Imports the kernels of a platform, and Pallas with them."""
    return import_module(f".{module}", __package__)


def _may_run(program: Program, *, options: Options) -> bool:
    """Returns whether the kernel of its platform runs in a program."""
    platform = program.kernel_platform
    if not program.one_device or platform not in options.kernels:
        return False
    return platform != "cuda" or (kernels_compile_here() and not options.is_part)


def _forward_reference(table, scale, bias, row_numbers, *, options):
    return (reference(options, table, scale, bias, row_numbers),)


def _forward_kernel(module: str, table, scale, bias, row_numbers, *, options):
    y = _import(module).forward(options, table, scale, bias, row_numbers.ravel())
    return (y.reshape(*row_numbers.shape, -1),)


def _tangent_reference(d_table, d_scale, d_bias, table, scale, row_numbers, *, options):
    """Returns the derivative, which is linear in the first three arguments and does not depend on the bias."""
    of_parameters = partial(reference, options, row_numbers=row_numbers)
    bias = jnp.zeros_like(scale)
    return (jax.jvp(of_parameters, (table, scale, bias), (d_table, d_scale, d_bias))[1],)


def _gradient_reference(dy, table, scale, row_numbers, *, options):
    of_parameters = partial(reference, options, row_numbers=row_numbers)
    return jax.vjp(of_parameters, table, scale, jnp.zeros_like(scale))[1](unpacked(dy).astype(options.dtype))


def _gradient_kernel(module: str, dy, table, scale, row_numbers, *, options):
    dy, row_numbers = dy.reshape(-1, dy.shape[-1]), row_numbers.ravel()
    most = MOST_TOKENS_ON_TPU if module == "pallas_tpu" else row_numbers.size
    parts = [slice(start, start + most) for start in range(0, row_numbers.size, most)]
    found = [_import(module).gradient(options, dy[part], table, scale, row_numbers[part]) for part in parts]
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *found)


_forward_here = primitive(
    "normalized_rows_here", _forward_reference, _kernels(_forward_kernel), may_run=_may_run, flat=True
)
_gradient_here = primitive(
    "normalized_rows_gradient_here", _gradient_reference, _kernels(_gradient_kernel), may_run=_may_run
)


def _for_program(here: Any, on_mesh: Callable[..., Any], table: int) -> Callable[..., Any]:
    """Returns the function that chooses for a program: `here` on one device, or `on_mesh` of it on several.

    Args:
        here: The primitive of one device.
        on_mesh: Makes the function of all arrays from the one of a device's arrays.
        table: The index of the table among the operands. The row numbers are the last.
    """

    def choose(program: Program, *, options: Options):
        def chosen(*args: Any):
            how = None if program.one_device else placement(program, table, args[table], args[-1], options)
            if how is None:
                return here.bind(*args, options=options)
            return on_mesh(how, here.bind, options)(*args)

        return chosen

    return choose


forward = primitive(
    "normalized_rows", _forward_reference, choose=_for_program(_forward_here, forward_on, table=0), flat=True
)
tangent = primitive("normalized_rows_tangent", _tangent_reference, flat=True)
gradient = primitive(
    "normalized_rows_gradient", _gradient_reference, choose=_for_program(_gradient_here, gradient_on, table=1)
)


def _forward_jvp(primals: Any, tangents: Any, *, options: Options) -> Any:
    table, scale, bias, row_numbers = primals
    if isinstance(tangents[0], ad.Zero):  # a frozen table: XLA drops its gradient, which a kernel would compute
        known = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(partial(_forward_reference, options=options), primals, tuple(known))
    y = forward.bind(table, scale, bias, row_numbers, options=options)
    along = [ad.instantiate_zeros(t) for t in tangents[:3]]
    return y, tangent.bind(*along, table, scale, row_numbers, options=options)


def _tangent_transpose(cotangents: Any, *args: Any, options: Options) -> Any:
    (dy,), linear, residuals = cotangents, args[:3], args[3:]
    if isinstance(dy, ad.Zero):
        return [None] * 6
    found = gradient.bind(dy, *residuals, options=options)
    wanted = [x if ad.is_undefined_primal(arg) else None for x, arg in zip(found, linear)]
    return [*wanted, None, None, None]


ad.primitive_jvps[forward] = _forward_jvp
ad.primitive_transposes[tangent] = _tangent_transpose
