"""A JAX primitive that is a function of plain operations, except where a kernel stands for it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from ...sharding import is_for_one_device

Function = Callable[..., tuple[Any, ...]]


def primitive(
    name: str, reference: Function, kernels: Mapping[str, Function] | None = None, *, flat: bool = False
) -> Primitive:
    """A primitive with several results: in a program for one device the kernel of its platform, else `reference`.

    `kernels` are by platform, as JAX calls it. A program for several devices is cut by the compiler, and no kernel is.
    Under vmap, and for its derivative, it is `reference` too. All take arrays, and static values by name. `flat`: each
    element of the last argument, a vector, has a row of the results, so that vmap over it alone is one longer vector.
    """
    new = Primitive(name)
    new.multiple_results = True

    def abstract(*avals: Any, **static: Any) -> list[ShapedArray]:
        results = jax.eval_shape(partial(reference, **static), *avals)
        return [ShapedArray(x.shape, x.dtype) for x in results]

    def derivative(primals: Any, tangents: Any, **static: Any) -> Any:
        known = tuple(ad.instantiate_zeros(t) for t in tangents)
        return jax.jvp(partial(reference, **static), primals, known)

    def batched(args: Any, axes: Any, **static: Any) -> Any:
        if flat and all(axis is None for axis in axes[:-1]):
            vectors = jnp.moveaxis(args[-1], axes[-1], 0)
            results = new.bind(*args[:-1], vectors.ravel(), **static)
            return [x.reshape(*vectors.shape, *x.shape[1:]) for x in results], [0] * len(results)
        results = jax.vmap(partial(reference, **static), in_axes=tuple(axes))(*args)
        return results, [0] * len(results)

    new.def_impl(partial(xla.apply_primitive, new))
    new.def_abstract_eval(abstract)
    ad.primitive_jvps[new] = derivative
    batching.primitive_batchers[new] = batched
    mlir.register_lowering(new, mlir.lower_fun(reference, multiple_results=True))
    for platform, kernel in (kernels or {}).items():
        mlir.register_lowering(new, _on_one_device(kernel, reference), platform=platform)
    return new


def _on_one_device(kernel: Function, reference: Function) -> Callable[..., Any]:
    def lower(context: Any, *args: Any, **static: Any) -> Any:
        alone = is_for_one_device(context.module_context.axis_context)
        return mlir.lower_fun(kernel if alone else reference, multiple_results=True)(context, *args, **static)

    return lower
