"""The options that every 8-bit optimizer takes after its own arguments."""

from dataclasses import dataclass

from ...ops.blockwise_step.api import Implementation
from ..storage.rules import UserRules
from ..storage.state_format import StateFormat
from ..trees import Specs


@dataclass(frozen=True)
class Options:
    """The keyword-only options of every 8-bit optimizer, made once and passed as is. `adamw8bit` describes them."""

    rules: UserRules = ()
    state_format: StateFormat = StateFormat()
    implementation: Implementation | None = None
    partition_specs: Specs = None
    skip_nonfinite: bool = False
