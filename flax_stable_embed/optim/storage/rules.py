"""Defines `Rule`, and matches a user's `rules` with parameters. The first rule that matches wins.

A rule sees only a parameter's path and its global shape. So a rule matches the same parameters on every mesh and in
every process. `plan.py` applies the rules, then NNX metadata, then the default rules of `defaults.py`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np

from ..arguments import is_int
from ..trees import path_name
from .state_format import StateFormat

Bits = Literal[8, 32, "bf16", "rowwise"]
BITS: tuple[Bits, ...] = get_args(Bits)
UserRules = Any  # pairs (pattern, setting), or a pytree of settings like the parameters

# Shapes of embedding tables by path, while a step represents each table by a few of its rows. `row_sparse` sets them.
_TABLE_SHAPES: ContextVar[Mapping[str, tuple[int, ...]]] = ContextVar("table_shapes", default={})  # noqa: B039  (never changed)


@dataclass(frozen=True)
class Rule:
    """Says how to treat the parameters that a pattern in `rules` matches. The first rule that matches wins.

    A hyper-parameter that is None keeps the optimizer's own value.

    Args:
        bits: How the moments are stored. If None, the NNX metadata `optim_bits` decides, then the default rules. Later
            user rules are not consulted.
            8: one byte per element, unless the parameter is too small (see `StateFormat.min_size`).
            32: float32.
            "bf16": bfloat16, rounded up or down at random (no PRNG key is needed), because rounding to nearest would
            stop slow averages. (In `quantize_state` they are rounded to nearest, so slow averages may stop.)
            "rowwise": a float32 first moment, and one float32 second moment per row (along the last axis), which
            averages the squares over the row. Large embedding tables are often trained this way.
        state_format: How 8-bit moments are stored, instead of the optimizer's `state_format`.
        lr_scale: Factor by which the learning rate is multiplied.
        b1: Decay rate of the first moment, instead of the optimizer's. For SGD, LARS and RMSprop: of the momentum.
            For Lion: the weight of the moment where the sign is taken.
        b2: Decay rate of the second moment, instead of the optimizer's. RMSprop calls it `decay`. For Lion:
            the decay rate of its only moment.
        eps: Small constant in the denominator, instead of the optimizer's.
        weight_decay: Strength of the weight decay, instead of the optimizer's. It also applies where the optimizer's
            mask is False.
        memory_kind: The memory that holds the moments. If None, they stay in the memory that they are in. Moments of
            vectors and scalars that are not in 8 bits stay on the device.
            "device": the memory of the device.
            "pinned_host": host memory, like bitsandbytes' paged optimizers. Each step copies the moments to the device
            and back; on TPU, XLA starts these copies early as far as device memory allows. Donate parameters and state
            together, because JAX pairs donated arrays by shape and ignores their memory. A state that was restored to
            the device moves to host memory in its first step. That step cannot be inside `jax.lax.scan`, whose carry
            must keep its memory.
        stacked: The axes along which independent parameters are stacked, as `nn.scan` and `nnx.vmap` stack the layers
            of a model: a number n for the first n axes, or a tuple of axes, such as (1,) for MaxText's scanned layers.
            Each slice is then treated as a parameter of its own: norms over a parameter (LAMB, LARS, `max_unorm`,
            `percentile_clipping`), `min_size`, and the choice of blocks. `block_axis` is an axis of the slice.

    Raises:
        ValueError: `bits` or `memory_kind` is unknown, or there is a `state_format` but `bits` is not 8, or `stacked`
            is not a number of axes or a tuple of axes. The optimizer raises if a rule sets a hyper-parameter that it
            does not have, or if a parameter does not have the axes in `stacked`.
        TypeError: A hyper-parameter is not a number. Schedules are only possible in the optimizer itself.

    >>> import flax_stable_embed as fse
    >>> rules = (("wte", fse.Rule("rowwise", lr_scale=0.1)), ("head", fse.Rule(32, weight_decay=0.0)))
    >>> tx = fse.adamw8bit(1e-3, rules=rules)
    >>> paged = fse.adamw8bit(1e-3, rules=((".*", fse.Rule(memory_kind="pinned_host")),))
    >>> scanned = fse.lamb8bit(1e-3, rules=(("^layers/", fse.Rule(stacked=1)),))
    """

    bits: Bits | None = None
    state_format: StateFormat | None = None
    lr_scale: float = 1.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    memory_kind: Literal["device", "pinned_host"] | None = None
    stacked: int | tuple[int, ...] = 0

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
                f"`state_format` says how 8-bit moments are stored, but `bits` is {self.bits!r} in {self}. Drop one of "
                "the two."
            )
        for name, value in (("lr_scale", self.lr_scale), *self.overrides.items()):
            if not isinstance(value, int | float | np.number) or isinstance(value, bool):
                raise TypeError(
                    f"`{name}` of a Rule must be a number, got {value!r}. Only an optimizer takes schedules."
                )
            if not np.isfinite(value):
                raise ValueError(f"`{name}` of a Rule must be finite, got {value!r}.")
            if value is not None:
                object.__setattr__(self, name, float(value))
        object.__setattr__(self, "stacked", _checked_stacked(self.stacked))

    @property
    def overrides(self) -> dict[str, float]:
        """The hyper-parameters that the rule sets, except for `lr_scale`."""
        values = {name: getattr(self, name) for name in ("b1", "b2", "eps", "weight_decay")}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def settings_text(self) -> str:
        """The settings except for `bits` and `state_format`, for a reader."""
        scale = {} if self.lr_scale == 1 else {"lr_scale": self.lr_scale}
        shown = [f"{name}={value:g}" for name, value in (scale | self.overrides).items()]
        shown += [f"memory_kind={self.memory_kind}"] * (self.memory_kind is not None)
        return ", ".join(shown + [f"stacked={self.stacked}"] * bool(self.stacked))

    def stacked_axes(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the axes in `stacked` of a parameter, in order.

        Raises:
            ValueError: The parameter does not have them.
        """
        axes = sorted(self.stacked) if isinstance(self.stacked, tuple) else range(self.stacked)
        if axes and axes[-1] >= len(shape):
            raise ValueError(
                f"`rules` has stacked={self.stacked} for parameter {path!r}, but its shape {shape} has {len(shape)} "
                "axes. Match only the parameters that a scan over layers has stacked."
            )
        return tuple(axes)


