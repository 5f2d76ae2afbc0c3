"""The options that every 8-bit optimizer takes after its own arguments."""

from dataclasses import dataclass
from typing import Any

from ...ops.blockwise_step.api import Implementation
from ..storage.state_format import StateFormat


@dataclass(frozen=True)
class Options:
    """The keyword-only options of every 8-bit optimizer, made once and passed as is. `adamw8bit` describes them."""

    rules: Any = ()
    state_format: StateFormat = StateFormat()
    implementation: Implementation | None = None
    partition_specs: Any = None
    skip_nonfinite: bool = False
