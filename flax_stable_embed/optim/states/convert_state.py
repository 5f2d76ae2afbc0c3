"""The state of one optimizer as that of another: other codecs, blocks or rules, or optax's own optimizer.

Both states are seen as named values: a moment of a parameter in fp32 whatever stores it, everything else as it is. What
has the same name, "0/mu/block/kernel", is the same; a moment that another state of the chain holds is found by the end
of its name, "mu/block/kernel". Then each value is stored as the target stores it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import GetAttrKey

from ..engine.records import StoredMoment, trace_init
from ..storage.format_code import format_difference
from ..storage.moments import Sums, dequantize_moment, in_memory, is_codes, memory_of, quantize_moment
from ..trees import path_name

# What the trace sums in a chain of these states, which are those of optax's SGD, LARS and RMSprop.
_RATE, _TRACE = ("EmptyState", "ScaleByScheduleState"), ("TraceState",)


_RMS = ("ScaleByRmsState", "ScaleByRmsWithCountState", "ScaleByRStdDevState", "ScaleByRStdDevWithCountState")


_CHAINS_WITH_A_TRACE: tuple[tuple[Sums, tuple[tuple[str, ...], ...]], ...] = (
    ("gradients", (_TRACE, _RATE)),
    ("steps", (("MaskedState", "EmptyState"), ("MaskedState",), _RATE, _TRACE)),
    ("steps", (_RMS, _RATE, _TRACE)),
)


def convert_state(
    tx_from: optax.GradientTransformation,
    tx_to: optax.GradientTransformation,
    params: Any,
    state: Any,
    *,
    allow_reset: Sequence[str] = (),
) -> Any:
    """The state of `tx_from` as one of `tx_to`, so that a run goes on with another optimizer.

    Between optax's optimizers and ours of the same name, in both directions; from one codec, rounding, block size or
    set of rules to another; from a transform to `quantize_state` of it; also inside chain, masked, partition,
    MultiSteps, inject_hyperparams. Codes are copied where both store them alike. Else a moment is decoded to fp32 and
    stored to the nearest code: from 8 bits to fp32 and back every code is the same (but with the `dynamic` codec a
    block's largest element, if it is negative, loses 0.7% each time it is stored). "rowwise" takes the mean of each row
    and gives it to the whole row. A step count is that of the moments that it counts for, else that of its nearest
    neighbour (a schedule's of a schedule), or 0 where nothing but random bits depends on it; one that the target lacks
    is dropped. Nothing else is dropped or begun anew.

    What has the same name must mean the same. Of traces, SGD's of gradients and LARS' and RMSprop's of steps are told
    apart, here and in optax; what a chain of your own feeds to a trace is yours to know. That Adamax' `nu` is a maximum
    of magnitudes and Adam's a mean of squares, no state tells.

    Runs under `jit`. The result shares no memory with `state`, and every array lies on devices as `tx_to.init(params)`
    lays it (under `jit` and an Auto mesh: as the compiler chooses).

    Args:
        tx_from: the optimizer that made `state`.
        tx_to: the optimizer to go on with.
        params: the parameters, or their shapes.
        state: as `tx_from.init(params)` makes it; the trees of dicts and lists that checkpoints hold will do.
        allow_reset: names of fields, "nu" or "acc_grads" say, that may begin anew in the target, or stay behind. Of
            several counts for one, "count" takes the largest. Moments that begin anew with all others of their
            optimizer begin with a count of 0; beside moments that go on they keep the count, and a bias correction is
            too small for them, unless "count" is named too, and is then too large for the others.

    Returns:
        A state with the structure of `tx_to.init(params)`. With `nnx.Optimizer`: give `nnx.as_pure` of the parameters
        and of `opt_state`, then `nnx.update(new.opt_state, nnx.state(returned))`.

    Raises:
        ValueError: before any work: `state` is not one of `tx_from`; or something in it has no place in the target,
            something in the target no source, or a trace sums something else there; or moments of different step counts
            would get a single one (under `jit`, where counts are not known, the first of them is taken).

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"embedding": jnp.ones((512, 64)), "kernel": jnp.ones((64, 512))}
    >>> before, after = optax.adamw(1e-3), fse.adamw8bit(1e-3)
    >>> state = before.init(params)  # and many steps
    >>> state = fse.convert_state(before, after, params, state)
    >>> {name: str(x.dtype) for name, x in state[0].mu.items()}
    {'embedding': 'float32', 'kernel': 'int8'}
    """
    source, target = _View("tx_from", tx_from, params), _View("tx_to", tx_to, params)
    arrays = source.arrays(state)
    plan = _plan(source, target, arrays, allow_reset)
    made = dict(target.named(tx_to.init(params)))
    places = {key: (_sharding(x), memory_of(x)) for key, x in made.items()}
    for key in plan:  # what is filled need not be in memory twice
        for filled in target.keys_of(key):
            made.pop(filled)
    for key, origin in plan.items():
        values = [in_memory(jnp.asarray(arrays[k]), "device") for k in source.keys_of(origin)]
        if not _alike(source.leaves.get(origin), target.leaves.get(key)):
            x = _decoded(values, source.leaves.get(origin))
            values = _encoded(x, target.leaves.get(key), target.stored[key])
        made |= {k: _placed(x, *places[k]) for k, x in zip(target.keys_of(key), values)}
    return jax.tree.structure(target.state).unflatten(made[key] for key in target.stored)


class _View:
    """A transform's state as named values. `leaves` has those that are moments of our own."""

    def __init__(self, argument: str, tx: optax.GradientTransformation, params: Any):
        self.argument = argument
        self.state, found = trace_init(tx, params)
        records = [(place, record) for place, record in found if place is not None]
        if len(records) < len(found):
            raise ValueError(
                f"A wrapper in `{argument}` hides the state of an 8-bit optimizer. Convert that optimizer's state."
            )
        # What a wrapped transform keeps has the names that it has without the wrapper.
        wrapped = [place for place, record in records if record.method is None]
        self.wrappers = [path_name((*place, GetAttrKey("inner"))) for place in wrapped]
        self.stored = dict(self.named(self.state))
        paths = [path for path, _ in jax.tree.leaves_with_path(self.state)]
        twice = [name for name, n in Counter(map(self.name, paths)).items() if n > 1]
        if twice:
            raise ValueError(f"Two values in the state of `{argument}` have the path {twice[0]!r}: rename a parameter.")
        self.paths = {self.name(path): path for path in paths}
        self.leaves: dict[str, StoredMoment] = {}
        self.absmax: dict[str, str] = {}
        self.formats, self.uncounted = {}, set()
        self.sums = {self.name(path): sums for path, sums in _traces_of_optax(self.state)}
        for place, record in records:
            for leaf in record.moments:
                key = self.name((*place, *leaf.codes))
                self.leaves[key], self.absmax[key] = leaf, self.name((*place, *leaf.absmax))
                moments = record.method.moments if record.method else ()
                self.sums.update((key, m.sums) for m in moments if m.name == leaf.name and m.sums is not None)
            self.formats[self.name((*place, GetAttrKey("format")))] = record.formats
            if record.method is not None and not record.method.counts_steps:
                self.uncounted.add(self.name(place))
        self.names = {leaf.name for leaf in self.leaves.values()}
        self.counts = [key for key, x in self.stored.items() if _is_count(key, x)]
        own = {*self.formats, *self.absmax.values()}
        self.shapes = {
            k: self.leaves[k].shape if k in self.leaves else x.shape for k, x in self.stored.items() if k not in own
        }
        self.counting = {
            count for key in self.shapes if key not in self.counts for count in self.counts_over(key).values()
        }

    def named(self, tree: Any) -> Iterator[tuple[str, Any]]:
        """Leaves by path, which is the same for tuples, NamedTuples, dicts, NNX variables and Linen boxes."""
        return ((self.name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree))

    def name(self, path: tuple) -> str:
        """A path as "0/mu/block/kernel"."""
        name = path_name(path)
        for wrapper in self.wrappers:
            if name.startswith(f"{wrapper}/"):
                return f"{wrapper.removesuffix('inner')}{name[len(wrapper) + 1 :]}"
        return name

    def counts_over(self, key: str) -> dict[str, str]:
        """The step counts that a value is kept beside, the nearest of each name."""
        around = [c for c in self.counts if f"{key}/".startswith(c.removesuffix(_last(c)))]
        return {_last(c): c for c in sorted(around, key=len)}

    def keys_of(self, key: str) -> tuple[str, ...]:
        """The arrays that store a value: codes and scales, or one."""
        leaf = self.leaves.get(key)
        return (key,) if leaf is None or leaf.blocks is None else (key, self.absmax[key])

    def arrays(self, state: Any) -> dict[str, Any]:
        """The arrays of a state by name, checked against those of `init`."""
        arrays = dict(self.named(state))
        for key, formats in self.formats.items():
            if key in arrays and np.shape(arrays[key]) != self.stored[key].shape:
                found = format_difference(arrays[key], formats) or "other parameters have its formats"
                raise ValueError(f"`state` was not made by `{self.argument}`: {found}.")
        wrong = [f"{key} is not in it" for key in self.stored if key not in arrays]
        wrong += [f"{key} is not in {self.argument}.init(params)" for key in arrays if key not in self.stored]
        for key, want in self.stored.items():
            if key in arrays and _kind(arrays[key]) != _kind(want):
                shape, codes = _kind(arrays[key])
                wrong.append(f"{key} has the shape {shape}{' and codes' if codes else ''}, and not {want.shape}")
        if wrong:
            raise ValueError(f"`state` was not made by `{self.argument}` for these `params`: {_first(wrong)}.")
        return arrays


def _plan(source: _View, target: _View, arrays: dict[str, Any], allow_reset: Sequence[str]) -> dict[str, str]:
    """The value of the source for each value of the target; raises unless every one has its partner."""
    allow_reset = (allow_reset,) if isinstance(allow_reset, str) else allow_reset
    names = source.names | target.names
    ends = {view: {key: _end(path, names) for key, path in view.paths.items()} for view in (source, target)}
    values = [key for key in target.shapes if key not in target.counts]
    plan = {key: key for key in values if key in source.shapes}
    free = {key: None for key in source.shapes if key not in plan and key not in source.counts}  # in order
    by_end = defaultdict(list)
    for key in free:
        by_end[ends[source][key]].append(key)
    problems, fields = [], {}  # fields that a caller may give up, in order
    for key in values:
        if key in plan:
            continue
        same = by_end[ends[target][key]] if _field(ends[target][key]) in names else []
        if len(same) > 1:
            problems.append(f"{key} of the target may be {' or '.join(same)} of the source")
        elif same:
            plan[key] = same.pop()
            free.pop(plan[key])
        elif not _allowed(key, allow_reset):
            problems.append(f"{key} of the target has no source")
            fields[_field(ends[target][key])] = None
    for key in free:
        if not _allowed(key, allow_reset):
            problems.append(f"{key} of the source has no place in the target")
            fields[_field(ends[source][key])] = None
    for key, origin in list(plan.items()):
        there, here = source.sums.get(origin), target.sums.get(key)
        if there and here and there != here:
            if _allowed(key, allow_reset):
                plan.pop(key)
                continue
            problems.append(f"{origin} of the source sums {there}, and {key} of the target {here}")
            fields[_field(ends[target][key])] = None
        if target.shapes[key] != source.shapes[origin]:
            problems.append(
                f"{origin} has the shape {source.shapes[origin]} in the source and {target.shapes[key]} in the target"
            )
    _plan_counts(plan, source, target, arrays, allow_reset, problems, fields)
    if problems:
        named = tuple(filter(None, fields))
        hint = f", or name the fields that may begin anew or stay behind: allow_reset={named}" if named else ""
        raise ValueError(
            f"The state cannot be converted whole: {_first(problems)}. Choose a `tx_to` that keeps the same{hint}."
        )
    return plan


def _plan_counts(plan, source: _View, target: _View, arrays, allow_reset, problems: list, fields: dict) -> None:
    """Adds the counts to a plan of everything else, or says what is wrong with them."""
    of_moments = _counts_of_moments(plan, source, target)
    for key in target.counts:
        beneath = [k for k in target.leaves if key in target.counts_over(k).values()]
        anew = [k for k in beneath if k not in plan]
        if anew and (len(anew) == len(beneath) or _allowed(key, allow_reset)):
            continue  # moments that begin anew are corrected for their beginning by a count that does
        origins = of_moments.get(key) or _neighbours(key, source, target)
        steps = {origin: int(arrays[origin]) for origin in origins if not isinstance(arrays[origin], Tracer)}
        if origins:
            plan[key] = max(steps, key=lambda origin: steps[origin]) if steps else origins[0]
        if len(set(steps.values())) > 1 and not _allowed(key, allow_reset):
            found = " or ".join(f"{origin} = {n}" for origin, n in steps.items())
            problems.append(f"{key} of the target may be {found} of the source")
            fields["count"] = None
        elif not origins and key.rpartition("/")[0] not in target.uncounted and not _allowed(key, allow_reset):
            problems.append(f"{key} of the target has no step count to take in the source")
            fields["count"] = None


def _neighbours(key: str, source: _View, target: _View) -> list[str]:
    """The counts that a schedule's may be, or that of moments that had none: of its kind, the nearest ones."""
    counts = [k for k in source.counts if _last(k) == _last(key)]
    counts = [k for k in counts if (k in source.counting) == (key in target.counting)] or counts
    nearest = max((_common(k, key) for k in counts), default=0)
    return [key] if key in counts else [k for k in counts if _common(k, key) == nearest]


def _counts_of_moments(plan: dict[str, str], source: _View, target: _View) -> dict[str, list[str]]:
    """For counts of the target, those of the source that counted the steps of the same moments."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for key, origin in plan.items():
        theirs = source.counts_over(origin)
        for last, count in target.counts_over(key).items():
            if last in theirs:
                found[count][theirs[last]] = None
    return {key: list(origins) for key, origins in found.items()}


def _traces_of_optax(state: Any) -> Iterator[tuple[tuple, Sums]]:
    """Where the traces of optax's SGD, LARS and RMSprop lie, and what they sum."""

    def summed(x: Any) -> Sums | None:
        kinds = [type(one).__name__ for one in x] if type(x) is tuple else []
        for sums, chain in _CHAINS_WITH_A_TRACE:
            if len(kinds) == len(chain) and all(kind in allowed for kind, allowed in zip(kinds, chain)):
                return sums
        return None

    for path, chain in jax.tree.leaves_with_path(state, is_leaf=lambda x: summed(x) is not None):
        if sums := summed(chain):
            for inner, _ in jax.tree.leaves_with_path(chain):
                if any(isinstance(key, GetAttrKey) and key.name == "trace" for key in inner):
                    yield (*path, *inner), sums


def _end(path: tuple, moments: set[str]) -> str:
    """A path from its field on, "mu/block/kernel", which is the same wherever the state lies; "" where none has a name.

    The field is a moment's, the first on the path, as parameters may have the names of moments; or the last of all.
    """
    at = [i for i, key in enumerate(path) if isinstance(key, GetAttrKey) and key.name not in ("value", "raw_value")]
    first = next((i for i in at if path[i].name in moments), at[-1] if at else len(path))
    return path_name(path[first:])


def _field(end: str) -> str:
    return end.partition("/")[0]


def _kind(x: Any) -> tuple[tuple[int, ...], bool]:
    """What orbax does not cast, and what must not have been cast."""
    return np.shape(x), is_codes(getattr(x, "dtype", None))


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _is_count(key: str, x: Any) -> bool:
    return _last(key).startswith("count") and x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)