def _checked_stacked(stacked: Any) -> int | tuple[int, ...]:
    """Returns `stacked` with Python's integers."""
    axes = stacked if isinstance(stacked, tuple) else (stacked,)
    if not all(is_int(axis) and axis >= 0 for axis in axes) or len(set(axes)) < len(axes):
        raise ValueError(
            f"`stacked` of a Rule must be the number of axes that stack parameters, or a tuple of axes, got "
            f"{stacked!r}. Try 1, or (1,) for the second axis alone."
        )
    return tuple(map(int, stacked)) if isinstance(stacked, tuple) else int(stacked)


@dataclass(frozen=True)
class Where:
    """Wraps a predicate. It is not callable, because `optax.inject_hyperparams` would take it for a schedule."""

    predicate: Callable[[str, tuple[int, ...]], bool]


def where(predicate: Callable[[str, tuple[int, ...]], bool]) -> Where:
    """Makes a pattern for `rules` that matches the parameters for which `predicate(path, shape)` is true.

    Args:
        predicate: Function of a parameter's path, "block/kernel", and of its global shape. It returns a boolean.

    Raises:
        TypeError: `predicate` is not such a function.

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


@contextmanager
def table_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Lets rules see these shapes of tables, by path, instead of the shapes of the rows that a step passes."""
    token = _TABLE_SHAPES.set(shapes)
    try:
        yield
    finally:
        _TABLE_SHAPES.reset(token)


