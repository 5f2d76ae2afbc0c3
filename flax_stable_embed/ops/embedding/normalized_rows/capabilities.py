"""Which tables the kernels can take.

Each constant is a limit of a kernel, with its reason. A stable embedding uses the operation only if `has_kernel`
returns True. Otherwise it is a lookup and a LayerNorm, which XLA can fuse with the rest of the program.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...dtypes import INT32_MAX
from ...lowering import kernels_compile_here
from .reference import Options

LEAST_FEATURES = 768  # on an H200 the gradient takes 0.75 of XLA's time at 768 features, and twice its time at 256
MOST_FEATURES = 8192  # of a row that one program keeps in registers
MOST_TOKENS_ON_TPU = 2**17  # of a gradient: its sorted ids fill half of the memory for scalars
DTYPES = {*map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16))}


def has_kernel(options: Options, table: Array, scale: Array, bias: Array, ids: Array) -> bool:
    """Returns whether this process has one GPU or TPU and its kernels can take these arrays.

    With several devices XLA partitions the program, and it cannot partition a kernel.
    """
    platform = jax.default_backend()
    mesh = jax.sharding.get_abstract_mesh()
    alone = platform in ("gpu", "tpu") and jax.device_count() == 1 and (mesh.empty or mesh.size == 1)
    sizes = (*table.shape, *ids.shape)
    if not alone or not all(isinstance(n, int) for n in sizes):  # jax.export can have symbols for sizes
        return False
    fits = LEAST_FEATURES <= table.shape[1] <= MOST_FEATURES and table.size and ids.size
    addressed = max(table.size, ids.size * table.shape[1]) <= INT32_MAX
    known = {x.dtype for x in (table, scale, bias)} | {options.dtype} <= DTYPES
    # On TPU single rows are copied. They must fill lanes, and rows of a 16-bit table are stored in pairs.
    on_tpu = table.dtype == jnp.float32 and options.dtype != jnp.float16 and table.shape[1] % 128 == 0
    return bool(fits and addressed and known and (kernels_compile_here() if platform == "gpu" else on_tpu))
