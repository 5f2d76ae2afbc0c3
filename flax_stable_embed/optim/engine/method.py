"""What tells one optimizer from another: its formula, its moments and its hyper-parameters."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..storage.moments import MomentName


@dataclass(frozen=True)
class Method:
    """One optimizer, for the engine.

    `rule(g, *moments, **hyper) -> (u, moments)` is a module-level function of arrays in float32 that knows no storage;
    `ops.blockwise.step.apply_rule` says what it can ask for by a parameter's name.
    `hyper(before, after, *, ...)` gives the rule's keyword arguments at a step, from the state's count before and after
    it: Python numbers and functions are static, arrays are traced. What it takes by keyword only (`b1`, `b2`, `eps`) a
    `Rule` can set for one parameter.
    """

    name: str
    state: type  # a NamedTuple: count, the moments, <moment>_absmax each, format
    rule: Callable
    moments: tuple[MomentName, ...]
    hyper: Callable[..., dict[str, Any]]
    counts_steps: bool = True  # whether `hyper` looks at the count, so that a state without one cannot go on

    @property
    def overridable(self) -> tuple[str, ...]:
        """The hyper-parameters that a `Rule` can set."""
        parameters = inspect.signature(self.hyper).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