class Rules:
    """A user's rules, checked, and the optimizer's `state_format`."""

    def __init__(self, rules: UserRules, state_format: StateFormat):
        if not isinstance(state_format, StateFormat):
            raise TypeError(f"`state_format` must be a StateFormat, got {state_format!r}. Try StateFormat(codec=...).")
        self.state_format = state_format
        self.user = _normalize(rules)

    @property
    def formats(self) -> list[StateFormat]:
        """The formats in use: the optimizer's, then the formats of the rules in order."""
        return [self.state_format] + [rule.state_format for _, rule in self.user if rule.state_format is not None]

    def matches(self, path: str, shape: tuple[int, ...]) -> Iterator[int]:
        """Yields the indices in `user` of the rules that match a parameter, in order. The first one wins."""
        shape = self.global_shape(path, shape)
        return (i for i, (pattern, _) in enumerate(self.user) if matches_pattern(pattern, path, shape))

    def global_shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that rules see. A step may represent a table by a few rows: rules see the table's shape."""
        return _TABLE_SHAPES.get().get(path, shape)

    def texts(self) -> list[str]:
        """Returns the patterns of `user` as text. A path of a label gets a hint: the user may have meant a pair."""
        hint = " (the path of a label; to use it as a pattern, write a pair: (({path!r}, ...),))"
        return [show_pattern(p) + (hint.format(path=p.path) if isinstance(p, _Path) else "") for p, _ in self.user]


@dataclass(frozen=True)
class _Path:
    """The exact path of a leaf of a label pytree."""

    path: str


def _normalize(rules: UserRules) -> list[tuple[re.Pattern | Where | _Path, Rule]]:
    if isinstance(rules, tuple | list) and all(is_pair(r) for r in rules):
        return [(pattern_of(pattern), _rule(value)) for pattern, value in rules]
    labels, _ = jax.tree_util.tree_flatten_with_path(rules, is_leaf=lambda x: isinstance(x, Rule))
    if is_pair(rules):
        raise TypeError(f"`rules` must be a tuple of pairs, got a single pair {rules!r}. Use rules=({rules!r},).")
    if not labels or isinstance(rules, str):
        raise TypeError(
            "`rules` must be a tuple of pairs such as (('lm_head', 32),), or a pytree of labels like the parameters, "
            f"or () for the defaults, got {rules!r}."
        )
    return [(_Path(path_name(path)), _rule(label)) for path, label in labels]


def is_pair(rule: Any) -> bool:
    """Returns whether a rule is a pair with a pattern."""
    if not isinstance(rule, tuple | list) or len(rule) != 2:
        return False
    is_label = _is_bits(rule[0]) or isinstance(rule[0], Rule)  # "bf16" is a label, not a pattern
    return not is_label and (isinstance(rule[0], str | re.Pattern | Where) or callable(rule[0]))


def pattern_of(pattern: Any) -> re.Pattern | Where:
    """Returns a user's pattern, with a string as a regular expression."""
    if callable(pattern):
        raise TypeError(
            f"`rules` has the function {pattern!r} as a pattern. Use fse.where(function of a path and a shape)."
        )
    try:
        return re.compile(pattern) if isinstance(pattern, str) else pattern
    except re.error as error:
        raise ValueError(
            f"`rules` has {pattern!r}, which is not a regular expression: {error}. Put a backslash before special "
            "characters."
        ) from None


def _rule(value: Any) -> Rule:
    if isinstance(value, Rule):
        return value
    if _is_bits(value):
        return Rule(value)  # pyright: ignore[reportArgumentType]  # `_is_bits` checked it
    raise ValueError(f"`rules` must give 8, 32, 'bf16', 'rowwise' or a Rule for each pattern, got {value!r}.")


def matches_pattern(pattern: re.Pattern | Where | _Path, path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a pattern matches a parameter."""
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
