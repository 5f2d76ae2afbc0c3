"""What JAX 0.10 changed. No other file depends on the version of JAX.

Delete this file when pyproject.toml no longer allows JAX 0.9.
"""

import jax
from jax import Array

try:
    from jax.extend.core import get_opaque_trace_state as get_opaque_trace_state
except ImportError:  # JAX 0.9 and earlier
    from jax.core import get_opaque_trace_state as get_opaque_trace_state


def varying_axes(x: Array) -> frozenset[str]:
    """Returns the mesh axes of a `jax.shard_map` that the type of `x` varies over."""
    aval = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # `vma`: JAX 0.9 and earlier
