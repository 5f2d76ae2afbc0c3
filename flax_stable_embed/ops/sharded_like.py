"""Results that are sharded like an argument, whatever sharding it has.

Under Auto axes, array types do not say how an array is sharded. A primitive then tells the partitioner (Shardy) that
two arrays belong to one sharding group. It reads no array. `jax.experimental.shard_alike` did the same before JAX 0.11,
but it numbered groups over the life of the process. Here groups are numbered per program, so that one step always makes
the same program, and a persistent compilation cache finds it.

JAX lowers a function under `jax.jit`, or a primitive, once for all arrays of one shape. A group in there would ask for
one sharding for all of these arrays. So call `sharded_like` outside of functions that several parameters share.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir, xla

from .sharding import explicit_sharding, is_explicit, is_for_one_device, placed_like


def sharded_like(x: Array, other: Any) -> Array:
    """Returns `x` sharded like `other`, which has its shape.

    The sharding comes from the type of `other`, from `other` as a concrete array, or under jit from the compiler.
    """
    if isinstance(other, Tracer):
        x, known = placed_like(x, other), explicit_sharding(other)
        return x if known is not None and is_explicit(known.mesh) else _alike.bind(x, other)
    # JAX moves uncommitted arrays, and must be free to move `x`. A constant of JAX 0.8 cannot be committed.
    placed = isinstance(other, Array) and getattr(other, "committed", False)
    return jax.device_put(x, other.sharding) if placed else x


_alike = Primitive("sharded_like")
_groups: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()  # by module: the numbers of its next groups


def _lower(context: Any, x: Any, other: Any) -> list[Any]:
    module = context.module_context
    is_shardy = getattr(jax.config, "jax_use_shardy_partitioner", True)  # another partitioner does not know groups
    if is_shardy and not is_for_one_device(module.axis_context):
        group = next(_groups.setdefault(module.module, count()))
        sdy.sharding_group(x, group)
        sdy.sharding_group(other, group)
    return [x]


def _derivative(primals: Any, tangents: Any) -> Any:
    return _alike.bind(*primals), tangents[0]


def _batched(args: Any, axes: Any) -> Any:
    size = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    args = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes)
    ]
    return _alike.bind(*args), 0


_alike.def_impl(partial(xla.apply_primitive, _alike))
_alike.def_abstract_eval(lambda x, other: x)
ad.primitive_jvps[_alike] = _derivative
batching.primitive_batchers[_alike] = _batched
mlir.register_lowering(_alike, _lower, cacheable=False)
