"""Looks up rows of an embedding table: the arithmetic that the Linen and the NNX modules share.

    rows = table[ids]                    NaN rows for ids outside the table
    rows <- renorm(rows)                 with max_norm
    y = normalize(rows, scale, bias)     StableEmbed only

Source: torch.nn.Embedding (padding_idx, max_norm, scale_grad_by_freq) and bitsandbytes.nn.StableEmbedding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..dtypes import at_least_float32
from .gather import GatherOptions, Mode, Sharding, gather, row_numbers_of, row_sharding
from .layer_norm import NORM_EPSILON, normalize
from .looked_up import LookedUpTable, record
from .normalized_rows.api import normalized_rows
from .normalized_rows.capabilities import with_kernels
from .normalized_rows.reference import Options
from .options import NO_FREQUENCY, NO_ONE_HOT, Method
from .rows import distinct, set_rows, take_rows

RENORM_GUARD = 1e-7  # torch adds it to the norm before it divides


def lookup(
    table: jax.Array | LookedUpTable,
    ids: jax.Array,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    stored: bool = False,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    method: Method = "take",
    mode: Mode = "fill",
    dtype: Any = None,
    out_sharding: Sharding = None,
) -> jax.Array:
    """Returns the rows of `table` at `ids`, with torch's embedding options.

        y_i = renorm(table[ids_i]);      dL/dtable[k] = s_k * (sum of dL/dy_i over the i with ids_i = k)
        s_k = 1 / count(k) with scale_grad_by_freq, else 1;      s_k = 0 at padding_idx

    The renormalized rows are not written back to the table. The gradient is taken at these rows and does not pass
    through the renormalization. `count` is over the ids of one call: those of the global batch under jit, those of one
    example under a vmap over examples.

    The gradient is summed in float32 (float64 for a float64 table) and rounded to the dtype of the table once. A token
    that appears 65536 times with cotangent 1 gets exactly 65536 from a float32 and from a bfloat16 table, where a sum
    in bfloat16 would stop at 256. For a 16-bit table this takes one float32 buffer of its size in the backward pass.

    Args:
      table: (num_embeddings, features) of any dtype. Or a `looked_up.LookedUpTable`, if a loss is differentiated with
        respect to rows.
      ids: (*batch), integers of any width. -1 .. -num_embeddings count from the end. Ids outside the table give rows of
        NaN (for integer tables the fill value of `jnp.take`) and no gradient.
      padding_idx: Index of the row that gets no gradient, 0 .. num_embeddings - 1. max_norm: Largest norm of a
      looked-up row. Longer rows are scaled down to it. norm_type: The p of this p-norm. stored: True if the rows are
      already scaled in the table, so that max_norm has no effect. scale_grad_by_freq: True to divide the gradient of a
      token by the number of times that it appears. sparse: True to record the lookup, if `looked_up.recording` is open.
      method: "take" gathers. "one_hot" multiplies with a one-hot matrix, and its gradient is a product too. It gives
      the
        same rows bit for bit for num_embeddings times the arithmetic, which can be faster on TPU. A NaN or infinity in
        the table spreads to its full column of the result, and likewise in the gradient.
      mode: How to treat ids outside the table. "fill" returns rows of NaN. "clip" takes the first or last row (the
      first
        for negative ids). "promise_in_bounds" skips the check and the mask over the rows; ids outside
        0 .. num_embeddings - 1 then give undefined rows.
      dtype: Dtype of the result, by default that of the table. The terms of the gradient have it too. So to look up in
        bfloat16 and compute in float32, ask for float32 here instead of casting the result.
      out_sharding: Sharding of the result under a mesh with Explicit axes; ignored under other meshes, as in Flax. By
        default the batch axes are sharded as the ids, and the features as those of the table, without the mesh axes
        that the ids use already.

    Returns:
      (*batch, features) in `dtype`. A table of one row ignores the ids if no option is set, as in Flax.

    Raises:
      TypeError: The ids are not an array, or max_norm is set and the table is not floating point.
      ValueError: The ids are not integers.

    >>> table = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> lookup(table, jnp.array([1, -1, 0]), max_norm=5.0)
    Array([[3., 4.],
           [3., 4.],
           [0., 0.]], dtype=float32)
    >>> jax.grad(lambda t: lookup(t, jnp.array([1, 1, 2]), padding_idx=2).sum())(table)
    Array([[0., 0.],
           [2., 2.],
           [0., 0.]], dtype=float32)
    """
    _check_ids(ids)
    looked_up, given = table if isinstance(table, LookedUpTable) else None, table
    table = jnp.asarray(table if looked_up is None else looked_up.constant)
    row_numbers = row_numbers_of(ids, table.shape[0], mode)
    if table.shape[0] == 1 and padding_idx is None and max_norm is None and not scale_grad_by_freq:
        row_numbers = jnp.zeros_like(row_numbers)
    sharding = row_sharding(table, row_numbers, out_sharding)
    dtype = jnp.dtype(dtype or table.dtype)
    options = GatherOptions(
        padding_idx,
        by_frequency=scale_grad_by_freq,
        sharding=sharding,
        dtype=dtype,
        in_bounds=mode != "fill",
        one_hot=method == "one_hot",
    )
    if looked_up is None:
        if sparse:
            record(given, row_numbers)  # not `table`: under an outer derivative jnp.asarray makes another array
        rows = gather(options, table, row_numbers)
    elif scale_grad_by_freq:
        raise ValueError(NO_FREQUENCY)
    elif method == "one_hot":
        raise ValueError(NO_ONE_HOT)
    else:
        rows = looked_up.gather(options, row_numbers)
    return rows if max_norm is None or stored else _as_if_stored(rows, table.dtype, max_norm, norm_type)


def normalized_lookup(
    table: jax.Array | LookedUpTable,
    ids: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = NORM_EPSILON,
    dtype: Any = None,
    **options: Any,
) -> jax.Array:
    """Returns `normalize(lookup(table, ids, **options), scale, bias, epsilon)`.

    The arithmetic is in float32 whatever the dtypes. In programs for GPU and TPU a kernel runs if no option scales rows
    or gradients: on one device, and on each device of a mesh with Auto axes if the table is replicated and the ids are
    sharded, or if the rows of the table are sharded (TPU only).

    Args:
      table: As in `lookup`.
      ids: As in `lookup`.
      scale: (features,), of the norm.
      bias: (features,), of the norm.
      epsilon: As in `normalize`.
      dtype: Dtype of the result, by default that of the table.
      **options: Options of `lookup`.

    Raises:
      TypeError, ValueError: As in `lookup` and `normalize`.

    >>> table = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    >>> normalized_lookup(table, jnp.array([0, 1]), jnp.ones(2), jnp.full(2, 0.5), epsilon=3.0)
    Array([[0. , 1. ],
           [0.5, 0.5]], dtype=float32)
    """
    _check_ids(ids)
    table = table if hasattr(table, "dtype") else jnp.asarray(table)
    dtype, mode = jnp.dtype(dtype or table.dtype), options.get("mode", "fill")
    other_options = any(options.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse"))
    plain = not other_options and options.get("method", "take") == "take"
    if plain and not isinstance(table, LookedUpTable) and table.shape[0] != 1:
        how = Options(float(epsilon), options.get("padding_idx"), in_bounds=mode != "fill", dtype=dtype)
        table, scale, bias = map(jnp.asarray, (table, scale, bias))
        how = with_kernels(how, table, scale, bias, ids)
        if how.kernels:
            row_numbers = row_numbers_of(ids, table.shape[0], mode)
            if row_sharding(table, row_numbers, options.get("out_sharding")) is None:
                return normalized_rows(how, table, scale, bias, row_numbers)
    rows = lookup(table, ids, dtype=at_least_float32(table.dtype), **options)
    return normalize(rows, scale, bias, epsilon).astype(dtype)


def renorm(rows: jax.Array, max_norm: float, norm_type: float = 2.0) -> jax.Array:
    """Scales rows whose p-norm exceeds `max_norm` down to it, and returns the others unchanged.

        n = (sum |x|^p)^(1/p);      x <- x * max_norm / (n + 1e-7) where n > max_norm

    p = inf is the largest magnitude, p = 0 the number of non-zeros. Zero rows stay zero, and NaN rows stay NaN. Norms
    of narrow rows are computed in float32. (torch rounds the norm of a half-precision row to half precision.)

    Args:
      rows: (..., features), floating point.
      max_norm: The largest norm of the result.
      norm_type: The p of the p-norm, zero or more.

    Returns:
      Rows of the same shape and dtype.

    Raises:
      TypeError: The rows are not floating point.

    >>> renorm(jnp.array([[3.0, 4.0], [0.25, 0.5]]), max_norm=1.0, norm_type=jnp.inf)
    Array([[0.75, 1.  ],
           [0.25, 0.5 ]], dtype=float32)
    """
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        raise TypeError(f"`max_norm` needs a floating point table, got {rows.dtype}. Set param_dtype=float32.")
    x = rows.astype(at_least_float32(rows.dtype))
    norm = jnp.linalg.norm(x, ord=norm_type, axis=-1, keepdims=True)
    scaled = x * (max_norm / (norm + RENORM_GUARD))
    return jnp.where(norm > max_norm, scaled.astype(rows.dtype), rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _as_if_stored(rows: jax.Array, table_dtype: Any, max_norm: float, norm_type: float) -> jax.Array:
    """Renormalizes rows as torch does: in the dtype of the table, and before the gradient is taken."""
    return renorm(rows.astype(table_dtype), max_norm, norm_type).astype(rows.dtype)


@_as_if_stored.defjvp
def _as_if_stored_jvp(table_dtype, max_norm, norm_type, primals, tangents):
    return _as_if_stored(primals[0], table_dtype, max_norm, norm_type), tangents[0]


def table_for_logits(table: Any, token_ids: Any, max_norm: float | None, norm_type: float, mode: Mode) -> jax.Array:
    """Returns the full table, with the rows of `token_ids` renormalized as if a lookup had stored them.

    Raises:
      TypeError: A loss is being differentiated with respect to looked-up rows.
      ValueError: `token_ids` is given without max_norm, or has ids that are not integers.
    """
    if isinstance(table, LookedUpTable):
        raise TypeError(
            "`attend` has a gradient for every row of the table, so fse.row_value_and_grad does not support it. "
            "Compare with the rows of sampled ids instead, jnp.einsum('...d,kd->...k', query, embed(candidates)), or "
            "use jax.value_and_grad and sparse=False."
        )
    table = jnp.asarray(table)
    if token_ids is None:
        return table
    if max_norm is None:
        raise ValueError(
            "`token_ids` of `attend` are the rows that max_norm scales, but `max_norm` is None. Drop them."
        )
    return renormed_rows(table, token_ids, max_norm, norm_type, mode)


def renormed_rows(table: jax.Array, ids: jax.Array, max_norm: float, norm_type: float, mode: Mode) -> jax.Array:
    """Returns the table with the rows of `ids` renormalized, as torch stores it. It has the derivative of `table`."""
    _check_ids(ids)
    indices = distinct(row_numbers_of(ids, table.shape[0], mode), table.shape[0])
    rows = take_rows(table, indices)
    constant = jax.lax.stop_gradient(rows)
    return set_rows(table, indices, renorm(constant, max_norm, norm_type) + (rows - constant))


def _check_ids(ids: Any) -> None:
    if not hasattr(ids, "dtype"):
        raise TypeError(f"`inputs` must be an array of integer ids, got {ids!r:.80}. Try jnp.asarray(inputs).")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"Input type must be an integer or unsigned integer. Got {ids.dtype}; cast it, "
            "for example with inputs.astype(jnp.int32)."
        )
