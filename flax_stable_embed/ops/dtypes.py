"""The dtype that sums, norms, moments and update rules are computed in: at least float32.

A sum in bfloat16 stops growing at 256, because 256 + 1 rounds to 256. So narrow numbers are widened before they are
added, and a result is rounded to its own dtype once, at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INT32_MAX = np.iinfo(np.int32).max


def at_least_float32(dtype: Any) -> np.dtype:
    """Returns the dtype to compute in: float32 for integers and narrow floats, else the dtype itself.

    >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)
