"""What tells one optimizer from another: its formula, its moments and its hyper-parameters."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal, NamedTuple

from ..ops.blockwise.step import Moment
from ._rules import StateFormat

Sums = Literal["gradients", "directions", "steps"]


class MomentName(NamedTuple):
    """A moment's field in the state, whether it can be negative, and what it begins with.

    dynamic_signed: the sign with the `dynamic` codec, where bitsandbytes decides.
    second: a mean or a sum of squares, of which `rowwise` keeps one for each row.
    slow: a mean over so many steps that stochastic rounding acts on it, as it does on second moments.
    sums: what a trace sums: gradients, directions (gradients times a trust ratio), or steps (learning rate and all);
        None where that depends on what is before it in a chain.
    """

    name: str
    signed: bool
    dynamic_signed: bool
    second: bool = False
    initial: Any = 0.0
    slow: bool = False
    sums: Sums | None = None

    def stored(self, state_format: StateFormat) -> Moment:
        signed = self.dynamic_signed if state_format.codec == "dynamic" else self.signed
        stochastic = state_format.rounding == "stochastic" and (self.second or self.slow)
        return Moment(signed, state_format.codec, stochastic)


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


def refuse_dtype(name: str, dtype: Any) -> None:
    """Raises where a dtype is asked for that optax takes for its moments."""
    if dtype is not None:
        raise TypeError(
            f"`{name}` must be None, got {dtype!r}: moments are stored in 8 bits or fp32. To choose which, use "
            "rules=((pattern, 8 or 32),)."
        )


def check_numbers(**values: Any) -> None:
    """Raises where a hyper-parameter is neither a number nor an array."""
    for name, value in values.items():
        if not isinstance(value, Number) and not hasattr(value, "dtype"):
            raise TypeError(f"`{name}` must be a number, got {value!r}.")


def check_schedules(**values: Any) -> None:
    """Raises where a hyper-parameter is neither a number nor a schedule."""
    check_numbers(**{name: value for name, value in values.items() if not callable(value)})
