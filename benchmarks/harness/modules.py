"""Defines the Flax modules that `StableEmbed` replaces, and shapes of tables, for the benchmarks of embeddings."""

from typing import Any, NamedTuple

import flax.linen as nn


class Shape(NamedTuple):
    """A table, and the number of ids that a step looks up."""

    num_embeddings: int
    features: int
    tokens: int

    @property
    def allowed_temporaries(self) -> float:
        """Returns the bytes that a sparse step may need: four arrays of looked-up rows, and a megabyte."""
        return 4 * self.tokens * self.features * 4 + 1e6


class EmbedThenNorm(nn.Module):
    """An embedding followed by a LayerNorm: Flax's equivalent of `StableEmbed`."""

    num_embeddings: int
    features: int
    dtype: Any = None
    use_fast_variance: bool = True

    @nn.compact
    def __call__(self, ids):
        rows = nn.Embed(self.num_embeddings, self.features, dtype=self.dtype)(ids)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=self.use_fast_variance)(rows)
