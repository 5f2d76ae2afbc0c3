"""The primitives of normalized rows: the function, its derivative and its gradient.

The derivative of the function is a primitive, and the gradient is the transpose of that primitive. vmap, derivatives of
derivatives and platforms without a kernel take JAX's result for the reference.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from ...lowering import primitive
from .capabilities import MOST_TOKENS_ON_TPU
from .reference import Options, reference

MODULES = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}  # the kernels for each platform, by JAX's name


def _kernels(kernel: Callable[..., Any]) -> dict[str, Any]:
    return {platform: partial(kernel, module) for platform, module in MODULES.items()}


def _import(module: str) -> Any:
    """Imports the kernels of a platform, and Pallas with them."""
    return import_module(f".{module}", __package__)


def _forward_reference(table, scale, bias, row_numbers, *, options):
    return (reference(options, table, scale, bias, row_numbers),)


def _forward_kernel(module: str, table, scale, bias, row_numbers, *, options):
    return (_import(module).forward(options, table, scale, bias, row_numbers),)


def _tangent_reference(d_table, d_scale, d_bias, table, scale, row_numbers, *, options):
    """Returns the derivative, which is linear in the first three arguments and does not depend on the bias."""
    of_parameters = partial(reference, options, row_numbers=row_numbers)
    bias = jnp.zeros_like(scale)
    return (jax.jvp(of_parameters, (table, scale, bias), (d_table, d_scale, d_bias))[1],)


def _gradient_reference(dy, table, scale, row_numbers, *, options):
    of_parameters = partial(reference, options, row_numbers=row_numbers)
    return jax.vjp(of_parameters, table, scale, jnp.zeros_like(scale))[1](dy)


def _gradient_kernel(module: str, dy, table, scale, row_numbers, *, options):
    if module == "pallas_tpu" and row_numbers.size > MOST_TOKENS_ON_TPU:
        return _gradient_reference(dy, table, scale, row_numbers, options=options)
    return _import(module).gradient(options, dy, table, scale, row_numbers)


forward = primitive("normalized_rows", _forward_reference, _kernels(_forward_kernel), flat=True)
tangent = primitive("normalized_rows_tangent", _tangent_reference, flat=True)
gradient = primitive("normalized_rows_gradient", _gradient_reference, _kernels(_gradient_kernel))


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
