"""Embeddings for Flax Linen: `Embed` with torch's options, and `StableEmbed`, which normalizes its output.

Both are subclasses of `flax.linen.Embed`: same positional arguments, same `embedding` parameter, same
`attend`. The arithmetic is in `ops/embedding.py`, and `nnx.py` gives the same numbers, bit for bit.

Differences from `flax.linen.Embed`: the table starts Xavier uniform (as in bitsandbytes), and it is cast to
`dtype` after the rows are gathered, not before, so that the gradient of a frequent token does not stall at
256 in bfloat16.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .ops import embedding as maths
from .ops.embedding.gather import Sharding
from .ops.embedding.initializers import pretrained as pretrained
from .ops.embedding.layer_norm import NORM_EPSILON


def _option(default: Any) -> Any:
    """A keyword-only field, so that Flax's own fields keep their positions."""
    return dataclasses.field(default=default, kw_only=True)


class Embed(nn.Embed):
    """`flax.linen.Embed` with the options of `torch.nn.Embedding`.

        y = promote_dtype(renorm(embedding[inputs]))

    Ids -1 .. -num_embeddings count from the end and ids outside the table give rows of NaN, as in Flax. With
    max_norm, only the rows that are returned are scaled: the stored table keeps its length. For torch's
    trajectory, where scaled rows are stored, wrap the optimizer: `fse.with_max_norm`.

    Parameters: `embedding`, (num_embeddings, features), param_dtype.

    Args:
      num_embeddings: the number of rows.
      features: the length of a row.
      dtype: dtype of the output; by default the dtype of the table.
      param_dtype: dtype of the table. Its gradient is summed in at least float32 and has this dtype.
      embedding_init: initializer of the table. `pretrained(table)` starts from a given one.
      promote_dtype: casts the rows to `dtype` (`(query, embedding)` in `attend`).
      padding_idx: a row that starts at zero (but a pretrained one is kept as given) and whose gradient in the
        lookup is exactly zero; `attend` still sends it one, and weight decay acts on it. Negative counts from
        the end.
      max_norm: looked-up rows with a larger norm are scaled down to it, and the gradient ignores the scaling.
      norm_type: the p of that p-norm: 0, any positive number or infinity.
      scale_grad_by_freq: divide the gradient of a token by the number of times it appears in the call: in the
        global batch under jit, in one example under a vmap over examples.
      sparse: `fse.row_value_and_grad` gives the table a gradient of the looked-up rows alone, for `fse.row_sparse`; no
        dense one exists. Under `jax.grad` it is the dense one. Not with scale_grad_by_freq, as in torch.
      lookup: "take" gathers the rows; "one_hot" multiplies with a one-hot matrix, and so does the gradient (summed in
        float32): num_embeddings times the arithmetic, without a gather or a scatter. For TPU, where that can be faster.
      mode: for ids outside the table. "fill": rows of NaN. "clip": the nearest row (the first for negative ids, too).
        "promise_in_bounds": there are none, all ids are 0 .. num_embeddings - 1; the cheapest, undefined for others.

    Raises:
      ValueError, TypeError: an option outside its range, or inputs that are not an array of integers.

    >>> from flax_stable_embed import linen
    >>> embed = linen.Embed(num_embeddings=5, features=3, padding_idx=-1)
    >>> params = embed.init(jax.random.key(0), jnp.array([0]))
    >>> embed.apply(params, jnp.array([4]))
    Array([[0., 0., 0.]], dtype=float32)

    Source: torch.nn.Embedding; bitsandbytes.nn.Embedding.
    """

    embedding_init: nn.initializers.Initializer = maths.xavier_uniform
    padding_idx: int | None = _option(None)
    max_norm: float | None = _option(None)
    norm_type: float = _option(2.0)
    scale_grad_by_freq: bool = _option(False)
    sparse: bool = _option(False)
    lookup: maths.Method = _option("take")
    mode: maths.Mode = _option("fill")

    def __post_init__(self):
        padding_idx = maths.check_options(
            num_embeddings=self.num_embeddings,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            lookup=self.lookup,
            mode=self.mode,
        )
        object.__setattr__(self, "padding_idx", padding_idx)
        super().__post_init__()

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", self._init_table, shape, self.param_dtype)

    def _init_table(self, key: jax.Array, shape: tuple[int, int], dtype: Any) -> Any:
        table, padding_idx = self.embedding_init(key, shape, dtype), self.padding_idx
        if padding_idx is None or maths.is_pretrained(self.embedding_init):
            return table
        return jax.tree.map(lambda t: maths.zero_padding_row(t, padding_idx), table)  # Flax's boxes are trees

    def __call__(self, inputs: jax.Array, out_sharding: Sharding = None) -> jax.Array:
        """Rows of the table: (*batch, features) for integer `inputs` of shape (*batch).

        `out_sharding`: sharding of the result under a mesh with Explicit axes, ignored elsewhere. By default
        that of the inputs, then that of the table's features.
        """
        return self._cast(maths.lookup(self.embedding, inputs, **self._options(out_sharding)), self.dtype)

    def _options(self, out_sharding: Sharding) -> dict[str, Any]:
        return {
            "padding_idx": self.padding_idx,
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "scale_grad_by_freq": self.scale_grad_by_freq,
            "sparse": self.sparse,
            "method": self.lookup,
            "mode": self.mode,
            "out_sharding": out_sharding,
        }

    def _cast(self, rows: jax.Array, dtype: Any) -> jax.Array:
        (rows_cast,) = self.promote_dtype(rows, dtype=dtype, inexact=False)
        assert rows_cast is not None
        return rows_cast

    def attend(self, query: jax.Array, out_sharding: Sharding = None, *, token_ids: Any = None) -> jax.Array:
        """Tied logits, `query @ embedding.T` on the table as stored: (*batch, num_embeddings).

        `token_ids`: with max_norm, ids whose rows are scaled to it first, as in torch, where a lookup has scaled
        them in the table. The gradient is taken at the scaled rows, not through the scaling.
        """
        table = maths.table_for_logits(self.embedding, token_ids, self.max_norm, self.norm_type, self.mode)
        query_cast, table_cast = self.promote_dtype(query, table, dtype=self.dtype)
        assert query_cast is not None and table_cast is not None
        return jnp.dot(query_cast, table_cast.T, out_sharding=out_sharding)


