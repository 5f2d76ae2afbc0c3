"""The default rules: which names are embeddings, norms and biases."""

import re

EMBEDDING = re.compile(r"(^|/)([^/]*_)?embeddings?$")


NORM_OR_BIAS = re.compile(r"(^|/)(scale|bias)$")


LIKE_AN_EMBEDDING = re.compile(r"emb|wte|vocab", re.IGNORECASE)


def _default(path: str) -> tuple[int, str]:
    if EMBEDDING.search(path):
        return 32, "embedding"
    if NORM_OR_BIAS.search(path):
        return 32, "norm or bias"
    return 8, "default"
