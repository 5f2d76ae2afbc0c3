"""Reads the state of a transform as named values, for `convert_state`.

The name of a value is its path, "0/mu/block/kernel". A moment is one value, even if it is stored as codes and scales.
So two states that store their moments in different ways have values of the same names and shapes.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import GetAttrKey

from ..engine.records import Record, StoredMoment, trace_init
from ..storage.format_code import format_code, format_difference, is_right
from ..storage.moments import Sums, is_codes
from ..trees import Params, path_name

# The chains of states of optax's SGD, LARS and RMSprop, and the terms that their traces sum.
_RATE = ("EmptyState", "ScaleByScheduleState")
_TRACE = ("TraceState",)
_RMS = ("ScaleByRmsState", "ScaleByRmsWithCountState", "ScaleByRStdDevState", "ScaleByRStdDevWithCountState")
_CHAINS_WITH_A_TRACE: tuple[tuple[Sums, tuple[tuple[str, ...], ...]], ...] = (
    ("gradients", (_TRACE, _RATE)),
    ("steps", (("MaskedState", "EmptyState"), ("MaskedState",), _RATE, _TRACE)),
    ("steps", (_RMS, _RATE, _TRACE)),
)


class NamedState:
    """The state that `tx.init(params)` makes, as named values.

    Attributes:
        argument: The argument that gave `tx`, for errors.
        state: The state, as shapes.
        expected: The shape and dtype of every array, by name, in the order of the leaves.
        paths: The key path of every array.
        moments: How each moment of an 8-bit transform is stored.
        scales: The name of each moment's array of scales.
        formats: The record of each 8-bit transform, by the name of its array `format`.
        sums: The terms that each trace sums, where that is known.
        without_counts: The 8-bit optimizers whose rule does not depend on the count.
        codes: The values that each array `format` must have.
        means: The name of the mean for each second moment of which a variance is computed.
        remainders: The names of the remainders of split weights.
        moment_fields: The fields of the moments, "mu" and "nu", and "remainder".
        counts: The names of all step counts.
        shapes: The shape of every value, without scales and formats. A moment has the shape that it has decoded.
        value_counts: The counts that are stored next to a value. The others belong to schedules, for example.
    """

    def __init__(self, argument: str, tx: optax.GradientTransformation, params: Params):
        self.argument = argument
        self.state, found = trace_init(tx, params)
        records = [(place, record) for place, record in found if place is not None]
        if len(records) < len(found):
            raise ValueError(
                f"A wrapper in `{argument}` hides the state of an 8-bit optimizer. Convert that optimizer's state."
            )
        # The state inside `quantize_state` and `split_weights` gets the names that it has without the wrapper.
        # The fields of `split_weights` itself get a name more, because the state inside may have such fields too.
        fields = [(*place, GetAttrKey(_field(record))) for place, record in records if record.method is None]
        self.wrappers = sorted(map(path_name, fields), key=len, reverse=True)
        self.splits = [path_name((*place, GetAttrKey(""))) for place, record in records if record.split]
        self.expected = dict(self.named(self.state))
        paths = [path for path, _ in jax.tree.leaves_with_path(self.state)]
        twice = [name for name, n in Counter(map(self.name, paths)).items() if n > 1]
        if twice:
            raise ValueError(
                f"Two values in the state of `{argument}` have the path {twice[0]!r}. Rename one of the parameters."
            )
        self.paths = {self.name(path): path for path in paths}
        self.moments: dict[str, StoredMoment] = {}
        self.scales: dict[str, str] = {}
        self.formats, self.without_counts = {}, set()
        self.codes: dict[str, np.ndarray] = {}
        self.means: dict[str, str] = {}
        self.remainders: set[str] = set()
        placeholders: set[str] = set()
        self.sums = {self.name(path): sums for path, sums in _traces_of_optax(self.state)}
        for place, record in records:
            declared = record.method.moments if record.method else ()
            for moment in record.moments:
                name = self.name((*place, *moment.codes))
                self.moments[name], self.scales[name] = moment, self.name((*place, *moment.absmax))
                self.sums.update((name, m.sums) for m in declared if m.name == moment.name and m.sums is not None)
            if record.method is not None and record.method.centered:
                names = {(m.path, m.name): self.name((*place, *m.codes)) for m in record.moments}
                self.means |= {name: names[path, "mu"] for (path, field), name in names.items() if field == "nu"}
            vector = self.name((*place, GetAttrKey("format")))
            self.formats[vector] = record
            if record.split is None:
                self.codes[vector] = format_code(record.formats, list(record.plans.values()))
            else:
                self.codes[vector] = record.split.code
                remainder = self.name((*place, GetAttrKey("remainder")))
                everywhere = [name for name in self.expected if name.startswith(f"{remainder}/")]
                own = {f"{remainder}/{path}" for path in record.split.remainders}
                self.remainders |= own
                placeholders |= {name for name in everywhere if name not in own}
            if record.method is not None and not record.method.counts_steps:
                self.without_counts.add(self.name(place))
        self.moment_fields = {moment.name for moment in self.moments.values()}
        self.moment_fields |= {"remainder"} if self.remainders else set()
        self.counts = [
            name
            for name, x in self.expected.items()
            if last_part(name).startswith("count") and x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
        ]
        shapes = {name: x.shape for name, x in self.expected.items()}
        shapes |= {name: moment.shape for name, moment in self.moments.items()}
        not_values = {*self.formats, *self.scales.values(), *placeholders}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in not_values}
        values = [name for name in self.shapes if name not in self.counts]
        self.value_counts = {count for name in values for count in self.counts_of(name).values()}

    def named(self, tree: Any) -> Iterator[tuple[str, Any]]:
        """Yields leaves by name. Tuples, NamedTuples, dicts, NNX variables and Linen boxes give the same names."""
        return ((self.name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree))

    def name(self, path: tuple) -> str:
        """Returns a path as "0/mu/block/kernel"."""
        name = path_name(path)
        for split in self.splits:
            own = name.removeprefix(split)
            if name.startswith(split) and own.partition("/")[0] in ("count", "remainder", "format"):
                name = f"{split}split_weights/{own}"
        for wrapper in self.wrappers:  # the longest first, so that one inside another is removed before it
            if name.startswith(f"{wrapper}/"):
                name = f"{wrapper.removesuffix(last_part(wrapper))}{name[len(wrapper) + 1 :]}"
        return name

    def counts_of(self, name: str) -> dict[str, str]:
        """Returns the step counts that are stored next to a value or further out: of each field name the nearest."""
        around = [count for count in self.counts if f"{name}/".startswith(count.removesuffix(last_part(count)))]
        return {last_part(count): count for count in sorted(around, key=len)}

    def array_names(self, name: str) -> tuple[str, ...]:
        """Returns the names of the arrays that store a value: codes and scales, or one array."""
        moment = self.moments.get(name)
        return (name,) if moment is None or moment.blocks is None else (name, self.scales[name])

    def arrays(self, state: Any) -> dict[str, Any]:
        """Returns the arrays of a state by name.

        Raises:
            ValueError: The state is not like the one that `init` makes.
        """
        arrays = dict(self.named(state))
        for name, record in self.formats.items():
            if name in arrays and is_right(arrays[name], self.codes[name]) is False:
                found = None if record.split else format_difference(arrays[name], record.formats)
                found = found or "its `format` says so"
                raise ValueError(
                    f"`state` was not made by `{self.argument}`: {found}. (A checkpoint loader that pads or truncates "
                    "arrays makes such states too.)"
                )
        wrong = [f"{name} is not in it" for name in self.expected if name not in arrays]
        wrong += [f"{name} is not in {self.argument}.init(params)" for name in arrays if name not in self.expected]
        for name, want in self.expected.items():
            if name in arrays and _shape_and_kind(arrays[name]) != _shape_and_kind(want):
                shape, kind = _shape_and_kind(arrays[name])
                wrong.append(f"{name} is {kind} of shape {shape}, and not {_shape_and_kind(want)[1]} of {want.shape}")
        if wrong:
            raise ValueError(f"`state` was not made by `{self.argument}` for these `params`: {listed(wrong)}.")
        return arrays

    def is_right(self, arrays: dict[str, Any]) -> bool | Array:
        """Returns whether the formats of all 8-bit transforms are right: True, and traced under `jit`."""
        right = True
        for name, code in self.codes.items():
            right &= is_right(arrays[name], code)
        return right


def _field(record: Record) -> str:
    """Returns the field of a wrapper's state that holds the state inside."""
    return "inner" if record.split is None else "inner_state"


