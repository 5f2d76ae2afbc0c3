"""Which moments are stored in 8 bits, and how: user rules, then metadata, then the defaults below.

A decision depends on the parameter's path, global shape and dtype alone: never on a mesh, a process, an object's
identity or its position among the parameters.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from ..arguments import is_int
from ..trees import path_name
from .state_format import StateFormat

Bits = Literal[8, 32, "bf16", "rowwise"]


BITS = (8, 32, "bf16", "rowwise")


@dataclass(frozen=True)
class Rule:
    """What a rule sets for the parameters that it matches; None leaves the matter to what comes next.

    Args:
        bits: 32 keeps fp32 moments. 8 asks for bytes (the size rules of `StateFormat` still hold). "bf16" keeps
            bfloat16 moments, rounded up or down at random (without a key) so that slow means keep moving; those of
            `quantize_state` to nearest. "rowwise" keeps an fp32 first moment and one fp32 second moment for each row
            (the last axis): of the mean of squares over the row, as trainers of large embeddings do.
        state_format: how the bytes are stored, in place of the optimizer's `state_format`.
        lr_scale: multiplies the learning rate.
        b1: the decay rate of the first moment, in place of the optimizer's (SGD, LARS, RMSprop: of the momentum).
        b2: the decay rate of the second moment (RMSprop's `decay`; Lion's second rate).
        eps: the term in the denominator.
        weight_decay: in place of the optimizer's, also where its mask says no.
        memory_kind: "pinned_host" keeps the moments in the host's memory, from where each step fetches them and where
            it returns them (bitsandbytes' paged optimizers); XLA on TPU fetches ahead as far as the device's memory
            goes. Donate parameters and state together: JAX pairs donated arrays by shape, whatever their memory. A
            state that was restored to the device goes there in its first step, which `jax.lax.scan` does not take.
            "device" keeps them on the device.

    Raises:
        ValueError: other bits or memory, or a format for moments that are not in 8 bits. When the optimizer is made: a
            hyper-parameter that it does not have.
        TypeError: a hyper-parameter that is not a number; schedules belong to the optimizer.

    >>> import flax_stable_embed as fse
    >>> rules = (("wte", fse.Rule("rowwise", lr_scale=0.1)), ("head", fse.Rule(32, weight_decay=0.0)))
    >>> tx = fse.adamw8bit(1e-3, rules=rules)
    >>> paged = fse.adamw8bit(1e-3, rules=((".*", fse.Rule(memory_kind="pinned_host")),))
    """

    bits: Bits | None = None
    state_format: StateFormat | None = None
    lr_scale: float = 1.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    memory_kind: Literal["device", "pinned_host"] | None = None

    def __post_init__(self):
        if self.memory_kind not in (None, "device", "pinned_host"):
            raise ValueError(f"`memory_kind` must be 'device', 'pinned_host' or None, got {self.memory_kind!r}.")
        if self.bits is not None:
            if not _is_bits(self.bits):
                raise ValueError(f"`bits` must be 8, 32, 'bf16' or 'rowwise', got {self.bits!r}.")
            object.__setattr__(self, "bits", self.bits if isinstance(self.bits, str) else int(self.bits))
        if self.state_format is not None and not isinstance(self.state_format, StateFormat):
            raise TypeError(f"`state_format` must be a StateFormat, got {self.state_format!r}.")
        if self.bits not in (None, 8) and self.state_format is not None:
            raise ValueError(
                f"`state_format` says how 8-bit moments are stored, but `bits` is {self.bits!r}: {self}. Drop one."
            )
        for name, value in (("lr_scale", self.lr_scale), *self.overrides.items()):
            if not isinstance(value, int | float | np.number) or isinstance(value, bool):
                raise TypeError(f"`{name}` of a Rule must be a number, got {value!r}.")
            if not np.isfinite(value):
                raise ValueError(f"`{name}` of a Rule must be finite, got {value!r}.")
            if value is not None:
                object.__setattr__(self, name, float(value))

    @property
    def overrides(self) -> dict[str, float]:
        """The hyper-parameters that it sets, but for `lr_scale`."""
        values = {name: getattr(self, name) for name in ("b1", "b2", "eps", "weight_decay")}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def settings_text(self) -> str:
        """The settings that are not about storage, for a reader."""
        scale = {} if self.lr_scale == 1 else {"lr_scale": self.lr_scale}
        shown = [f"{name}={value:g}" for name, value in (scale | self.overrides).items()]
        return ", ".join(shown + [f"memory_kind={self.memory_kind}"] * (self.memory_kind is not None))


@dataclass(frozen=True)
class Where:
    """A predicate as a rule's pattern; not callable, or `optax.inject_hyperparams` would take it for a schedule."""

    predicate: Callable[[str, tuple[int, ...]], bool]


def where(predicate: Callable[[str, tuple[int, ...]], bool]) -> Where:
    """A pattern for `rules` that matches where `predicate(path, shape)` is true; the shape is the global one.

    >>> rules = ((where(lambda path, shape: len(shape) == 3), 32),)
    """
    if not callable(predicate) or not _takes_two(predicate):
        raise TypeError(
            f"`predicate` must be a function of a path and a shape, got {predicate!r}. Try lambda path, shape: ..."
        )
    return Where(predicate)


def _takes_two(function: Callable) -> bool:
    try:
        inspect.signature(function).bind("block/kernel", (64, 64))
    except TypeError:
        return False
    except ValueError:  # a builtin that does not tell
        pass
    return True


_SHAPES: ContextVar[Mapping[str, tuple[int, ...]]] = ContextVar("shapes", default={})  # noqa: B039  (never changed)


@contextmanager
def shapes_of_tables(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """While open, rules see these shapes in place of those of the rows that represent tables, by path."""
    token = _SHAPES.set(shapes)
    try:
        yield
    finally:
        _SHAPES.reset(token)


class Rules:
    """User rules, checked, with what follows from them for one parameter at a time."""

    def __init__(self, rules: Any, state_format: StateFormat):
        if not isinstance(state_format, StateFormat):
            raise TypeError(f"`state_format` must be a StateFormat, got {state_format!r}. Try StateFormat(codec=...).")
        self.state_format = state_format
        self.user = _normalize(rules)

    @property
    def formats(self) -> list[StateFormat]:
        """The formats in use: the optimizer's, then those of the rules in order."""
        return [self.state_format] + [rule.state_format for _, rule in self.user if rule.state_format is not None]

    def matches(self, path: str, shape: tuple[int, ...]) -> Iterator[int]:
        """Yields the places in `user` of the rules that match a parameter, in order; the first one wins."""
        shape = self.global_shape(path, shape)
        return (i for i, (pattern, _) in enumerate(self.user) if _matches(pattern, path, shape))

    def global_shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that rules see: of the table, where a step represents a table by a few of its rows."""
        return _SHAPES.get().get(path, shape)

    def texts(self) -> list[str]:
        """Returns the patterns of `user` for a reader, with a hint for those that are the path of a label."""
        hint = " (a label's path; a pattern goes into a pair: (({path!r}, ...),))"
        return [show_pattern(p) + (hint.format(path=p.path) if isinstance(p, _Path) else "") for p, _ in self.user]


@dataclass(frozen=True)
class _Path:
    """The exact path of a leaf of a label pytree."""

    path: str


def _normalize(rules: Any) -> list[tuple[re.Pattern | Where | _Path, Rule]]:
    if isinstance(rules, tuple | list) and all(_is_pair(r) for r in rules):
        return [(_pattern(pattern), _rule(value)) for pattern, value in rules]
    labels, _ = jax.tree_util.tree_flatten_with_path(rules, is_leaf=lambda x: isinstance(x, Rule))
    if _is_pair(rules):
        raise TypeError(f"`rules` must be pairs, got one: {rules!r}. Put it into a tuple: rules=({rules!r},).")
    if not labels or isinstance(rules, str):
        raise TypeError(
            "`rules` must be pairs such as (('lm_head', 32),), or a pytree of labels like the parameters, or () for "
            f"the defaults; got {rules!r}."
        )
    return [(_Path(path_name(path)), _rule(label)) for path, label in labels]


def _is_pair(rule: Any) -> bool:
    if not isinstance(rule, tuple | list) or len(rule) != 2:
        return False
    is_label = _is_bits(rule[0]) or isinstance(rule[0], Rule)  # "bf16" is one, and no pattern
    return not is_label and (isinstance(rule[0], str | re.Pattern | Where) or callable(rule[0]))


def _pattern(pattern: Any) -> re.Pattern | Where:
    if callable(pattern):
        raise TypeError(
            f"`rules` has the function {pattern!r} for a pattern. Wrap it: fse.where(function of a path and a shape)."
        )
    try:
        return re.compile(pattern) if isinstance(pattern, str) else pattern
    except re.error as error:
        raise ValueError(f"`rules` has {pattern!r}, which is not a regular expression: {error}.") from None


def _rule(value: Any) -> Rule:
    if isinstance(value, Rule):
        return value
    if _is_bits(value):
        return Rule(value)  # pyright: ignore[reportArgumentType]  # one of them
    raise ValueError(f"`rules` must give 8, 32, 'bf16', 'rowwise' or a Rule for each pattern, got {value!r}.")


def _matches(pattern: re.Pattern | Where | _Path, path: str, shape: tuple[int, ...]) -> bool:
    if isinstance(pattern, _Path):
        return pattern.path == path
    return bool(pattern.predicate(path, shape) if isinstance(pattern, Where) else pattern.search(path))


def show_pattern(pattern: Any) -> str:
    """Returns a pattern as the user wrote it."""
    if isinstance(pattern, Where):
        return f"where({getattr(pattern.predicate, '__name__', pattern.predicate)})"
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else getattr(pattern, "path", pattern))


def _is_bits(value: Any) -> bool:
    return (is_int(value) or isinstance(value, str)) and value in BITS
