"""The default rules: parameters named like embeddings, norms and biases keep float32 moments."""

import re
from typing import Literal

EMBEDDING = re.compile(r"(^|/)([^/]*_)?embeddings?$")
NORM_OR_BIAS = re.compile(r"(^|/)(scale|bias)$")
# The scale of a norm is named by its module in Llama, T5, EasyLM and ports from torch: "input_layernorm/weight".
NORM_MODULE = re.compile(
    r"(^|/)([^/]*norm[^/]*|ln(_[^/]*|\d*))/(weight|kernel|gamma|beta|w|g)(/array)?$", re.IGNORECASE
)
# Tables by other names. A `kernel` is multiplied with, also that of a patch embedding.
LIKE_AN_EMBEDDING = re.compile(
    r"^(?!.*/kernel$).*(emb|wte|wpe|vocab|(^|[/_])pos(ition(s|al)?)?([/_]|$))", re.IGNORECASE
)


def default_bits(path: str) -> tuple[Literal[8, 32], str]:
    """Returns the bits of a parameter for which no user rule and no metadata decides, and the reason."""
    if EMBEDDING.search(path):
        return 32, "embedding"
    if NORM_OR_BIAS.search(path) or NORM_MODULE.search(path):
        return 32, "norm or bias"
    return 8, "default"
