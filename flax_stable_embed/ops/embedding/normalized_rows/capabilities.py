"""Which tables the kernels of each platform can take.

Each constant is a limit of a kernel, with its reason. Where no kernel can take a table, a stable embedding is a lookup
and a LayerNorm.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType

from ...dtypes import INT32_MAX
from .reference import Options

PLATFORMS = ("cuda", "tpu")  # by JAX's names
LEAST_FEATURES = 768  # on an H200 the gradient takes 0.75 of XLA's time at 768 features, and twice its time at 256
MOST_FEATURES = 8192  # of a row that one program keeps in registers
MOST_TOKENS_ON_TPU = 2**17  # of one gradient: its sorted ids fill half of the memory for scalars
DTYPES = {*map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16))}


def with_kernels(options: Options, table: Array, scale: Array, bias: Array, ids: Array) -> Options:
    """Returns the options with the platforms whose kernels can take these arrays, on any mesh with Auto axes."""
    sizes = (*table.shape, *ids.shape)
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if AxisType.Manual in kinds or AxisType.Explicit in kinds or not all(isinstance(n, int) for n in sizes):
        return options  # jax.export can have symbols for sizes
    fits = LEAST_FEATURES <= table.shape[1] <= MOST_FEATURES and table.size and ids.size
    addressed = max(table.size, ids.size * table.shape[1]) <= INT32_MAX
    known = {x.dtype for x in (table, scale, bias)} | {options.dtype} <= DTYPES
    if not (fits and addressed and known):
        return options
    in_float32 = table.dtype == jnp.float32
    # On TPU single rows are copied. They must fill lanes, and rows of a 16-bit table are stored in pairs.
    on_tpu = in_float32 and options.dtype != jnp.float16 and table.shape[1] % 128 == 0
    kernels = tuple(platform for platform in PLATFORMS if on_tpu or platform != "tpu")
    return options._replace(kernels=kernels, in_float32=in_float32)
