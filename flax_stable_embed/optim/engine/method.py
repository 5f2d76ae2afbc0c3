"""What tells one optimizer from another: its formula, its moments and its hyper-parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...ops.blockwise_step.step import Moment, UpdateRule
from ..storage.moments import MomentSpec
from ..storage.plan import LeafPlan


@dataclass(frozen=True)
class Method:
    """One optimizer, as the engine runs it.

    Attributes:
        name: The optimizer's name, for error messages.
        state: The class of its state, a NamedTuple with the fields `count`, each moment, each `<moment>_absmax`, and
            `format`.
        rule: The formula, `rule(g, *moments, **hyper) -> (u, moments)`. It knows nothing about storage.
        moments: The moments that the state keeps for every parameter.
        hyper: `hyper(before, after, **overridable)` returns the rule's keyword arguments at a step, from the state's
            count before and after it. Python numbers and functions become static, arrays are traced.
        overridable: The hyper-parameters that a `Rule` can set for one parameter, with the optimizer's own values.
        centered: Whether the rule needs nu >= mu^2, because their difference is a variance.
        counts_steps: Whether `hyper` reads the count, so that a state without one cannot be continued.
    """

    name: str
    state: type
    rule: UpdateRule
    moments: tuple[MomentSpec, ...]
    hyper: Callable[..., dict[str, Any]]
    overridable: Mapping[str, Any] = field(default_factory=dict)
    centered: bool = False
    counts_steps: bool = True

    def stored(self, plan: LeafPlan) -> tuple[Moment, ...]:
        """Returns how the 8-bit moments of a parameter are stored."""
        hyper = {**self.overridable, **plan.rule.overrides}
        return tuple(moment.stored(plan.state_format, hyper) for moment in self.moments)

    @property
    def fields(self) -> list[str]:
        """The fields of the state that hold a pytree like the parameters."""
        return [name for moment in self.moments for name in (moment.name, f"{moment.name}_absmax")]

    @property
    def counts(self) -> list[str]:
        """The fields of the state that count steps."""
        return [name for name in self.state._fields if name.startswith("count")]  # pyright: ignore[reportAttributeAccessIssue]  # a NamedTuple
