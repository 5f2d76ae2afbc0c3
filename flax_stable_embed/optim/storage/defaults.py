"""The default rules: parameters named like embeddings, norms and biases keep float32 moments."""

import re
from typing import Literal

EMBEDDING = re.compile(r"(^|/)([^/]*_)?embeddings?$")
NORM_OR_BIAS = re.compile(r"(^|/)(scale|bias)$")
LIKE_AN_EMBEDDING = re.compile(r"emb|wte|vocab", re.IGNORECASE)


def default_bits(path: str) -> tuple[Literal[8, 32], str]:
    """Returns the bits of a parameter for which no user rule and no metadata decides, and the reason."""
    if EMBEDDING.search(path):
        return 32, "embedding"
    if NORM_OR_BIAS.search(path):
        return 32, "norm or bias"
    return 8, "default"
