"""Any optax transform with the moments in its state kept in one byte each.

    state = dequantize(codes, absmax);   u, state <- tx.update(g, state, p);   codes, absmax <- quantize(state)

A moment is a field of the state that the table `moments` names, and in it every array that lies where a parameter lies
and has its shape. Everything else stays as `tx` makes it, and a transform that has nothing else is refused.
Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import DictKey, GetAttrKey

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise.quantize import merge, split
from ...ops.blockwise_step.step import Moment
from ...ops.counter_random import array_key
from ...ops.dtypes import at_least_float32
from ...ops.sharding import placed_like, sharded_like
from ..arguments import check_transform, refuse_sparse_rows
from ..boxes import rebox, rebox_scales, unbox
from ..engine.records import RECORDS, Record, StayedField, StoredMoment
from ..storage.format_code import check_format, format_code
from ..storage.moments import MomentName, bits_of, dequantize_moment, is_codes, no_scales, quantize_moment
from ..storage.plan import LeafPlan, Planner
from ..storage.rules import Bits, Rules
from ..storage.state_format import StateFormat
from ..trees import entry, flatten, is_array, is_hole, is_hole_or_box, nbytes, shapes_of
from .state_fields import (
    COUNTS,
    MOMENTS,
    REASONS,
    Field,
    Slot,
    count_index,
    field_of,
    find_fields,
    find_slots,
    fits,
    placeholder_state,
    show,
)

_KINDS = ("signed", "unsigned", "keep")


# Large enough for what is factored or projected to be so, and only ever shapes.
_PROBE = {name: jax.ShapeDtypeStruct((4096,) * n, np.float32) for name, n in (("matrix", 2), ("vector", 1))}


class QuantizedState(NamedTuple):
    """State of `quantize_state`."""

    inner: optax.OptState  # of the wrapped transform; moments: int8 or uint8 codes, or fp32 values
    absmax: dict[str, optax.Updates]  # by the path of a field in `inner`: its scales, ones without codes
    format: Array  # uint8, names the codecs and block settings


def quantize_state(
    tx: optax.GradientTransformation,
    moments: Mapping[str, str] | None = None,
    rules: Any = (),
    state_format: StateFormat = StateFormat(),
) -> optax.GradientTransformationExtraArgs:
    r"""`tx` with its moments in one byte each, and fp32 moments for embeddings, norms and biases.

    $$m = \mathrm{decode}(c, s); \quad u, m' = \mathrm{tx}(g, m, \theta); \quad c', s' = \mathrm{encode}(m')$$

    For any transform of optax or of yours, alone or with chain, masked, partition, MultiSteps, inject_hyperparams, ...
    in it. Where this library has an optimizer of that name, use that: it decodes piece by piece and can be fused, while
    here all moments are decoded, then `tx` runs, then all are encoded. Half-precision gradients, parameters and states
    are computed in float32, whatever they are stored in.

    Refused, as nothing is left to store in bytes, and kept as it is in other transforms:

        keeps nothing of the parameters' shape    sgd without momentum, sign_sgd, fromage, noisy_sgd, polyak_sgd, dpsgd
        parameters, or points of reference        schedule_free (z), dog, dowg, prodigy (params0), mechanize (x0),
                                                  lookahead
        sums that parameters are computed from    cocob, madgrad
        previous gradients, to take a difference  optimistic_gradient_descent, adan (g), lbfgs
        factored, projected, one for many         adafactor, galore (wrap its base_optimizer), sm3 (mu), novograd (nu)
        nu - mu^2 of rounded moments              centered rmsprop (mu, nu): it can be negative, and its root NaN
        step sizes, each its own                  rprop

    So of schedule_free_adamw, prodigy, adan, sm3, novograd, ... the other moments are in bytes; lookahead goes around.
    `fse.describe` lists what stayed, and why. Functions of optax's that read a state (`schedule_free_eval_params`) take
    `state.inner`.

    Args:
        tx: the transform. Extra arguments of `update` are passed on.
        moments: fields of the state by name, "mu", or by type and name, "ScaleByAdamState.mu", which goes first:
            "signed", "unsigned" (never negative: a finer code, and what is negative becomes zero) or "keep". None: the
            moments of optax's own transforms. Of their names, those that `tx` does not have are passed over.
        rules: as in `fse.adamw8bit`, to choose between 8, 32 and "bf16". What else a rule can set is `tx`'s to set.
        state_format: codec, rounding and blocks, see `StateFormat`. Stochastic rounding acts on unsigned moments and
            needs a `count` (or `step_count`, `t`) in the state of `tx`.

    Returns:
        An optax transform. Its state is `QuantizedState`.

    Raises:
        ValueError: no moment in the state of `tx` (sgd without momentum, rprop, dog, ...) or none of the parameters'
            shape (adafactor, galore: wrap its `base_optimizer`); a name of `moments` that the state does not have; an
            8-bit optimizer as `tx`; a rule or format that cannot be. When `tx` is made for other parameters than
            those that it is tried on here, only `init` can tell.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> params = {"embedding": jnp.ones((512, 64)), "kernel": jnp.ones((64, 512))}
    >>> tx = fse.quantize_state(optax.adabelief(1e-3))
    >>> state = tx.init(params)
    >>> {name: str(x.dtype) for name, x in state.inner[0].nu.items()}
    {'embedding': 'float32', 'kernel': 'uint8'}
    >>> updates, state = tx.update(params, state, params)
    """
    quantizer = _Quantizer(tx, moments, Rules(rules, state_format))

    def init(params):
        return quantizer.init(params)

    def update(updates, state, params=None, **extra_args):
        return quantizer.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


class _Quantizer:
    """`init` and `update` of a wrapped transform."""

    def __init__(self, tx: optax.GradientTransformation, moments: Mapping[str, str] | None, rules: Rules):
        check_transform(tx)
        self.tx, self.rules, self.planner = optax.with_extra_args_support(tx), rules, Planner(rules)
        if moments is not None and not isinstance(moments, Mapping):
            raise TypeError(f"`moments` must be a mapping of fields, such as {{'mu': 'signed'}}, got {moments!r}.")
        self.table, self.named = (MOMENTS, False) if moments is None else (dict(moments), True)
        for name, kind in self.table.items():
            if kind not in _KINDS:
                raise ValueError(f"`moments` must give 'signed', 'unsigned' or 'keep', got {name!r}: {kind!r}.")
        for _, rule in rules.user:
            if rule.bits == "rowwise" or rule.settings_text:
                raise ValueError(
                    f"`rules` has {rule}, but of a wrapped transform a rule sets only the storage: 8, 32, 'bf16' or "
                    "Rule(8, state_format). Give hyper-parameters to the transform itself, through optax.partition "
                    "where they differ; 'rowwise' is for the optimizers of this library."
                )
        self._try()

    def _try(self) -> None:
        """Raises early what `init` would raise, where `tx` takes parameters that it was not made for."""
        for attempt in (lambda: jax.eval_shape(self.tx.init, _PROBE), lambda: placeholder_state(self.tx)):
            try:
                inner = attempt()
            except Exception:  # masks and labels as trees, for one, fit only their own parameters
                continue
            self._check(inner, shapes_of(_PROBE))

    def _check(self, inner: Any, shapes: dict) -> list[Field]:
        """The fields of a new state; raises where none can be in 8 bits, and where the table is wrong."""
        names = {name for path, _ in flatten(inner) for name in map(entry, path)}
        if "format" in names and any(name.endswith("absmax") for name in names):
            raise ValueError("`tx` is an 8-bit optimizer of this library, or has one in it: use it as it is.")
        every = list(find_fields(inner, self.table, shapes))
        known = {*MOMENTS, *(field.key for field in every)}  # one table may serve many transforms
        if unknown := [key for key in self.table if self.named and key not in known]:
            raise ValueError(
                f"`moments` names {', '.join(unknown)}, but the fields of the state of `tx` are: {show(inner)}. "
                "Correct the name, or drop it."
            )
        fields = [field for field in every if field.kind != "keep"]
        if not any(fits(field, shapes) for field in fields):
            raise ValueError(
                f"`tx` has no moments to store in 8 bits. The fields of its state are: {show(inner)}. Of these "
                f"`moments` names as signed or unsigned: {', '.join(field.name for field in fields) or 'none'}; and a "
                "moment has its parameter's shape. To name others: moments={'field': 'signed' or 'unsigned'}. "
                "Parameters, and sums that they are computed from, do not bear it."
            )
        if any(f.rounding == "stochastic" for f in self.rules.formats) and count_index(flatten(inner)) is None:
            raise ValueError(
                "`rounding='stochastic'` needs the number of the step, but the state of `tx` has no field "
                f"{', '.join(COUNTS)}. A schedule for a learning rate counts; or take rounding='nearest'."
            )
        return fields

    # --- init --------------------------------------------------------------------------------------------------------

    def init(self, params: Any) -> QuantizedState:
        plans = {x.path: x.plan for x in self.planner.plans(params)[0] if x.plan}
        for path, plan in plans.items():
            if plan.bits == "rowwise":
                raise ValueError(f"Parameter {path!r} asks for 'rowwise' moments, which a wrapped transform has not.")
        inner = self.tx.init(params)
        fields = self._check(inner, shapes_of(params))
        leaves, slots = [x for _, x in flatten(inner)], find_slots(inner, fields)
        absmax: dict[str, list] = {field.name: [] for field in fields}
        of_parameters: dict[str, list[Slot]] = {}
        for slot in slots:
            box = scales = leaves[slot.index]
            if is_array(box):
                plan = plans.get(slot.path)
                if plan is not None and plan.shape == unbox(box).shape:
                    of_parameters.setdefault(slot.path, []).append(slot)
                    leaves[slot.index], scales = _initial(box, slot.field, plan)
                else:
                    scales = no_scales(box)
            absmax[slot.field.name].append(scales)
        new = jax.tree.structure(inner, is_leaf=is_hole_or_box).unflatten(leaves)
        scales = {f.name: jax.tree.structure(f.tree, is_leaf=is_hole_or_box).unflatten(absmax[f.name]) for f in fields}
        kept = {
            path: replace(plans[path], implementation=_runs(plans[path], own)) for path, own in of_parameters.items()
        }
        state = QuantizedState(new, scales, jnp.asarray(format_code(self.rules.formats, list(kept.values()))))
        if (records := RECORDS.get()) is not None:
            sizes, others = _sizes(state, slots, of_parameters)
            moments = _stored_moments(state, fields, slots, plans)
            records.append(Record(state.format, self.rules.formats, kept, sizes, moments, stayed=others))
        return state

    # --- one step ----------------------------------------------------------------------------------------------------

    def update(self, updates: Any, state: Any, params: Any, **extra_args) -> tuple[Any, QuantizedState]:
        if not isinstance(state, QuantizedState):
            raise TypeError(
                f"`state` must be a QuantizedState, as `init` makes it, got {type(state).__name__}. The order is "
                "update(grads, state, params)."
            )
        refuse_sparse_rows("quantize_state", updates)
        like = updates if params is None else params
        shapes = shapes_of(like, is_hole)
        # What `tx` itself keeps for float32 copies of the parameters: the dtypes that it is given.
        made = jax.tree.leaves(jax.eval_shape(lambda p: self.tx.init(_widened(p)), like), is_leaf=is_hole)
        fields = [f for f in find_fields(state.inner, self.table, shapes, is_hole) if f.kind != "keep"]
        before, tree = jax.tree.flatten(state.inner, is_leaf=is_hole)
        if len(made) != len(before) or {field.name for field in fields} != state.absmax.keys():
            raise ValueError(
                f"The state has {len(before)} leaves and scales for {', '.join(state.absmax)}, but `init` makes "
                f"{len(made)} and scales for {', '.join(field.name for field in fields)}: was the state made by `init` "
                "of the same parameters and `moments`?"
            )
        columns = {name: jax.tree.leaves(x, is_leaf=is_hole) for name, x in state.absmax.items()}
        stored: dict[int, _Stored] = {}
        plans: dict[tuple[str, Bits], LeafPlan] = {}  # one for all moments of a parameter
        given = [_cast(x, want) for x, want in zip(before, made)]
        position = dict.fromkeys(columns, 0)
        for index, field, path in find_slots(state.inner, fields, is_hole):
            at = position[field.name]
            position[field.name] += 1
            if is_array(before[index]):
                one = self._stored(plans, path, field, before[index], columns[field.name][at], made[index], shapes)
                if one is not None:
                    stored[index] = one._replace(at=at)
                    given[index] = _cast(one.decoded, made[index])
        check_format(self.rules, state.format, [plans[path, 8] for path in {one.path: None for one in stored.values()}])
        out, inner = self.tx.update(_widened(updates), tree.unflatten(given), _widened(params), **extra_args)
        after = jax.tree.flatten_with_path(inner, is_leaf=is_hole)[0]
        new = [x if y is None else y for x, (_, y) in zip(given, after, strict=True)]
        finite: dict[str, Array] = {}
        for index, one in stored.items():
            finite[one.path] = jnp.isfinite(new[index]) & finite.get(one.path, True)
        counter = count_index(after)
        count = None if counter is None else new[counter]
        results = [_cast(y, x) for x, y in zip(before, new)]
        for index, one in stored.items():
            key = array_key(one.path, count) if one.moment.stochastic and count is not None else None
            # As in the optimizers of this library: alone, g^2 overflows first, and m / sqrt(0) would follow.
            value = jnp.where(finite[one.path], new[index], 0.0)
            results[index], columns[one.field][one.at] = one.encoded(value, key)
        scales = {k: jax.tree.structure(x, is_leaf=is_hole).unflatten(columns[k]) for k, x in state.absmax.items()}
        out = jax.tree.map(_cast, out, like, is_leaf=is_hole)
        return out, QuantizedState(tree.unflatten(results), scales, state.format)

    def _stored(self, plans: dict, path: str, field: Field, x: Array, absmax: Array, made: Any, shapes: dict) -> Any:
        """Reads a stored moment; None if it is not in 8 bits. `init` decided the precision, which dtypes show here."""
        shape = shapes.get(path)
        eight = is_codes(x.dtype) and jnp.issubdtype(made.dtype, jnp.floating)
        if shape is None or x.shape != shape:
            if eight or absmax.shape != (1,) * x.ndim:
                raise ValueError(
                    f"The gradient of parameter {path!r} has the shape {shape}, but its `{field.name}` in the state is "
                    f"{x.dtype} of shape {x.shape}: was the state made by `init` of the same parameters?"
                )
            return None
        bits = bits_of(x, shape) if eight else "bf16" if x.dtype == jnp.bfloat16 else 32
        if (path, bits) not in plans:
            plans[path, bits] = self.planner.plan_stored(path, jax.ShapeDtypeStruct(shape, made.dtype), bits)
        plan = plans[path, bits]
        if plan.blocks is None:
            return None
        moment = _moment(field, plan.state_format)
        want = moment.code.dtype, plan.blocks.absmax_shape(shape)
        if (x.dtype, absmax.shape) != want:
            raise ValueError(
                f"The state of parameter {path!r} has {x.dtype} codes and scales of shape {absmax.shape}, but rules, "
                f"`moments` and `state_format` ask for {want[0]} and {want[1]}. Make the optimizer with those that "
                "made the state; and call it outside of shard_map, whose pieces do not show the global shape."
            )
        return _Stored(path, field.name, moment, plan.blocks, x, absmax)


class _Stored(NamedTuple):
    """A moment in bytes."""

    path: str
    field: str
    moment: Moment
    blocks: Blocks
    codes: Array
    absmax: Array
    at: int = 0  # its index among the leaves of its field

    @property
    def decoded(self) -> Array:
        return placed_like(dequantize_moment(self.codes, self.absmax, self.moment, self.blocks), self.codes)

    def encoded(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        """New codes and scales; those that there are where `tx` left a block as it was.

        With the other codes that follows from the encoding, but the signed dynamic map has no -1 to give back.
        """
        axis, code = self.blocks.axis, self.moment.code
        codes, absmax = quantize_moment(x, self.moment, self.blocks, key)
        if 0 < code.bottom < code.top and x.shape:
            same = split(x == self.decoded, self.blocks, zero=1)
            kept = jnp.all(same, axis=axis + 1)
            absmax = jnp.where(kept, self.absmax, absmax)
            kept = jnp.broadcast_to(jnp.expand_dims(kept, axis + 1), same.shape)
            codes = jnp.where(merge(kept, self.blocks, x.shape), self.codes, codes)
        # The compiler alone would gather an axis on which devices cut through blocks.
        return sharded_like(codes, self.codes), placed_like(absmax, self.absmax)


def _initial(box: Any, field: Field, plan: LeafPlan) -> tuple[Any, Any]:
    """Stores the first value of a moment, which `tx` made: values and scales."""
    x = unbox(box)
    if plan.blocks is None:
        wide = jnp.bfloat16 if plan.bits == "bf16" else _wide(x.dtype)
        return rebox(box, x.astype(wide)), no_scales(box)
    codes, scales = quantize_moment(x, _moment(field, plan.state_format)._replace(stochastic=False), plan.blocks)
    return rebox(box, sharded_like(codes, x)), rebox_scales(box, scales, plan.blocks, plan.state_format.shards)


def _moment(field: Field, state_format: StateFormat) -> Moment:
    signed = field.kind == "signed"
    name = MomentName(field.name, signed=signed, dynamic_signed=signed, second=not signed)
    return name.stored(state_format)


def _runs(plan: LeafPlan, slots: list[Slot]) -> str:
    """What the report says of how a parameter is updated."""
    return f"decoded for {', '.join(slot.field.name for slot in slots)}" if plan.blocks else "the transform's own"


def _sizes(state: QuantizedState, slots: list[Slot], of_parameters: dict) -> tuple[dict[str, int], tuple]:
    """Counts the bytes stored for every parameter, and lists the fields that stay as they are."""
    leaves = flatten(state.inner)
    columns = {name: iter([x for _, x in flatten(tree)]) for name, tree in state.absmax.items()}
    sizes = {slot.index: _bytes(leaves[slot.index][1]) + _bytes(next(columns[slot.field.name])) for slot in slots}
    by_path = {path: sum(sizes.pop(slot.index) for slot in own) for path, own in of_parameters.items()}
    moments = {slot.index for own in of_parameters.values() for slot in own}
    fields, stayed = {slot.index: slot.field.name for slot in slots}, {}
    for index, (path, box) in enumerate(leaves):
        if index not in moments and is_array(box) and unbox(box).shape:
            name = fields.get(index) or field_of(path)
            why = REASONS.get(name.rpartition(".")[2], "not in `moments`")
            reason = "not of the parameter's shape" if index in fields else why
            size = sizes.get(index) or _bytes(box)
            stayed[name] = StayedField(name, size + (stayed[name].bytes if name in stayed else 0), reason)
    return by_path, tuple(stayed.values())


def _stored_moments(
    state: QuantizedState, fields: list[Field], slots: list[Slot], plans: dict[str, LeafPlan]
) -> list[StoredMoment]:
    """Lists where and how the state keeps each moment."""
    leaves = flatten(state.inner)
    places = {field.name: iter([path for path, _ in flatten(state.absmax[field.name])]) for field in fields}
    found = []
    for index, field, path in slots:
        absmax = (GetAttrKey("absmax"), DictKey(field.name), *next(places[field.name]))
        key_path, box = leaves[index]
        if is_array(box):
            x, plan, how = unbox(box), plans.get(path), (None, None)
            if plan is not None and plan.blocks is not None and is_codes(x.dtype):
                how = _moment(field, plan.state_format), plan.blocks
            codes = (GetAttrKey("inner"), *key_path)
            found.append(StoredMoment(path, entry(field.path[-1]), codes, absmax, x.shape, *how))
    return found


def _bytes(box: Any) -> int:
    return nbytes(box) if is_array(box) else 0


def _wide(dtype: Any) -> Any:
    """Float32 for half precision, else the dtype itself."""
    return at_least_float32(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(_wide(x.dtype)) if hasattr(x, "dtype") else x, tree)


def _cast(x: Any, like: Any) -> Any:
    """`x` in the floating point dtype of `like`."""
    if not (hasattr(x, "dtype") and hasattr(like, "dtype")):
        return x  # Python's numbers have no dtype of their own
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == like.dtype:
        return x
    return x.astype(like.dtype)
