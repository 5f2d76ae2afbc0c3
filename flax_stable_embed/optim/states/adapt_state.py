"""Adapts a state to parameters that have changed: grown, dropped, new, renamed, stacked or unstacked.

`named_state.py` reads the states of the old and of the new parameters as named values, "0/mu/block/kernel". A name ends
with the path of a parameter. `Changes` knows which old parameters become a new one. A moment is copied as codes and
scales where its blocks stay the same. Otherwise it is decoded, changed and encoded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from ...ops.sharding import explicit_sharding
from ...ops.split_weights import convert_remainder
from ..boxes import unbox
from ..rows.catch_up import RowSparseState
from ..storage.moments import in_memory
from ..trees import Params, flatten, is_array, path_name
from .abstract_state import abstract_state
from .convert_state import convert_state, decoded, encoded, place_of, placed, same_codes
from .named_state import NamedState, listed

Paths = Mapping[str, str] | Callable[[str], str]
Stacks = Mapping[str, Sequence[str]]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class AdaptedValue(NamedTuple):
    """What became of one value of a state.

    Attributes:
        name: The name of the value in the new state; in the old one if it was dropped.
        change: "kept", "renamed", "resized", "stacked", "unstacked", "new" or "dropped".
        origin: The names of the old values that it comes from, joined by ", "; "" for a new one.
        old: The shape of the old value, None for a new one.
        new: The shape of the new value, None for a dropped one.
        encoded_again: Whether the value was decoded and encoded, because its blocks or its format changed.
        error: The root mean square of the difference that this made, relative to that of the value. It is 0 where the
            value is exact, and None where it is not known (shapes, or under `jit`).
    """

    name: str
    change: str
    origin: str = ""
    old: tuple[int, ...] | None = None
    new: tuple[int, ...] | None = None
    encoded_again: bool = False
    error: float | None = 0.0


class AdaptReport(NamedTuple):
    """What `adapt_state` did with every value of a state. It prints as a table without the values that were kept."""

    rows: tuple[AdaptedValue, ...]

    def __str__(self) -> str:
        changed = [row for row in self.rows if row.change != "kept" or row.encoded_again]
        lines = [("value", "change", "old shape", "new shape", "encoded again")]
        for row in changed:
            error = "error not known" if row.error is None else f"error {row.error:.1e}"
            old, new = ("" if shape is None else str(shape) for shape in (row.old, row.new))
            lines.append((row.name, row.change, old, new, error if row.encoded_again else ""))
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = ["  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([*(table if changed else []), f"{len(self.rows) - len(changed)} values kept"])


def adapt_state(
    tx: optax.GradientTransformation,
    state: Any,
    params: Params,
    new_params: Params,
    *,
    new_tx: optax.GradientTransformation | None = None,
    renames: Paths = _NOTHING,
    stack: Stacks = _NOTHING,
    unstack: Stacks = _NOTHING,
    kept_rows: Mapping[str, Any] = _NOTHING,
) -> tuple[Any, AdaptReport]:
    r"""Adapts a state to parameters that have changed, so that a run continues with a changed model.

    A parameter keeps its moments at the indices that its old and its new shape share. New elements start as in
    `tx.init(new_params)`, with zeros or the initial value of the optimizer. A parameter that is only in `new_params` is
    new, and the moments of one that is only in `params` are dropped. Step counts, schedules and everything else that
    does not belong to a parameter continue. The report names every value and what became of it.

    8-bit moments are copied exactly where their blocks stay the same. Otherwise they are decoded and encoded once, with
    rounding to nearest, and the report has the error. Records of `row_sparse`, remainders of `split_weights` and
    accumulators of `optax.MultiSteps` follow their parameters. The `params` themselves are yours to change, so is the
    remainder's bfloat16 part.

    The result is sharded as `tx.init(new_params)` shards it. If `new_params` are shapes, so is the result, with their
    shardings. So a checkpoint can be restored into the shapes of the adapted state.

    Args:
        tx: The optimizer that made `state`.
        state: Its state for `params`, or the shapes of one.
        params: The parameters before the change, or their shapes.
        new_params: The parameters after it, or their shapes.
        new_tx: Another optimizer for the new parameters, for example one with rules for their paths. If it keeps other
            moments than `tx`, the adapted state is given to `fse.convert_state`.
        renames: Old paths and their new ones, {"h_0/mlp": "blocks_0/mlp"}. A path stands for everything below it, too.
            Or a function from an old path to the new one.
        stack: Paths of new stacked parameters, and the old ones that they stack, in the order along a first axis:
            {"layers": ["layer_0", "layer_1"]}.
        unstack: Paths of old stacked parameters, and the new ones that they become: {"layers": ["layer_0", "layer_1"]}.
        kept_rows: Paths of new parameters, and for each row (along the first axis) the number of the old row that it
            is, or -1 for a new row. By default row i is row i.

    Returns:
        The state, and an `AdaptReport`.

    Raises:
        TypeError: `tx` or `new_tx` is not an optax transform.
        ValueError: `state` is not a state of `tx` for `params`. A parameter changes its number of axes, or layers that
            are stacked have several shapes. A path is not among the parameters. `kept_rows` have another length, or
            rows that do not exist. A value that belongs to no parameter would change its shape.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.adamw8bit(1e-3, rules=(("embedding", 8),))
    >>> params = {"embedding": jnp.ones((512, 64)), "kernel": jnp.ones((64, 128))}
    >>> state = tx.init(params)  # and many steps
    >>> grown = params | {"embedding": jnp.ones((640, 64))}
    >>> state, report = fse.adapt_state(tx, state, params, grown)
    >>> print(report)
    value           change   old shape  new shape  encoded again
    0/mu/embedding  resized  (512, 64)  (640, 64)
    0/nu/embedding  resized  (512, 64)  (640, 64)
    3 values kept
    """
    source = NamedState("tx", tx, params)
    changes = Changes(params, new_params, renames, stack, unstack, kept_rows)
    arrays = source.arrays(state)
    target = None if new_tx is None else NamedState("new_tx", new_tx, new_params)
    made_by: Any = new_tx
    if target is None or not _is_alike(source, target, changes):
        target, made_by = NamedState("tx", tx, new_params), tx
    plan = _Plan(source, target, changes)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (*arrays.values(), *jax.tree.leaves(new_params))):
        return abstract_state(new_tx or tx, new_params), AdaptReport(tuple(plan.rows({})))
    result, errors = _adapted(plan, made_by, new_params, arrays)
    report = AdaptReport(tuple(plan.rows(errors)))
    if new_tx is None or made_by is new_tx:
        return result, report
    return convert_state(tx, new_tx, new_params, result), report


def _is_alike(source: NamedState, target: NamedState, changes: "Changes") -> bool:
    """Returns whether two optimizers keep the same fields at the same places, so that they differ in storage only."""

    def fields(state: NamedState, paths: Mapping[str, Any]) -> set[str]:
        ends = {name: path_at_the_end(name, paths) or "" for name in state.shapes}
        return {name.removesuffix(end) for name, end in ends.items()}

    return fields(source, changes.old) == fields(target, changes.new)


class Part(NamedTuple):
    """An old parameter that becomes a new one, or a part of it. `index` is that of a layer of it, None for all."""

    path: str
    index: int | None = None


class Changes:
    """Which old parameters become each new one.

    Attributes:
        parts: For each path of a new parameter the old ones: none if it is new, several if they are stacked.
        stacked: The paths of new parameters that are stacked of old ones.
        kept_rows: For some paths of new parameters the number of the old row that each row is, or -1.
        old: The shapes of the old parameters, by path.
        new: The shapes of the new parameters, by path.
    """

    def __init__(
        self,
        params: Params,
        new_params: Params,
        renames: Paths,
        stack: Stacks,
        unstack: Stacks,
        kept_rows: Mapping[str, Any],
    ):
        self.old, self.new = _shapes(params), _shapes(new_params)
        renamed = renames if callable(renames) else lambda path: _moved(path, renames)
        names = {path: renamed(path) for path in self.old}
        for path, name in names.items():
            if not isinstance(name, str):
                raise TypeError(f"`renames` must give strings, got {name!r:.40} for {path!r}.")
        if not callable(renames):
            _check_used("renames", renames, self.old)
            _check_used("renames", renames.values(), self.new)
        by_new: dict[str, str] = {}
        self.stacked: set[str] = set()
        for path, name in names.items():
            if name in by_new:
                raise ValueError(f"`renames` gives {by_new[name]!r} and {path!r} the same path, {name!r}.")
            by_new[name] = path
        self.parts: dict[str, tuple[Part, ...]] = {
            name: (Part(by_new[name]),) if name in by_new else () for name in self.new
        }
        for top, layers in stack.items():
            self._stack(top, layers, by_new)
        for top, layers in unstack.items():
            self._unstack(top, layers, by_new)
        self.kept_rows = {path: self._rows(path, numbers) for path, numbers in kept_rows.items()}
        for name, parts in self.parts.items():
            self._check_axes(name, parts)

    def _stack(self, top: str, layers: Sequence[str], by_new: dict[str, str]) -> None:
        found = [name for name in self.new if _is_below(name, top)]
        if not found or not layers:
            raise ValueError(f"`stack` names {top!r} with {len(layers)} layers, which is not a path of `new_params`.")
        for name in found:
            olds = [by_new.get(layer + name[len(top) :]) for layer in layers]
            if None in olds:
                missing = layers[olds.index(None)] + name[len(top) :]
                raise ValueError(f"`stack` names {missing!r} for {name!r}, which is not a path of `params`.")
            if self.new[name][:1] != (len(layers),):
                raise ValueError(f"`stack` has {len(layers)} layers for {name!r}, which has shape {self.new[name]}.")
            self.parts[name] = tuple(Part(old) for old in olds if old is not None)
            self.stacked.add(name)

    def _unstack(self, top: str, layers: Sequence[str], by_new: dict[str, str]) -> None:
        found = [name for name in by_new if _is_below(name, top)]
        if not found or not layers:
            raise ValueError(f"`unstack` names {top!r} with {len(layers)} layers, which is not a path of `params`.")
        for name in found:
            if (shape := self.old[by_new[name]])[:1] != (len(layers),):
                raise ValueError(f"`unstack` has {len(layers)} layers for {name!r}, which had shape {shape}.")
            for i, layer in enumerate(layers):
                new = layer + name[len(top) :]
                if new not in self.new:
                    raise ValueError(f"`unstack` names {new!r}, which is not a path of `new_params`.")
                self.parts[new] = (Part(by_new[name], i),)

    def _rows(self, path: str, numbers: Any) -> np.ndarray:
        rows = np.asarray(numbers)
        parts = self.parts.get(path, ())
        if len(parts) != 1 or parts[0].index is not None or path in self.stacked:
            raise ValueError(
                f"`kept_rows` names {path!r}, which is not a path of `new_params` that one old parameter becomes. "
                "Stack or unstack layers in a call of its own."
            )
        old, new = self.old[self.parts[path][0].path], self.new[path]
        if not np.issubdtype(rows.dtype, np.integer) or not new or rows.shape != new[:1]:
            raise ValueError(
                f"`kept_rows` of {path!r} must be {new[:1]} integers, one per row of its shape {new}, got "
                f"{rows.dtype} of shape {rows.shape}."
            )
        if rows.size and (rows.min() < -1 or rows.max() >= old[0]):
            raise ValueError(
                f"`kept_rows` of {path!r} must be row numbers of its old shape {old}, or -1, got {rows.min()} to "
                f"{rows.max()}."
            )
        return rows

    def _check_axes(self, name: str, parts: tuple[Part, ...]) -> None:
        if not parts:
            return
        shapes = {self.old[part.path][part.index is not None :] for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"`stack` joins arrays of several shapes to {name!r}: {sorted(shapes)}.")
        (axes,) = {len(shape) for shape in shapes}
        if len(self.new[name]) != axes + (name in self.stacked):
            paths = ", ".join(repr(part.path) for part in parts)
            raise ValueError(
                f"{name!r} has shape {self.new[name]}, and {paths} had {self.old[parts[0].path]}: the number of axes "
                "differs. Use `stack` or `unstack` for layers, or another name for another parameter."
            )


def path_at_the_end(value: str, paths: Mapping[str, Any]) -> str | None:
    """Returns the path of a parameter with which the name of a value ends, the longest one; None if there is none.

    A step count and a hyper-parameter of `optax.inject_hyperparams` belong to no parameter, whatever their names are.
    """
    parts = value.split("/")
    if {"hyperparams", "hyperparams_states"} & {*parts}:
        return None
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in paths), None)


def _is_per_row(state: NamedState, name: str) -> bool:
    """Returns whether a moment is stored as one value per row ("rowwise")."""
    return name in state.moments and state.expected[name].shape != state.shapes[name]


class _Plan:
    """The old values from which each value of the new state is made.

    Attributes:
        source: The old state.
        target: The new state.
        changes: What happened to the parameters.
        origins: For each value of the new state, the old values and the layers to take of them.
    """

    def __init__(self, source: NamedState, target: NamedState, changes: Changes):
        self.source, self.target, self.changes = source, target, changes
        self.origins: dict[str, list[Part]] = {}
        problems = []
        for name, shape in target.shapes.items():
            path = None if name in target.counts and name in source.counts else self.path_of(name)
            if path is None:
                self.origins[name] = [Part(name)] if name in source.shapes else []
                if name in source.shapes and source.shapes[name] != shape:
                    problems.append(f"{name} has the shape {source.shapes[name]} before and {shape} after")
                continue
            head = name[: len(name) - len(path)]
            parts = [Part(head + part.path, part.index) for part in changes.parts[path]]
            there = [part for part in parts if part.path in source.shapes]
            self.origins[name] = parts if len(there) == len(parts) else []
            if there and len(there) < len(parts):
                missing = [part.path for part in parts if part not in there]
                problems.append(f"{name} is stacked of values that do not exist: {listed(missing)}")
        if problems:
            raise ValueError(f"The state cannot be adapted: {listed(problems)}.")

    def path_of(self, name: str) -> str | None:
        """Returns the path of the parameter that a value of the new state belongs to."""
        return path_at_the_end(name, self.changes.new)

    def is_stacked(self, name: str) -> bool:
        """Returns whether a value of the new state is stacked of old ones."""
        return self.path_of(name) in self.changes.stacked

    def change(self, name: str) -> str:
        """Returns what became of a value of the new state."""
        parts = self.origins[name]
        if not parts:
            return "new"
        if self.is_stacked(name):
            return "stacked"
        (part,) = parts
        if part.index is not None:
            return "unstacked"
        rows = self.changes.kept_rows.get(self.path_of(name) or "")
        resized = self.source.shapes[part.path] != self.target.shapes[name] or rows is not None
        return "resized" if resized else "kept" if part.path == name else "renamed"

    def keeps_codes(self, name: str) -> bool:
        """Returns whether a moment is copied as codes and scales, because its blocks stay."""
        parts, new = self.origins[name], self.target.moments.get(name)
        for part in parts:
            old = self.source.moments.get(part.path)
            layer = part.index is not None
            shift = self.is_stacked(name) - layer
            if not same_codes(old, new, shift) or old is None or new is None or old.blocks is None:
                return False
            axis, size = old.blocks.axis, old.blocks.size
            before, after = old.shape[axis : axis + 1], new.shape[axis + shift : axis + shift + 1]
            if before != after and min(*before, *after) % size:
                return False
            path = self.path_of(name) or ""
            if axis == 0 and path in self.changes.kept_rows:
                return False
        return bool(parts)

    def encodes_again(self, name: str) -> bool:
        """Returns whether a value is decoded and encoded."""
        moments = [self.source.moments.get(part.path) for part in self.origins[name]]
        new = self.target.moments.get(name)
        in_8_bits = any(m is not None and m.blocks is not None for m in (*moments, new))
        per_row = {_is_per_row(self.source, part.path) for part in self.origins[name]} | {
            _is_per_row(self.target, name)
        }
        return bool(moments) and (len(per_row) > 1 or (in_8_bits and not self.keeps_codes(name)))

    def rows(self, errors: Mapping[str, float | None]) -> Iterator[AdaptedValue]:
        """Yields what became of every value of the new state, then the values of the old one that were dropped."""
        used = set()
        for name, parts in self.origins.items():
            used |= {part.path for part in parts}
            old = self.source.shapes[parts[0].path] if parts else None
            again = self.encodes_again(name)
            origin = ", ".join(dict.fromkeys(part.path for part in parts))
            error = errors.get(name) if again else 0.0
            yield AdaptedValue(name, self.change(name), origin, old, self.target.shapes[name], again, error)
        for name, shape in self.source.shapes.items():
            if name not in used:
                yield AdaptedValue(name, "dropped", name, shape)


def _adapted(plan: _Plan, tx: Any, new_params: Params, arrays: dict[str, Any]) -> tuple[Any, dict]:
    """Returns the new state, and the errors of the moments that were encoded again."""
    source, target = plan.source, plan.target
    first = dict(target.named(tx.init(new_params)))
    records = _records_of_rows(source, arrays)
    made, errors = dict(first), {}

    def old(k: str) -> Array:
        return in_memory(jnp.asarray(arrays[k]), "device")

    def new(k: str) -> Array:
        return in_memory(first[k], "device")

    for name, parts in plan.origins.items():
        names = target.array_names(name)
        if not parts:
            values = [new(k) for k in names]
        elif not plan.encodes_again(name):
            olds = [[old(k) for k in source.array_names(part.path)] for part in parts]
            # A remainder keeps its bits until it is complete.
            starts = [new(k).astype(olds[0][0].dtype) if name in target.remainders else new(k) for k in names]
            values = [_resized(plan, name, parts, *both) for both in zip(zip(*olds), starts)]
        else:
            olds = [decoded([old(k) for k in source.array_names(p.path)], source.moments.get(p.path)) for p in parts]
            start = decoded([new(k) for k in names], target.moments.get(name))
            value = _resized(plan, name, parts, olds, start)
            values = encoded(value, target.moments.get(name), target.expected[name])
            errors[name] = _error(value, decoded(list(values), target.moments.get(name)))
        if name in target.remainders and parts:
            values = [convert_remainder(x, target.expected[name].dtype) for x in values]
        if parts and parts[0].path in records:
            values = [_from_now_on(plan, name, values[0], records[parts[0].path])]
        for k, x in zip(names, values):
            dtype = target.expected[k].dtype
            made[k] = placed(x if x.dtype == dtype else x.astype(dtype), *place_of(first[k]))
    return jax.tree.structure(target.state).unflatten(made[name] for name in target.expected), errors


def _resized(plan: _Plan, name: str, parts: Sequence[Part], olds: Sequence[Array], start: Array) -> Array:
    """Returns the array of a new value: `start` with old arrays at the indices that both have."""

    def of_arrays(olds: list[Array], start: Array) -> Array:
        return _joined(plan, name, parts, olds, start)

    sharding = explicit_sharding(start)
    if sharding is None:
        return of_arrays([*olds], start)
    olds = [jnp.asarray(x) for x in olds]
    placed_alike: Any = jax.sharding.auto_axes(of_arrays, axes=sharding.mesh.axis_names, out_sharding=sharding)
    return placed_alike(olds, start)


def _joined(plan: _Plan, name: str, parts: Sequence[Part], olds: Sequence[Array], start: Array) -> Array:
    layers = [x if part.index is None else x[part.index] for part, x in zip(parts, olds)]
    x = jnp.stack(layers) if plan.is_stacked(name) else layers[0]
    x = x.astype(start.dtype)
    rows = plan.changes.kept_rows.get(plan.path_of(name) or "")
    if rows is not None and x.ndim and len(rows) == start.shape[0]:
        is_old = jnp.asarray(rows >= 0).reshape(-1, *[1] * (x.ndim - 1))
        x = x[jnp.asarray(np.maximum(rows, 0))]
        shared = tuple(slice(0, min(n, m)) for n, m in zip(x.shape, start.shape))
        return start.at[shared].set(jnp.where(is_old, x[shared], start[shared]))
    if x.shape == start.shape:
        return x
    shared = tuple(slice(0, min(n, m)) for n, m in zip(x.shape, start.shape))
    return start.at[shared].set(x[shared])


def _records_of_rows(source: NamedState, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a row that is up to date, for the name of every array of records of `row_sparse`."""
    found: dict[str, Any] = {}
    is_record = lambda x: isinstance(x, RowSparseState)  # noqa: E731
    for place, record in jax.tree.leaves_with_path(source.state, is_leaf=is_record):
        if not is_record(record):
            continue
        for field, now in (("last", "count"), ("last_log_decay", "log_decay")):
            key = jax.tree_util.GetAttrKey(field)
            for path, _ in jax.tree.leaves_with_path(getattr(record, field)):
                of_now = (*place, jax.tree_util.GetAttrKey(now), *(path if now == "log_decay" else ()))
                found[source.name((*place, key, *path))] = arrays[source.name(of_now)]
    return found