class StableEmbed(Embed):
    """`Embed`, then a LayerNorm in float32: bitsandbytes' StableEmbedding.

        x = renorm(embedding[inputs]);    y = (x - mean) / sqrt(var + norm_epsilon) * scale + bias

    Statistics, scale and bias are float32 whatever the other dtypes (float64 with a float64 table); the
    output is cast once. A padding token gives `norm.bias`, not zeros, as in bitsandbytes. Rows of variance
    v come out with v / (v + epsilon), about 1 unless a table's values are tiny: drop a following multiplication by
    sqrt(features), and add positions after it.

    `attend` uses the table as stored, without the norm.

    Parameters: `embedding`, (num_embeddings, features), param_dtype; `norm/scale` and `norm/bias`,
    (features,), float32. The optimizers of this package keep the state of all three in 32 bits by their
    default rules.

    Args:
      norm_epsilon: added to the variance. torch's 1e-5, not Flax's 1e-6.

    Every other argument as in `Embed`.

    >>> from flax_stable_embed import linen
    >>> embed = linen.StableEmbed(num_embeddings=5, features=4, dtype=jnp.bfloat16)
    >>> params = embed.init(jax.random.key(0), jnp.array([0]))
    >>> jax.tree.map(jnp.shape, params["params"])
    {'embedding': (5, 4), 'norm': {'bias': (4,), 'scale': (4,)}}
    >>> embed.apply(params, jnp.array([[0, 1, 2]])).dtype
    dtype(bfloat16)

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2.3,
    https://arxiv.org/abs/2110.02861
    """

    norm_epsilon: float = _option(NORM_EPSILON)

    def __post_init__(self):
        maths.check_norm_options(self.norm_epsilon, self.param_dtype, self.dtype)
        super().__post_init__()

    def setup(self):
        super().setup()
        self.norm = _Norm(self.features, self.norm_epsilon, maths.at_least_float32(self.param_dtype))

    def __call__(self, inputs: jax.Array, out_sharding: Sharding = None) -> jax.Array:
        """Normalized rows of the table: (*batch, features). Arguments as in `Embed`."""
        dtype = self.dtype or self.embedding.dtype
        norm = {"scale": self.norm.scale, "bias": self.norm.bias, "epsilon": self.norm_epsilon}
        rows = maths.normalized_lookup(self.embedding, inputs, **norm, dtype=dtype, **self._options(out_sharding))
        return self._cast(rows, dtype)


class _Norm(nn.Module):
    """The parameters of a LayerNorm around the arithmetic that both APIs share."""

    features: int
    epsilon: float
    param_dtype: Any

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (self.features,), self.param_dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return maths.normalize(x, self.scale, self.bias, self.epsilon)
