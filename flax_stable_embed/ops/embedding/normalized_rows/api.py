"""Looks up rows and normalizes them in one operation, for a stable embedding on GPU and TPU.

    y_i = (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias,    x = table[ids_i]

XLA on GPU gathers the rows again for each sum over them. On TPU it writes them to memory first. On both it writes
intermediate results for the gradient. Here one kernel reads a row and writes its output, and another one computes the
gradient (`pallas_gpu.py`, `pallas_tpu.py`).

The gradient of a LayerNorm is linear in the gradient of its output. So where several tokens look up one row, their
gradients can be summed first. The kernels sort the ids and normalize each row once.

`reference.py` defines the operation, `capabilities.py` knows where a kernel can run, `lowering.py` has the primitives.
"""

import jax.numpy as jnp
from jax import Array

from . import lowering
from .reference import Options


def normalized_rows(options: Options, table: Array, scale: Array, bias: Array, row_numbers: Array) -> Array:
    """Returns the normalized rows, (*batch, features) in `options.dtype`.

    Args:
        options: Static options.
        table: (num_embeddings, features).
        scale: (features,), of the norm.
        bias: (features,), of the norm.
        row_numbers: (*batch), int32. The number `num_embeddings` gives a row of NaN.
    """
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    return lowering.forward.bind(table, scale, bias, row_numbers, options=options)[0]
