"""Embeddings for Flax NNX: `Embed` with torch's options, and `StableEmbed`, which also normalizes its output.

Both are subclasses of `flax.nnx.Embed`, with the same arguments, the same `embedding` Param and the same `attend`. The
arithmetic is in `ops/embedding`. The modules in `linen.py` give the same numbers, bit for bit.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.nn.dtypes import promote_dtype as _promote_dtype

from .ops import embedding as maths
from .ops.embedding.gather import Sharding
from .ops.embedding.layer_norm import NORM_EPSILON


class Embed(nnx.Embed):
    """Looks up rows of an embedding table, with the options of `torch.nn.Embedding`.

        y = promote_dtype(renorm(embedding[inputs]))

    As in Flax, ids from -num_embeddings to -1 count from the end, and ids outside the table give rows of NaN. By
    default a lookup does not change the table: with `max_norm`, only the returned rows are scaled. torch stores the
    scaled rows. To train as torch does, wrap the optimizer in `fse.with_max_norm`, or use `write_back`.

    Differences from `flax.nnx.Embed`: the table is initialized Xavier uniform, as in bitsandbytes. Rows are cast to
    `dtype` after they are gathered, instead of the table before. The gradient of a token is then summed in float32. A
    sum in bfloat16 stalls at 256 equal terms.

    State: `embedding`, a Param of shape (num_embeddings, features) and dtype `param_dtype`.

    Args:
      num_embeddings: Number of rows of the table, such as the size of the vocabulary.
      features: Length of a row.
      dtype: Dtype of the output; by default `param_dtype`.
      param_dtype: Dtype of the table and of its gradient, which is summed in at least float32.
      embedding_init: Initializer of the table. Use `Embed.from_pretrained` to start from a given table.
      promote_dtype: Function that casts arrays to `dtype`: the rows of a lookup, query and table in `attend`.
      padding_idx: Index of the padding row; a negative one counts from the end. The row is initialized to zero (unless
        the table is pretrained) and gets no gradient from lookups. It still gets a gradient from `attend`, and weight
        decay applies to it.
      max_norm: Looked-up rows with a larger norm are scaled down to this norm. The gradient is taken at the scaled
        rows, not through the scaling.
      norm_type: The p of the p-norm that `max_norm` compares: 0, a positive number or infinity.
      scale_grad_by_freq: If True, the gradient of a token is divided by the number of times that the token appears in
        the call. Under `jax.jit` this is the number in the global batch, under a `jax.vmap` over examples the number in
        one example.
      sparse: If True, `fse.row_value_and_grad` returns the gradient of the looked-up rows alone, for `fse.row_sparse`,
        and never computes the dense gradient of the table. `jax.grad` still returns the dense gradient. It cannot be
        combined with `scale_grad_by_freq`, as in torch, nor with lookup="one_hot".
      lookup: "take" gathers the rows. "one_hot" multiplies a one-hot matrix by the table; the gradient is such a
        product, too, summed in float32. This needs num_embeddings times the arithmetic, but no gather and no scatter,
        and can be faster on TPU.
      mode: How to treat ids outside the table. "fill" returns rows of NaN. "clip" returns the first or the last row
        (for negative ids the first). "promise_in_bounds" skips the check, which is cheapest: every id must be between 0
        and num_embeddings - 1, and the rows of all others are undefined.
      write_back: If True, a lookup stores the rows that `max_norm` scales in the table, as in torch, during evaluation,
        too. Lookups then change the module. It must therefore be an argument of every NNX transformation that calls it,
        and one that may change there: a carry of `nnx.scan`, or one module per mapped element of `nnx.vmap`. Anything
        else raises an error. `fse.with_max_norm` trains in the same way and leaves the module alone.
      embedding_metadata: Metadata of the Param, for example its sharding.
      rngs: Random number generators. The table is drawn from the `params` stream.

    Raises:
      ValueError, TypeError: If an option is outside its range, or if the inputs are not an array of integers.

    >>> from flax_stable_embed import nnx as fse_nnx
    >>> embed = fse_nnx.Embed(num_embeddings=5, features=3, padding_idx=-1, rngs=nnx.Rngs(0))
    >>> embed(jnp.array([4]))
    Array([[0., 0., 0.]], dtype=float32)

    Source: torch.nn.Embedding; bitsandbytes.nn.Embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: maths.Initializer = maths.xavier_uniform,
        promote_dtype: Any = _promote_dtype,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        lookup: maths.Method = "take",
        mode: maths.Mode = "fill",
        write_back: bool = False,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        self.padding_idx = maths.check_options(
            num_embeddings=num_embeddings,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            lookup=lookup,
            mode=mode,
        )
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.lookup: maths.Method = lookup
        self.mode: maths.Mode = mode
        _check_write_back(write_back, max_norm, sparse)
        self.write_back = write_back
        super().__init__(
            num_embeddings,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=embedding_init,
            promote_dtype=promote_dtype,
            embedding_metadata=embedding_metadata,
            rngs=rngs,
        )
        if not maths.is_pretrained(embedding_init):
            self._zero_padding_row()

    @classmethod
    def from_pretrained(cls, table: Any, *, rngs: nnx.Rngs, **options: Any) -> Self:
        """Builds a module whose table starts as a copy of `table`.

        The padding row is kept as it is. The table is trainable, unlike in torch, where it is frozen by default. To
        freeze it, leave it out of the optimizer's `wrt`.

        Args:
          table: Array or nested lists of shape (num_embeddings, features).
          rngs: Random number generators, as for the class. The table does not depend on them.
          **options: Other keyword arguments of the class. `param_dtype` is by default the dtype of the table.

        Returns:
          A module of this class.

        Raises:
          ValueError: If the table does not have two axes.

        >>> from flax_stable_embed import nnx as fse_nnx
        >>> embed = fse_nnx.Embed.from_pretrained([[1.0, 2.0], [3.0, 4.0]], padding_idx=0, rngs=nnx.Rngs(0))
        >>> embed(jnp.array([0]))
        Array([[1., 2.]], dtype=float32)
        """
        init = maths.pretrained(table)
        num_embeddings, features = init.table.shape
        options = {"param_dtype": jax.dtypes.canonicalize_dtype(init.table.dtype), **options}
        return cls(num_embeddings, features, embedding_init=init, rngs=rngs, **options)

    def reset_parameters(self, rngs: nnx.Rngs) -> None:
        """Draws a new table in place: Xavier uniform, with a padding row of zeros.

        As in torch and bitsandbytes, this ignores `embedding_init` and does not reset the norm of `StableEmbed`. Dtype
        and metadata stay the same.

        Args:
          rngs: Random number generators. The table is drawn from the `params` stream.
        """
        table = self.embedding[...]
        self.embedding[...] = maths.xavier_uniform(rngs.params(), table.shape, table.dtype)
        self._zero_padding_row()

    def _zero_padding_row(self) -> None:
        if self.padding_idx is not None:
            self.embedding[...] = maths.zero_padding_row(self.embedding[...], self.padding_idx)

    def __call__(self, inputs: jax.Array, out_sharding: Sharding = None) -> jax.Array:
        """Returns the rows of the table at the given ids.

        Args:
          inputs: Array of integer ids, of any shape (*batch).
          out_sharding: Sharding of the result under a mesh with Explicit axes; ignored elsewhere. By default the
            result is sharded like `inputs`, and its last axis like the features of the table.

        Returns:
          Array of shape (*batch, features) and dtype `dtype`.
        """
        table, options = self._table_and_options(inputs, out_sharding)
        (rows,) = self.promote_dtype((maths.lookup(table, inputs, **options),), dtype=self.dtype, inexact=False)
        return rows

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
        table = maths.table_for_logits(self.embedding.get_value(), token_ids, self.max_norm, self.norm_type, self.mode)
        query, table = self.promote_dtype((query, table), dtype=self.dtype)
        return jnp.dot(query, table.T, out_sharding=out_sharding)

    def _table_and_options(self, inputs: jax.Array, out_sharding: Sharding) -> tuple[Any, dict[str, Any]]:
        if self.write_back:
            self._write_back(inputs)
        table = self.embedding.get_value()  # may not be an array: see ops/embedding/looked_up.py
        return table, {
            "padding_idx": self.padding_idx,
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "stored": self.write_back,
            "scale_grad_by_freq": self.scale_grad_by_freq,
            "sparse": self.sparse,
            "method": self.lookup,
            "mode": self.mode,
            "out_sharding": out_sharding,
        }

    def _write_back(self, inputs: jax.Array) -> None:
        assert self.max_norm is not None
        table = maths.renormed_rows(self.embedding[...], inputs, self.max_norm, self.norm_type, self.mode)
        try:
            self.embedding[...] = table
        except TraceContextError as error:
            raise ValueError(
                "`write_back=True` stores rows in a module that was made outside of this transformation, which NNX "
                "forbids. Pass the module as an argument of nnx.jit, nnx.grad, nnx.remat and so on, or use "
                "write_back=False and train with fse.with_max_norm."
            ) from error


