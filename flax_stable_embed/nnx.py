"""Embeddings for Flax NNX: `Embed` with torch's options, and `StableEmbed`, which normalizes what it looks
up.

Both are subclasses of `flax.nnx.Embed`: same arguments, same `embedding` Param, same `attend`. The arithmetic
is in `ops/embedding.py`, and `linen.py` gives the same numbers, bit for bit.

Differences from `flax.nnx.Embed`: the table starts Xavier uniform (as in bitsandbytes), and it is cast to
`dtype` after the rows are gathered, not before, so that the gradient of a frequent token does not stall at
256 in bfloat16.
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
    """`flax.nnx.Embed` with the options of `torch.nn.Embedding`.

        y = promote_dtype(renorm(embedding[inputs]))

    Ids -1 .. -num_embeddings count from the end and ids outside the table give rows of NaN, as in Flax. With
    max_norm, only the rows that are returned are scaled: the stored table keeps its length. For torch's
    trajectory, where scaled rows are stored, wrap the optimizer: `fse.with_max_norm`.

    State: `embedding`, a Param of shape (num_embeddings, features) and dtype param_dtype.

    Args:
      num_embeddings: the number of rows.
      features: the length of a row.
      dtype: dtype of the output; by default param_dtype.
      param_dtype: dtype of the table. Its gradient is summed in at least float32 and has this dtype.
      embedding_init: initializer of the table.
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
      write_back: a lookup stores the rows that max_norm scales, as in torch, in evaluation too: training is then
        torch's trajectory. The module must be an argument of every transformation that calls it, and one that is
        handed back (of nnx.scan, a carry; of nnx.vmap, one of each); where NNX forbids the change it raises. By
        default modules change nothing; `fse.with_max_norm` gives the same trajectory.
      embedding_metadata: metadata of the Param, for example its sharding.
      rngs: the stream `params` draws the table.

    Raises:
      ValueError, TypeError: an option outside its range, or inputs that are not an array of integers.

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
        """A module that starts from `table`, (num_embeddings, features), its padding row as given.

        `options` are the keyword arguments of the class; `param_dtype` is by default the table's dtype. The
        table is copied and trainable, unlike that of torch's `from_pretrained(freeze=True)`: leave it out of
        the optimizer's `wrt` to freeze it.

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
        """Draw the table anew, Xavier uniform with a zero padding row, in place; dtype and metadata stay.

        As in torch and bitsandbytes: whatever `embedding_init` was, and without touching the norm of
        StableEmbed.
        """
        table = self.embedding[...]
        self.embedding[...] = maths.xavier_uniform(rngs.params(), table.shape, table.dtype)
        self._zero_padding_row()

    def _zero_padding_row(self) -> None:
        if self.padding_idx is not None:
            self.embedding[...] = maths.zero_padding_row(self.embedding[...], self.padding_idx)

    def __call__(self, inputs: jax.Array, out_sharding: Sharding = None) -> jax.Array:
        """Rows of the table: (*batch, features) for integer `inputs` of shape (*batch).

        `out_sharding`: sharding of the result under a mesh with Explicit axes, ignored elsewhere. By default
        that of the inputs, then that of the table's features.
        """
        table, options = self._table_and_options(inputs, out_sharding)
        (rows,) = self.promote_dtype((maths.lookup(table, inputs, **options),), dtype=self.dtype, inexact=False)
        return rows

    def attend(self, query: jax.Array, out_sharding: Sharding = None, *, token_ids: Any = None) -> jax.Array:
        """Tied logits, `query @ embedding.T` on the table as stored: (*batch, num_embeddings).

        `token_ids`: with max_norm, ids whose rows are scaled to it first, as in torch, where a lookup has scaled
        them in the table. The gradient is taken at the scaled rows, not through the scaling.
        """
        table = maths.table_for_logits(self.embedding.get_value(), token_ids, self.max_norm, self.norm_type, self.mode)
        query, table = self.promote_dtype((query, table), dtype=self.dtype)
        return jnp.dot(query, table.T, out_sharding=out_sharding)

    def _table_and_options(self, inputs: jax.Array, out_sharding: Sharding) -> tuple[Any, dict[str, Any]]:
        if self.write_back:
            self._write_back(inputs)
        table = self.embedding.get_value()  # maybe no array: see ops/looked_up.py
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
                "forbids: pass the module as an argument of nnx.jit, nnx.grad, nnx.remat, ..., or take write_back="
                "False and train with fse.with_max_norm."
            ) from error


def _check_write_back(write_back: bool, max_norm: float | None, sparse: bool) -> None:
    if write_back and max_norm is None:
        raise ValueError("`write_back=True` stores the rows that `max_norm` scales, but `max_norm` is None.")
    if write_back and sparse:
        raise ValueError(
            "`write_back=True` does not go with `sparse=True`: its copy of the table costs what sparse gradients save. "
            "Use fse.row_sparse(fse.with_max_norm(tx, max_norm))."
        )


class StableEmbed(Embed):
    """`Embed`, then a LayerNorm in float32: bitsandbytes' StableEmbedding.

        x = renorm(embedding[inputs]);    y = (x - mean) / sqrt(var + norm_epsilon) * scale + bias

    Statistics, scale and bias are float32 whatever the other dtypes (float64 with a float64 table); the
    output is cast once. A padding token gives `norm.bias`, not zeros, as in bitsandbytes. Rows of variance
    v come out with v / (v + epsilon), about 1 unless a table's values are tiny: drop a following multiplication by
    sqrt(features), and add positions after it.

    `attend` uses the table as stored, without the norm.

    State: `embedding`, a Param of shape (num_embeddings, features) and dtype param_dtype; `norm.scale` and
    `norm.bias`, (features,), float32. The optimizers of this package keep the state of all three in 32 bits
    by their default rules.

    Args:
      norm_epsilon: added to the variance. torch's 1e-5, not Flax's 1e-6.

    Every other argument as in `Embed`.

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
        """Normalized rows of the table: (*batch, features). Arguments as in `Embed`."""
        table, options = self._table_and_options(inputs, out_sharding)
        dtype = self.dtype or table.dtype
        if type(self.norm) is _Norm:
            norm = {"scale": self.norm.scale[...], "bias": self.norm.bias[...], "epsilon": self.norm.epsilon}
            rows = maths.normalized_lookup(table, inputs, **norm, dtype=dtype, **options)
        else:  # a user's own
            rows = self.norm(maths.lookup(table, inputs, dtype=maths.at_least_float32(table.dtype), **options))
        (rows,) = self.promote_dtype((rows,), dtype=self.dtype, inexact=False)
        return rows


class _Norm(nnx.Module):
    """The parameters of a LayerNorm around the arithmetic that both APIs share."""

    def __init__(self, features: int, epsilon: float, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return maths.normalize(x, self.scale[...], self.bias[...], self.epsilon)
