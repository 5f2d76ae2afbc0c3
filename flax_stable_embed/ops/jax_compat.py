"""What JAX changed after 0.8.1. No other file depends on the version of JAX.

Delete this file when pyproject.toml no longer allows JAX 0.9.
"""

from importlib import import_module
from typing import Any

import jax
import numpy as np
from jax import Array

try:
    from jax.extend.core import get_opaque_trace_state as get_opaque_trace_state

    MOST_UNROLLED = 8  # iterations of a loop in a kernel for TPU
except ImportError:  # JAX 0.9 and earlier, where a kernel for TPU unrolls one iteration or all
    from jax.core import get_opaque_trace_state as get_opaque_trace_state

    MOST_UNROLLED = 1


def varying_axes(x: Array) -> frozenset[str]:
    """Returns the mesh axes of a `jax.shard_map` that the type of `x` varies over."""
    aval = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # `vma`: JAX 0.9 and earlier


def literal_value(x: Any) -> Any:
    """Returns the value of a literal in a jaxpr. In JAX 0.9 and earlier it can have a type that is not a jax.Array."""
    return np.asarray(x) if type(x).__name__ == "TypedNdArray" else x


def register_key_type(key_type: Any) -> None:
    """Registers a dtype of `define_prng_impl` under its name, for `jax.random.wrap_key_data(..., impl=name)`.

    JAX has no public function for it. Where this one is not found, only Orbax misses it, which restores by the name.
    """
    for module in ("jax._src.random.prng", "jax._src.prng"):  # from JAX 0.10.2 on, and before
        try:
            import_module(module).register_prng(key_type._impl)
        except (ImportError, AttributeError):
            continue
        return


def as_varying(x: Array, axes: tuple[str, ...]) -> Array:
    """Returns `x` typed as varying over more mesh axes of a `jax.shard_map`."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # JAX 0.8.1  # pyright: ignore[reportAttributeAccessIssue]