def _check_write_back(write_back: bool, max_norm: float | None, sparse: bool) -> None:
    if write_back and max_norm is None:
        raise ValueError("`write_back=True` stores the rows that `max_norm` scales, but `max_norm` is None. Set it.")
    if write_back and sparse:
        raise ValueError(
            "`write_back=True` cannot be combined with `sparse=True`, because it copies the table, which costs as much "
            "as sparse gradients save. Use fse.row_sparse(fse.with_max_norm(tx, max_norm))."
        )


class StableEmbed(Embed):
    """Looks up rows of an embedding table and normalizes them: bitsandbytes' StableEmbedding.

        x = renorm(embedding[inputs]);    y = (x - mean) / sqrt(var + norm_epsilon) * scale + bias

    The LayerNorm runs in float32 whatever the other dtypes are (in float64 for a float64 table), and the output is cast
    once. As in bitsandbytes, a padding token gives the bias of the norm, not zeros. `attend` uses the table as it is
    stored, without the norm.

    With scale 1 and bias 0, a row of variance v gives an output of variance v / (v + norm_epsilon). This is about 1
    unless the values of the table are tiny. So remove a multiplication by sqrt(features) that follows the embedding,
    and add position embeddings after it.

    State: `embedding`, a Param of shape (num_embeddings, features) and dtype `param_dtype`; `norm.scale` and
    `norm.bias`, of shape (features,) and dtype float32. By default, the optimizers of this package keep fp32 moments
    for all three.

    Args:
      norm_epsilon: Small constant added to the variance, to avoid dividing by zero. The default is torch's 1e-5, not
        Flax's 1e-6.

    All other arguments are those of `Embed`.

    >>> from flax_stable_embed import nnx as fse_nnx
    >>> embed = fse_nnx.StableEmbed(num_embeddings=5, features=4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    >>> embed.embedding.shape, embed.norm.scale.shape, embed.norm.bias.shape
    ((5, 4), (4,), (4,))
    >>> embed(jnp.array([[0, 1, 2]])).dtype
    dtype(bfloat16)

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2.3,
    https://arxiv.org/abs/2110.02861
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: maths.Initializer = maths.xavier_uniform,
        promote_dtype: Any = _promote_dtype,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        lookup: maths.Method = "take",
        mode: maths.Mode = "fill",
        write_back: bool = False,
        norm_epsilon: float = NORM_EPSILON,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        maths.check_norm_options(norm_epsilon, param_dtype, dtype)
        super().__init__(
            num_embeddings,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=embedding_init,
            promote_dtype=promote_dtype,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            lookup=lookup,
            mode=mode,
            write_back=write_back,
            embedding_metadata=embedding_metadata,
            rngs=rngs,
        )
        self.norm = _Norm(features, norm_epsilon, maths.at_least_float32(param_dtype))

    def __call__(self, inputs: jax.Array, out_sharding: Sharding = None) -> jax.Array:
        """Returns the normalized rows of the table at the given ids. Arguments and shapes are as in `Embed`."""
        table, options = self._table_and_options(inputs, out_sharding)
        dtype = self.dtype or table.dtype
        if type(self.norm) is _Norm:
            norm = {"scale": self.norm.scale[...], "bias": self.norm.bias[...], "epsilon": self.norm.epsilon}
            rows = maths.normalized_lookup(table, inputs, **norm, dtype=dtype, **options)
        else:  # the user replaced the norm
            rows = self.norm(maths.lookup(table, inputs, dtype=maths.at_least_float32(table.dtype), **options))
        (rows,) = self.promote_dtype((rows,), dtype=self.dtype, inexact=False)
        return rows


class _Norm(nnx.Module):
    """Holds the parameters of a LayerNorm. The arithmetic is shared with Linen, in `ops/embedding`."""

    def __init__(self, features: int, epsilon: float, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return maths.normalize(x, self.scale[...], self.bias[...], self.epsilon)
