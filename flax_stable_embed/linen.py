"""Embeddings for Flax Linen: `Embed` with torch's options, and `StableEmbed`, which also normalizes its output.

Both are subclasses of `flax.linen.Embed`, with the same positional arguments, the same `embedding` parameter and the
same `attend`. The arithmetic is in `ops/embedding`. The modules in `nnx.py` give the same numbers, bit for bit.
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
    """Returns a keyword-only field, so that Flax's own fields keep their positions."""
    return dataclasses.field(default=default, kw_only=True)


class Embed(nn.Embed):
    """Looks up rows of an embedding table, with the options of `torch.nn.Embedding`.

        y = promote_dtype(renorm(embedding[inputs]))

    As in Flax, ids from -num_embeddings to -1 count from the end, and ids outside the table give rows of NaN. A lookup
    never changes the table: with `max_norm`, only the returned rows are scaled. torch stores the scaled rows. To train
    as torch does, wrap the optimizer in `fse.with_max_norm`.

    Differences from `flax.linen.Embed`: the table is initialized Xavier uniform, as in bitsandbytes. Rows are cast to
    `dtype` after they are gathered, instead of the table before. The gradient of a token is then summed in float32. A
    sum in bfloat16 stalls at 256 equal terms.

    Parameters: `embedding`, of shape (num_embeddings, features) and dtype `param_dtype`.

    The options from `padding_idx` on are the same as those of `fse.nnx.Embed`, which describes them in full.

    Args:
      num_embeddings: Number of rows of the table, such as the size of the vocabulary.
      features: Length of a row.
      dtype: Dtype of the output; by default that of the table.
      param_dtype: Dtype of the table and of its gradient, which is summed in at least float32.
      embedding_init: Initializer of the table. Use `fse.linen.pretrained(table)` to start from a given table.
      promote_dtype: Function that casts arrays to `dtype`: the rows of a lookup, query and table in `attend`.
      padding_idx: Index of the padding row. It is initialized to zero and gets no gradient from lookups.
      max_norm: Looked-up rows with a larger norm are scaled down to this norm.
      norm_type: The p of the p-norm that `max_norm` compares.
      scale_grad_by_freq: If True, the gradient of a token is divided by the number of times that it appears.
      sparse: If True, `fse.row_value_and_grad` returns the gradient of the looked-up rows alone, for `fse.row_sparse`.
      lookup: "take" gathers the rows, "one_hot" multiplies a one-hot matrix by the table.
      mode: How to treat ids outside the table. "fill" returns rows of NaN, "clip" the nearest row. With
        "promise_in_bounds" there is no check, and rows of such ids are undefined.

    Raises:
      ValueError, TypeError: If an option is outside its range, or if the inputs are not an array of integers.

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
    scale_grad_by_freq: bool = _option(default=False)
    sparse: bool = _option(default=False)
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
        """Returns the rows of the table at the given ids.

        Args:
          inputs: Array of integer ids, of any shape (*batch).
          out_sharding: Sharding of the result under a mesh with Explicit axes; ignored elsewhere. By default the
            result is sharded like `inputs`, and its last axis like the features of the table.

        Returns:
          Array of shape (*batch, features) and dtype `dtype`.
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
        """Returns tied logits, `query @ embedding.T`, with the table as it is stored.

        Args:
          query: Array of shape (*batch, features).
          out_sharding: Sharding of the result under a mesh with Explicit axes; ignored elsewhere.
          token_ids: With `max_norm`, the ids that were looked up. Their rows are scaled first, because a lookup in
            torch scales them in the table. The gradient is taken at the scaled rows, not through the scaling.

        Returns:
          Array of shape (*batch, num_embeddings).
        """
        table = maths.table_for_logits(self.embedding, token_ids, self.max_norm, self.norm_type, self.mode)
        query_cast, table_cast = self.promote_dtype(query, table, dtype=self.dtype)
        assert query_cast is not None and table_cast is not None
        return jnp.dot(query_cast, table_cast.T, out_sharding=out_sharding)


class StableEmbed(Embed):
    """Looks up rows of an embedding table and normalizes them: bitsandbytes' StableEmbedding.

        x = renorm(embedding[inputs]);    y = (x - mean) / sqrt(var + norm_epsilon) * scale + bias

    The LayerNorm runs in float32 whatever the other dtypes are (in float64 for a float64 table), and the output is cast
    once. As in bitsandbytes, a padding token gives the bias of the norm, not zeros. `attend` uses the table as it is
    stored, without the norm.

    With scale 1 and bias 0, a row of variance v gives an output of variance v / (v + norm_epsilon). This is about 1
    unless the values of the table are tiny. So remove a multiplication by sqrt(features) that follows the embedding,
    and add position embeddings after it.

    Parameters: `embedding`, of shape (num_embeddings, features) and dtype `param_dtype`; `norm/scale` and `norm/bias`,
    of shape (features,) and dtype float32. By default, the optimizers of this package keep fp32 moments for all three.

    Args:
      norm_epsilon: Small constant added to the variance, to avoid dividing by zero. The default is torch's 1e-5, not
        Flax's 1e-6.

    All other arguments are those of `Embed`.

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
        """Returns the normalized rows of the table at the given ids. Arguments and shapes are as in `Embed`."""
        dtype = self.dtype or self.embedding.dtype
        norm = {"scale": self.norm.scale, "bias": self.norm.bias, "epsilon": self.norm_epsilon}
        rows = maths.normalized_lookup(self.embedding, inputs, **norm, dtype=dtype, **self._options(out_sharding))
        return self._cast(rows, dtype)


class _Norm(nn.Module):
    """Holds the parameters of a LayerNorm. The arithmetic is shared with NNX, in `ops/embedding`."""

    features: int
    epsilon: float
    param_dtype: Any

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (self.features,), self.param_dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return maths.normalize(x, self.scale, self.bias, self.epsilon)