def _common(a: str, b: str) -> int:
    """How many parts two paths share at their beginning."""
    pairs = list(zip(a.split("/"), b.split("/")))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def _allowed(key: str, names: Sequence[str]) -> bool:
    return any(part in names for part in key.split("/"))


def _first(texts: list[str], n: int = 8) -> str:
    return "; ".join(texts[:n]) + (f"; and {len(texts) - n} more" if len(texts) > n else "")


def _alike(a: StoredMoment | None, b: StoredMoment | None) -> bool:
    """Whether both store codes, and the same ones."""
    if a is None or b is None or a.moment is None or b.moment is None:
        return False
    return (a.moment.signed, a.moment.codec, a.blocks) == (b.moment.signed, b.moment.codec, b.blocks)


def _decoded(values: list[Array], leaf: StoredMoment | None) -> Array:
    if leaf is None:
        return values[0]
    if leaf.moment is not None and leaf.blocks is not None:
        codes, absmax = values
        return dequantize_moment(codes, absmax, leaf.moment, leaf.blocks)
    return jnp.broadcast_to(values[0], leaf.shape)  # one value for each row, or all


def _encoded(x: Array, leaf: StoredMoment | None, want: Any) -> tuple[Array, ...]:
    if leaf is not None and leaf.moment is not None and leaf.blocks is not None:
        return quantize_moment(x.astype(jnp.float32), leaf.moment._replace(stochastic=False), leaf.blocks)
    if x.shape != want.shape:
        x = jnp.mean(x, axis=-1, keepdims=True)
    return (x if x.dtype == want.dtype else x.astype(want.dtype),)


def _sharding(x: Array) -> Any:
    """Where an array lies; None where it goes along with others, as counts do that `init` makes beside a mesh."""
    if isinstance(x, Tracer):
        return jax.typeof(x).sharding
    return x.sharding if x.committed else None


def _placed(x: Array, sharding: Any, memory_kind: str) -> Array:
    if not isinstance(x, Tracer):
        return jax.device_put(x, sharding, may_alias=False)  # or one count, taken twice, could not be donated
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return in_memory(jax.sharding.reshard(x, sharding) if explicit else x, memory_kind)