def _traces_of_optax(state: Any) -> Iterator[tuple[tuple, Sums]]:
    """Yields the paths of the traces of optax's SGD, LARS and RMSprop, and the terms that each sums."""

    def summed(x: Any) -> Sums | None:
        names = [type(member).__name__ for member in x] if type(x) is tuple else []
        for sums, chain in _CHAINS_WITH_A_TRACE:
            if len(names) == len(chain) and all(name in allowed for name, allowed in zip(names, chain)):
                return sums
        return None

    for path, chain in jax.tree.leaves_with_path(state, is_leaf=lambda x: summed(x) is not None):
        if sums := summed(chain):
            for inner, _ in jax.tree.leaves_with_path(chain):
                if any(isinstance(key, GetAttrKey) and key.name == "trace" for key in inner):
                    yield (*path, *inner), sums


def _shape_and_kind(x: Any) -> tuple[tuple[int, ...], str]:
    """Returns the shape of an array, and its kind of dtype. Floating dtypes may differ, because loaders cast them."""
    dtype = getattr(x, "dtype", np.dtype(type(x)))
    kinds = {
        f"{dtype} codes": is_codes(dtype),
        "floating": jnp.issubdtype(dtype, jnp.floating),
        "complex": jnp.iscomplexobj(x),
    }
    return np.shape(x), next((kind for kind, has in kinds.items() if has), "another kind of array")


def last_part(name: str) -> str:
    """Returns the last part of a name."""
    return name.rpartition("/")[2]


def listed(texts: list[str], n: int = 8) -> str:
    """Joins the first `n` texts, and says how many more there are."""
    return "; ".join(texts[:n]) + (f"; and {len(texts) - n} more" if len(texts) > n else "")
