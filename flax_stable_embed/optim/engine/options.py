"""The options that every 8-bit optimizer takes after its own arguments."""

from dataclasses import dataclass
from typing import Any

from ...ops.blockwise_step.api import Implementation
from ..storage.state_format import StateFormat


@dataclass(frozen=True)
class Options:
    """What a user can choose for any 8-bit optimizer; `adamw8bit` describes each one. Made once and passed as it is."""

    rules: Any = ()
    state_format: StateFormat = StateFormat()
    implementation: Implementation | None = None
    partition_specs: Any = None
    skip_nonfinite: bool = False
