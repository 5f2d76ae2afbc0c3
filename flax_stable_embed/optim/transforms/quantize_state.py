"""Stores the moments of any optax transform in 8 bits.

    state = dequantize(codes, absmax);   u, state <- tx.update(g, state, p);   codes, absmax <- quantize(state)

The table `moments` names the fields of the state that hold moments. In such a field, every array at the path of a
parameter and with its shape is a moment. Everything else stays as `tx` makes it. A transform without moments is
refused. Storage: Dettmers et al. 2022, sec. 2 (arXiv:2110.02861).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...ops.counter_random import rounding_key
from ..arguments import check_transform, refuse_sparse_rows
from ..boxes import rebox, unbox
from ..engine.records import RECORDS, Record
from ..engine.state_checks import check_same_paths
from ..storage.format_code import CheckedFormat, check_format, format_vector
from ..storage.moments import (
    bits_of,
    checked_scales,
    is_codes,
    no_scales,
    not_differentiated,
)
from ..storage.plan import LeafPlan, Planner
from ..storage.rules import Bits, Rules, UserRules
from ..storage.state_format import StateFormat
from ..storage.straddling import warn_if_straddling
from ..trees import (
    Params,
    Updates,
    dotted,
    entry,
    flatten,
    is_array,
    is_hole,
    is_hole_or_box,
    path_name,
    shapes_of,
)
from .first_state import FirstState
from .split_weights import is_split_state
from .state_fields import (
    COUNTS,
    MOMENTS,
    Field,
    Slot,
    can_hold_moments,
    count_index,
    fields_text,
    find_fields,
    find_slots,
    placeholder_state,
)
from .wrapped_moment import WrappedMoment, first_number, initial_moment, moment_of, wide_dtype
from .wrapped_report import implementation_text, sizes_of, stored_moments

_SIGNS, _ROUNDINGS = ("signed", "unsigned"), ("nearest", "dither")
_KINDS = (*_SIGNS, "keep", *(f"{sign}, {rounding}" for sign in _SIGNS for rounding in _ROUNDINGS))

# Shapes of parameters to try a transform on. They are so large that transforms which factor or project do so.
_EXAMPLE_PARAMS = {name: jax.ShapeDtypeStruct((4096,) * n, np.float32) for name, n in (("matrix", 2), ("vector", 1))}


class QuantizedState(NamedTuple):
    """State of `quantize_state`."""

    inner: optax.OptState  # the state of the wrapped transform; moments are int8 or uint8 codes, or floating point
    absmax: dict[str, optax.Updates]  # the float32 scales of each field of moments, by the path of the field in `inner`
    format: Array  # uint8, says how the state is stored


def quantize_state(
    tx: optax.GradientTransformation,
    moments: Mapping[str, str] | None = None,
    rules: UserRules = (),
    state_format: StateFormat = StateFormat(),
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optax transform so that it stores its moments in 8 bits, except for embeddings, norms and biases.

    $$m = \mathrm{decode}(c, s); \quad u, m' = \mathrm{tx}(g, m, \theta); \quad c', s' = \mathrm{encode}(m')$$

    `tx` is any transform of optax or of your own, also a chain, masked, partition, MultiSteps or inject_hyperparams. If
    this library has an optimizer of the same name, prefer that one. It works block by block and can update parameters
    in place. Here all moments are decoded at once, then `tx` runs, then all moments are encoded. Gradients, parameters
    and states in half precision are converted to float32 for the step.

    Some fields of optax's states cannot be stored in 8 bits. They stay as they are, and a transform that has no other
    fields is refused:

        nothing has the parameters' shape         sgd without momentum, sign_sgd, fromage, noisy_sgd, polyak_sgd, dpsgd
        parameters, or points of reference        schedule_free (z), dog, dowg, prodigy (params0), mechanize (x0),
                                                  lookahead
        sums that parameters are computed from    cocob, madgrad
        previous gradients, to take a difference  optimistic_gradient_descent, adan (g), lbfgs
        factored, projected, one for many         adafactor, galore (wrap its base_optimizer), sm3 (mu), novograd (nu)
        nu - mu^2 of rounded moments              centered rmsprop (mu, nu): may be negative, and its root NaN
        step sizes of single elements             rprop

    In schedule_free_adamw, prodigy, adan, sm3, novograd, ... the other moments are in 8 bits. Put lookahead around
    `quantize_state`. `fse.describe` lists the fields that stay as they are, with the reason. Pass `state.inner` to
    functions of optax that read a state, such as `schedule_free_eval_params`.

    Args:
        tx: The transform. Extra arguments of `update` are passed on to it.
        moments: Mapping from fields of the state to "signed", "unsigned" or "keep". A field is a name, "mu", or a type
            and a name, "ScaleByAdamState.mu", which has precedence. "unsigned" is for moments that are never negative:
            their codes are finer, and negative values become zero. If the format sets no rounding, signed moments are
            rounded to nearest and unsigned ones are dithered. "signed, dither" and "unsigned, nearest" say otherwise.
            None means the moments of optax's transforms. There AdEMAMix' slow average is "signed, dither", and second
            moments with a decay of 0.9 by default (RMSProp, AdaDelta) and maxima (AMSGrad) "unsigned, nearest".
            Names of optax's moments that `tx` does not have are ignored.
        rules: As in `fse.adamw8bit`, but a rule can only set how moments are stored: 8, 32, "bf16", a state format, or
            `stacked`, which decides `min_size` and blocks. Norms over a parameter are computed by `tx`.
        state_format: The codec, rounding and blocks of 8-bit moments. See `StateFormat`. The number of the step, which
            dithered and stochastic rounding need, is a field `count`, `step_count` or `t` in the state of `tx`. Without
            such a field, as in `optax.adagrad` with a constant learning rate, moments are rounded to nearest.

    Returns:
        An optax transform. Its state is `QuantizedState`.

    Raises:
        TypeError: `tx` is not an optax transform, or `moments` is not a mapping.
        ValueError: The state of `tx` has no moments, or none of them has the shape of a parameter. `moments` has a name
            that the state does not have. `tx` is or contains an 8-bit optimizer of this library. A rule or the format
            is invalid. If `tx` only accepts certain parameters, then `init` raises these errors instead.

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
        self.table, self.is_own_table = (MOMENTS, False) if moments is None else (dict(moments), True)
        for name, kind in self.table.items():
            if kind not in _KINDS:
                raise ValueError(f"`moments` must give one of {', '.join(map(repr, _KINDS))}, got {name!r}: {kind!r}.")
        for _, rule in rules.user:
            if rule.bits == "rowwise" or replace(rule, stacked=0).settings_text:
                raise ValueError(
                    f"`rules` has {rule}, but for a wrapped transform a rule sets only the storage: 8, 32, 'bf16' or "
                    "Rule(8, state_format). Set hyper-parameters in the transform itself, with optax.partition if "
                    "they differ between parameters. 'rowwise' is only for the optimizers of this library."
                )
        self._check_early()

    def _check_early(self) -> None:
        """Raises now the errors that `init` would raise, if `tx` accepts the example parameters."""
        for make in (lambda: jax.eval_shape(self.tx.init, _EXAMPLE_PARAMS), lambda: placeholder_state(self.tx)):
            try:
                inner = make()
            except Exception:  # a mask given as a pytree, for example, fits only its own parameters
                continue
            self._moment_fields(inner, shapes_of(_EXAMPLE_PARAMS))

    def _moment_fields(self, inner: Any, shapes: dict) -> list[Field]:
        """Returns the fields of a new state that hold moments.

        Raises:
            ValueError: No field can be in 8 bits, or `moments` or the rounding does not fit the state.
        """
        names = {name for path, _ in flatten(inner) for name in map(entry, path)}
        if "format" in names and any(name.endswith("absmax") for name in names):
            raise ValueError(
                "`tx` is an 8-bit optimizer of this library, or contains one. Use it without quantize_state."
            )
        listed = list(find_fields(inner, self.table, shapes))
        known = {*MOMENTS, *(field.key for field in listed)}  # a user may pass one table for many transforms
        if unknown := [key for key in self.table if self.is_own_table and key not in known]:
            raise ValueError(
                f"`moments` names {', '.join(unknown)}, but the fields of the state of `tx` are: "
                f"{fields_text(inner)}. Correct the name, or drop it."
            )
        fields = [field for field in listed if field.kind != "keep"]
        if not any(can_hold_moments(field, shapes) for field in fields):
            raise ValueError(
                f"`tx` has no moments to store in 8 bits. The fields of its state are: {fields_text(inner)}. `moments` "
                f"names as signed or unsigned: {', '.join(field.name for field in fields) or 'none of them'}. A moment "
                "must also have the shape of its parameter. To name others, pass moments={'field': 'signed' or "
                "'unsigned'}. Parameters, and sums that parameters are computed from, cannot be stored in 8 bits."
            )
        wanted = [f.rounding for f in self.rules.formats if f.rounding not in (None, "nearest")]
        if wanted and count_index(flatten(inner)) is None:
            raise ValueError(
                f"`rounding={wanted[0]!r}` needs the number of the step, but the state of `tx` has no field "
                f"{', '.join(COUNTS)}. A schedule as the learning rate adds one. Or use rounding='nearest'."
            )
        return fields

    def init(self, params: Params) -> QuantizedState:
        """Makes the state of `tx` and stores its moments."""
        planned_leaves = self.planner.plans(params)[0]
        warn_if_straddling(planned_leaves)
        plans = {x.path: x.plan for x in planned_leaves if x.plan}
        for path, plan in plans.items():
            if plan.bits == "rowwise":
                raise ValueError(
                    f"The metadata of parameter {path!r} asks for 'rowwise' moments, but a wrapped transform has none. "
                    "Use 8, 32 or 'bf16'."
                )
        first = FirstState(self.tx.init, params)
        if any(map(is_split_state, jax.tree.leaves(first.shapes, is_leaf=is_split_state))):
            raise TypeError(
                "fse.quantize_state stores moments, and fse.split_weights in it has remainders of parameters. Put "
                "split_weights around it: fse.split_weights(fse.quantize_state(tx))."
            )
        fields = self._moment_fields(first.shapes, shapes_of(params))
        leaves, slots = [x for _, x in flatten(first.shapes)], find_slots(first.shapes, fields)
        planned = {slot.index: plans.get(slot.path) for slot in slots if is_array(leaves[slot.index])}
        planned = {i: plan for i, plan in planned.items() if plan and plan.shape == unbox(leaves[i]).shape}
        constants = {i: first_number(first, leaves[i], plan) for i, plan in planned.items()}
        made = [i for i, box in enumerate(leaves) if is_array(box) and constants.get(i) is None]
        for i, x in zip(made, first.arrays([unbox(leaves[i]) for i in made])):
            leaves[i] = rebox(leaves[i], x)
        absmax: dict[str, list] = {field.name: [] for field in fields}
        slots_by_path: dict[str, list[Slot]] = {}
        for slot in slots:
            box = scales = leaves[slot.index]
            if is_array(box):
                plan = planned.get(slot.index)
                if plan is not None:
                    slots_by_path.setdefault(slot.path, []).append(slot)
                    p = first.parameter(slot.path, plan.shape)
                    leaves[slot.index], scales = initial_moment(box, slot.field, plan, p, constants[slot.index])
                else:
                    scales = no_scales(box)
            absmax[slot.field.name].append(scales)
        new = jax.tree.structure(first.shapes, is_leaf=is_hole_or_box).unflatten(leaves)
        scales = {f.name: jax.tree.structure(f.tree, is_leaf=is_hole_or_box).unflatten(absmax[f.name]) for f in fields}
        with_moments = {
            path: replace(plans[path], implementation=implementation_text(plans[path], own))
            for path, own in slots_by_path.items()
        }
        vector = format_vector(self.rules, list(with_moments.values()), params)
        state = QuantizedState(new, scales, vector)
        if (records := RECORDS.get()) is not None:
            sizes, stayed = sizes_of(state.inner, state.absmax, slots, slots_by_path)
            moments = stored_moments(state.inner, state.absmax, fields, slots, plans)
            records.append(Record(vector, self.rules.formats, with_moments, sizes, moments, stayed=stayed))
        return state

    def update(self, updates: Updates, state: Any, params: Params, **extra_args) -> tuple[Any, QuantizedState]:
        """Dequantizes the moments, runs `tx`, and quantizes the moments again."""
        if not isinstance(state, QuantizedState):
            raise TypeError(
                f"`state` must be a QuantizedState, as `init` makes it, got {type(state).__name__}. The order is "
                "update(grads, state, params)."
            )
        refuse_sparse_rows("quantize_state", updates)
        like = updates if params is None else params
        shapes = shapes_of(like, is_hole)
        # The state that `tx` makes for float32 copies of the parameters has the dtypes that `tx` expects.
        first = jax.eval_shape(lambda p: self.tx.init(_widened(p)), like)
        expected = jax.tree.leaves(first, is_leaf=is_hole)
        fields = [f for f in find_fields(state.inner, self.table, shapes, is_hole) if f.kind != "keep"]
        before, tree = jax.tree.flatten(state.inner, is_leaf=is_hole)
        if len(expected) != len(before) or {field.name for field in fields} != state.absmax.keys():
            raise ValueError(
                f"The state has {len(before)} leaves and scales for {', '.join(state.absmax)}, but `init` makes "
                f"{len(expected)} and scales for {', '.join(field.name for field in fields)}: was the state made by "
                "`init` of the same parameters and `moments`?"
            )
        scales = {name: jax.tree.leaves(x, is_leaf=is_hole) for name, x in state.absmax.items()}
        slots = find_slots(state.inner, fields, is_hole)
        _check_paths("inner", state.inner, first)
        _check_arrays(state.inner, first)
        for field in fields:
            _check_paths(f"absmax[{field.name!r}]", state.absmax[field.name], field.tree)
        stored = self._stored_moments(slots, before, scales, expected, shapes)
        for index, _, path in slots:
            if getattr(before[index], "dtype", None) == jnp.bfloat16 != expected[index].dtype:
                before[index] = not_differentiated(before[index], path)
        plans = {old.path: old.plan for old in stored.values()}
        checked = check_format(self.rules, state.format, list(plans.values()))
        decoded = [_cast(stored[i].decoded if i in stored else before[i], x) for i, x in enumerate(expected)]
        out, inner = self.tx.update(_widened(updates), tree.unflatten(decoded), _widened(params), **extra_args)
        after = jax.tree.flatten_with_path(inner, is_leaf=is_hole)[0]
        new = [x if y is None else y for x, (_, y) in zip(decoded, after, strict=True)]
        finite: dict[str, Array] = {}  # where all moments of a parameter are finite
        for index, old in stored.items():
            finite[old.path] = jnp.isfinite(new[index]) & finite.get(old.path, True)
        counter = count_index(after)
        count = None if counter is None else new[counter]
        results = [_cast(y, x) for x, y in zip(before, new)]
        for index, old in stored.items():
            key = None
            if old.moment.rounding != "nearest" and count is not None:
                key = rounding_key(old.moment.rounding, old.path, count)
            # As in the optimizers of this library. g^2 overflows before g does. If only the second moment were reset,
            # the next update would be m / sqrt(0).
            value = jnp.where(finite[old.path], new[index], 0.0)
            results[index], scales[old.field][old.at] = old.encoded(value, key)
        absmax = {k: jax.tree.structure(x, is_leaf=is_hole).unflatten(scales[k]) for k, x in state.absmax.items()}
        out = jax.tree.map(_cast, out, like, is_leaf=is_hole)
        out = jax.tree.map(partial(_nan_if_wrong, checked), out, is_leaf=is_hole)
        return out, QuantizedState(tree.unflatten(results), absmax, checked.vector)

    def _stored_moments(
        self, slots: list[Slot], leaves: list, scales: dict[str, list], expected: list, shapes: dict
    ) -> dict[int, "WrappedMoment"]:
        """Returns the moments that are in 8 bits, by their index among the leaves of the state.

        Args:
            slots: The leaves of all fields of moments.
            leaves: The leaves of the state of `tx`.
            scales: The leaves of `absmax`, by field. They become float32.
            expected: The shapes and dtypes of `leaves` once decoded.
            shapes: The shapes of the parameters, by path.
        """
        stored: dict[int, WrappedMoment] = {}
        plans: dict[tuple[str, Bits], LeafPlan] = {}  # all moments of a parameter share one
        seen = dict.fromkeys(scales, 0)  # how many leaves of each field
        for index, field, path in slots:
            at = seen[field.name]
            seen[field.name] += 1
            if is_array(leaves[index]):
                x, want = leaves[index], expected[index]
                # A transform may keep moments of its own in float16.
                like = jax.ShapeDtypeStruct(x.shape, jnp.float32) if x.dtype == want.dtype else x
                absmax = scales[field.name][at] = checked_scales(path, field.name, like, scales[field.name][at])
                old = self._stored(plans, path, field, x, absmax, want, shapes)
                if old is not None:
                    stored[index] = old._replace(at=at)
        return stored

    def _stored(
        self, plans: dict, path: str, field: Field, x: Array, absmax: Array, want: Any, shapes: dict
    ) -> "WrappedMoment | None":
        """Returns a moment as the state stores it; None if it is not in 8 bits.

        `init` decided how it is stored. In `update` its dtype shows that.

        Raises:
            ValueError: The state does not fit the gradients, the rules or the state format.
        """
        shape = shapes.get(path)
        in_codes = is_codes(x.dtype) and jnp.issubdtype(want.dtype, jnp.floating)
        if shape is None or x.shape != shape:
            if in_codes or absmax.shape != (1,) * x.ndim:
                raise ValueError(
                    f"The gradient of parameter {path!r} has the shape {shape}, but its `{field.name}` in the state is "
                    f"{x.dtype} of shape {x.shape}: was the state made by `init` of the same parameters?"
                )
            return None
        bits = bits_of(x, shape) if in_codes else "bf16" if x.dtype == jnp.bfloat16 else 32
        if (path, bits) not in plans:
            plans[path, bits] = self.planner.plan_stored(path, jax.ShapeDtypeStruct(shape, want.dtype), bits)
        plan = plans[path, bits]
        if plan.blocks is None:
            if absmax.shape != (1,) * x.ndim:
                raise ValueError(
                    f"`{field.name}` of parameter {path!r} is {x.dtype} in the state, but has scales of 8-bit codes, "
                    f"of shape {absmax.shape}. Something has cast or computed with the codes. Set codes to 0 with "
                    "jnp.where(mask, 0, codes) or codes.at[rows].set(0), which keep the dtype."
                )
            return None
        moment = moment_of(field, plan.state_format)
        wanted = moment.code.dtype, plan.blocks.absmax_shape(shape)
        if (x.dtype, absmax.shape) != wanted:
            raise ValueError(
                f"The state of parameter {path!r} has {x.dtype} codes and scales of shape {absmax.shape}, but rules, "
                f"`moments` and `state_format` ask for {wanted[0]} and {wanted[1]}. Make the optimizer with those that "
                "made the state, and call it outside of shard_map, whose shards do not show the global shape."
            )
        return WrappedMoment(path, field.name, plan, moment, plan.blocks, x, absmax)


def _nan_if_wrong(checked: CheckedFormat, update: Any) -> Any:
    """Returns an update, or NaN for a wrong state. A sum with -0.0 changes no bit of it, and no later rounding."""
    is_float = is_array(update) and jnp.issubdtype(update.dtype, jnp.inexact)
    return update + checked.nan_if_wrong(-0.0) if is_float and checked.right is not None else update


def _check_paths(name: str, found: Any, like: Any) -> None:
    """Raises unless a part of the state has its leaves where `init` makes them."""
    paths = [path_name(path) for path, _ in flatten(found, is_hole)]
    check_same_paths(paths, like, "`init` makes", given=f"`{name}` of the state has", is_leaf=is_hole)


def _check_arrays(found: Any, like: Any) -> None:
    """Raises unless the arrays in a part of the state have the shapes that `init` makes.

    A moment of another shape could be broadcast, and complex numbers would lose their imaginary part.
    """
    for (path, x), (_, want) in zip(flatten(found, is_hole), flatten(like, is_hole)):
        if not is_array(want) or (np.shape(x) == want.shape and jnp.iscomplexobj(x) <= jnp.iscomplexobj(want)):
            continue
        found_dtype = getattr(x, "dtype", type(x).__name__)
        raise ValueError(
            f"`inner.{dotted(path)}` of the state is {found_dtype} of shape {np.shape(x)}, where `init` makes "
            f"{want.dtype} of shape {want.shape}: was the state made by `init` of the same parameters?"
        )


def _widened(tree: Any) -> Any:
    """Converts arrays of half precision to float32."""
    return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)) if hasattr(x, "dtype") else x, tree)


def _cast(x: Any, like: Any) -> Any:
    """Converts a floating-point array to the dtype of `like`."""
    if not (hasattr(x, "dtype") and hasattr(like, "dtype")):
        return x  # a Python number
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == like.dtype:
        return x
    return x.astype(like.dtype)
