"""Rows of a table, normalized, as one operation: what a stable embedding does, where kernels for GPU and TPU do it.

    y_i = (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias,    x = table[ids_i]

`reference` defines it. XLA on GPU looks rows up again for each sum over them, and on TPU writes them to memory first;
on both it writes what the gradient needs in between. Here a kernel reads a row and writes its output, and another one
the gradient (pallas_gpu.py, pallas_tpu.py).

The gradient of a LayerNorm is linear in the output's gradient: that of a row which several tokens look up is that of
the sum of their gradients. So ids are sorted and a row is normalized once.

Three JAX primitives: the function, its derivative and its gradient, which is the derivative's transpose. What they do
not say by themselves (vmap, derivatives of derivatives, other platforms) is what JAX makes of `reference`.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad

from ...dtypes import INT32_MAX, at_least_float32
from ..gather import GatherOptions, gather
from ..layer_norm import normalize
from .primitive import primitive

LEAST_FEATURES = 768  # of a row: on an H200 the gradient takes 0.75 of the time at 768, and twice the time at 256
MOST_FEATURES = 8192  # which one program keeps in registers
MOST_TOKENS_ON_TPU = 2**17  # of a gradient: its sorted ids fill half of the memory for scalars
MODULES = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}  # of kernels, by what JAX calls the platform
NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)


class Options(NamedTuple):
    """Static and hashable: epsilon of the norm, the row without a gradient, a promise about ids, the output's dtype."""

    epsilon: float
    padding_idx: int | None
    in_bounds: bool
    dtype: np.dtype


def reference(options: Options, table: Array, scale: Array, bias: Array, row_numbers: Array) -> Array:
    """What the kernels compute, in plain operations."""
    wide = at_least_float32(table.dtype)
    how = GatherOptions(options.padding_idx, by_frequency=False, sharding=None, dtype=wide, in_bounds=options.in_bounds)
    return normalize(gather(how, table, row_numbers), scale, bias, options.epsilon).astype(options.dtype)


def has_kernel(options: Options, table: Array, scale: Array, bias: Array, ids: Array) -> bool:
    """Whether one GPU or TPU computes, and its kernels can: no kernel is cut by the compiler for several."""
    platform = jax.default_backend()
    alone = platform in ("gpu", "tpu") and jax.device_count() == 1 and jax.sharding.get_abstract_mesh().empty
    sizes = (*table.shape, *ids.shape)
    if not alone or not all(isinstance(n, int) for n in sizes):  # jax.export may have no number for one
        return False
    fits = LEAST_FEATURES <= table.shape[1] <= MOST_FEATURES and table.size and ids.size
    addressed = max(table.size, ids.size * table.shape[1]) <= INT32_MAX
    narrow = {x.dtype for x in (table, scale, bias)} | {options.dtype} <= {*map(np.dtype, NARROW)}
    return bool(fits and addressed and narrow and (platform == "gpu" or _fits_tpu(options, table)))


def _fits_tpu(options: Options, table: Array) -> bool:
    """Single rows can be copied where they fill lanes; those of 16-bit tables lie in pairs."""
    return table.dtype == jnp.float32 and options.dtype != jnp.float16 and table.shape[1] % 128 == 0


def normalized_rows(options: Options, table: Array, scale: Array, bias: Array, row_numbers: Array) -> Array:
    """(*batch, features) in `options.dtype`, for int32 `row_numbers` of shape (*batch); `len(table)` gives NaN."""
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    (y,) = _forward.bind(table, scale, bias, row_numbers.ravel(), options=options)
    return y.reshape(*row_numbers.shape, table.shape[1])


def _forward_reference(table, scale, bias, row_numbers, *, options):
    return (reference(options, table, scale, bias, row_numbers),)


def _forward_kernel(module: str, table, scale, bias, row_numbers, *, options):
    return (_import(module).forward(options, table, scale, bias, row_numbers),)


def _import(module: str) -> Any:
    """The kernels of a platform: no kernel language is imported before one is lowered."""
    return import_module(f".{module}", __package__)


def _tangent_reference(d_table, d_scale, d_bias, table, scale, row_numbers, *, options):
    """Linear in the first three, and the output does not depend on the bias otherwise."""
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


def _by_platform(kernel: Callable[..., Any]) -> dict[str, Any]:
    return {platform: partial(kernel, module) for platform, module in MODULES.items()}


_forward = primitive("normalized_rows", _forward_reference, _by_platform(_forward_kernel), flat=True)
_tangent = primitive("normalized_rows_tangent", _tangent_reference, flat=True)
_gradient = primitive("normalized_rows_gradient", _gradient_reference, _by_platform(_gradient_kernel))


def _forward_jvp(primals: Any, tangents: Any, *, options: Options) -> Any:
    table, scale, bias, row_numbers = primals
    if isinstance(tangents[0], ad.Zero):  # a frozen table: XLA leaves its gradient away, and a kernel would not
        known = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(partial(_forward_reference, options=options), primals, tuple(known))
    y = _forward.bind(table, scale, bias, row_numbers, options=options)
    along = [ad.instantiate_zeros(t) for t in tangents[:3]]
    return y, _tangent.bind(*along, table, scale, row_numbers, options=options)


def _tangent_transpose(cotangents: Any, *args: Any, options: Options) -> Any:
    (dy,), linear, residuals = cotangents, args[:3], args[3:]
    if isinstance(dy, ad.Zero):
        return [None] * 6
    found = _gradient.bind(dy, *residuals, options=options)
    wanted = [x if ad.is_undefined_primal(arg) else None for x, arg in zip(found, linear)]
    return [*wanted, None, None, None]


ad.primitive_jvps[_forward] = _forward_jvp
ad.primitive_transposes[_tangent] = _tangent_transpose