def _from_now_on(plan: _Plan, name: str, value: Array, now: Any) -> Array:
    """Returns the records of rows, in which new rows have made all steps so far, so that they catch up on none."""
    before = plan.source.shapes[plan.origins[name][0].path]
    if value.ndim == 0 or plan.change(name) not in ("kept", "renamed", "resized"):
        return value
    rows = plan.changes.kept_rows.get(plan.path_of(name) or "")
    is_old = np.arange(value.shape[0]) < before[0] if rows is None else rows >= 0
    is_old = jnp.asarray(is_old).reshape(-1, *[1] * (value.ndim - 1))
    return jnp.where(is_old, value, jnp.asarray(now).astype(value.dtype))


def _error(x: Array, stored: Array) -> float | None:
    """Returns the root mean square of the difference of two arrays, relative to that of the first."""
    if isinstance(x, Tracer) or not x.size:
        return None if x.size else 0.0
    wanted = float(jnp.sqrt(jnp.mean(jnp.square(x))))
    return float(jnp.sqrt(jnp.mean(jnp.square(stored - x)))) / wanted if wanted else 0.0


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(unbox(x).shape) for path, x in flatten(params) if is_array(x)}


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _moved(path: str, renames: Mapping[str, str]) -> str:
    """Returns the new path; the longest old path above it decides."""
    above = [old for old in renames if _is_below(path, old)]
    if not above:
        return path
    old = max(above, key=len)
    return renames[old] + path[len(old) :]


def _check_used(argument: str, tops: Any, paths: Mapping[str, Any]) -> None:
    for top in tops:
        if not any(_is_below(path, top) for path in paths):
            raise ValueError(f"`{argument}` names {top!r}, but the paths are {listed(sorted(paths))}.")
