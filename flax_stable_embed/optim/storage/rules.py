"""Which moments are stored in 8 bits, and how: user rules, then metadata, then the defaults below.

A decision depends on the parameter's path, global shape and dtype alone: never on a mesh, a process, an object's
identity or its position among the parameters.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...ops.blockwise.blocks import SMALLEST, Blocks
from ..arguments import _is_int
from ..trees import path_name
from .defaults import _default
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
    def shown(self) -> str:
        """What it sets besides the storage, in words."""
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


class Decision(NamedTuple):
    """What the rules say of one parameter."""

    bits: int | str
    format: StateFormat
    blocks: Blocks | None  # None for moments that are not in 8 bits
    reason: str
    rule: Rule = Rule()  # the user's, which may set hyper-parameters too

    @property
    def without_moments(self) -> "Decision":
        """The same for an optimizer that has none."""
        return self._replace(bits=32, blocks=None, reason="no moments")

    @property
    def shown(self) -> str:
        """Blocks and codec, in words; "" without them."""
        return f"{self.blocks.size} on axis {self.blocks.axis}, {self.format.codec}" if self.blocks else ""


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

    def first_match(self, path: str, shape: tuple[int, ...]) -> tuple[Any, Rule]:
        """The first user rule that matches: its pattern (None where none does) and what it sets."""
        shape = _SHAPES.get().get(path, shape)
        return next(((pattern, rule) for pattern, rule in self.user if _matches(pattern, path, shape)), (None, Rule()))

    def blocks(self, path: str, shape: tuple[int, ...]) -> tuple[StateFormat, Blocks]:
        """How a parameter that is stored in 8 bits is stored."""
        state_format = self.first_match(path, shape)[1].state_format or self.state_format
        return state_format, state_format.blocks(path, shape)

    def decide(self, path: str, shape: tuple[int, ...], dtype: Any, metadata_bits: int | None = None) -> Decision:
        """Bits, format, blocks and the reason, in words."""
        pattern, rule = self.first_match(path, shape)
        bits, reason = rule.bits, f"rule {_show(pattern)}"
        if bits is None and metadata_bits is not None:
            bits, reason = Rule(metadata_bits).bits, "metadata optim_bits"  # pyright: ignore[reportArgumentType]  # checked there
        if bits is None:
            bits, reason = _default(path)
        state_format, blocks = self.blocks(path, shape)
        obstacle = ""
        if bits != 32:
            obstacle = _cannot(shape, dtype)
        if bits == 8:
            obstacle = obstacle or _too_small(shape, state_format, blocks)
        if bits == "rowwise" and prod(shape[-1:]) == 1:
            obstacle = obstacle or ("rows of one element" if shape else "a scalar has no rows")
        if obstacle:
            bits, reason = 32, obstacle
        return Decision(bits, state_format, blocks if bits == 8 else None, reason, rule)

    def conflict(self, path: str, shape: tuple[int, ...], dtype: Any, stored_bits: int | str) -> str | None:
        """The user's rule that a stored state contradicts; metadata of NNX is not at hand after `init`."""
        pattern, rule = self.first_match(path, shape)
        if rule.bits is None or self.decide(path, shape, dtype).bits == stored_bits:
            return None
        return f"({_show(pattern)}, {rule.bits!r})"

    def unmatched(self, leaves: Sequence[tuple[str, tuple[int, ...]]]) -> list[Any]:
        """Patterns of user rules that match none of the parameters."""
        missing = [p for p, _ in self.user if not any(_matches(p, path, shape) for path, shape in leaves)]
        hint = " (a label's path; a pattern goes into a pair: (({path!r}, ...),))"
        return [_show(p) + (hint.format(path=p.path) if isinstance(p, _Path) else "") for p in missing]


def _cannot(shape: tuple[int, ...], dtype: Any) -> str:
    if not jnp.issubdtype(dtype, jnp.floating):
        return "complex" if jnp.issubdtype(dtype, jnp.complexfloating) else "not floating point"
    return "" if prod(shape) else "empty"


def _too_small(shape: tuple[int, ...], state_format: StateFormat, blocks: Blocks) -> str:
    if prod(shape) < state_format.min_size:
        return f"fewer than {state_format.min_size} elements"
    if state_format.min_size and shape and shape[blocks.axis] < SMALLEST:
        return f"blocked axis shorter than {SMALLEST}"
    return ""


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


def _show(pattern: Any) -> str:
    if isinstance(pattern, Where):
        return f"where({getattr(pattern.predicate, '__name__', pattern.predicate)})"
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else getattr(pattern, "path", pattern))


def _is_bits(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, str)) and value in BITS
