"""Converts `optimizer.state_dict()` of bitsandbytes to the state of our optimizers, and back.

For each parameter bitsandbytes stores `step`, `state1` and, for optimizers with two moments, `state2`. Where these are
uint8 codes, it also stores `absmax1` and `qmap1` (or `absmax2` and `qmap2`). Since 0.50 these tensors are in a
dictionary of their own, before that they were next to `step`. Both layouts are read. Codes are copied bit for bit where
blocks and maps agree (`flat_blocks.py`).

The optimizers of torch itself are read too. Their moments have names, such as `exp_avg` and `exp_avg_sq`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey

from ...optim.storage.moments import is_codes
from ...optim.trees import Params
from . import flat_blocks as flat
from .conversion import Stored, to_ours, to_theirs
from .layout import layout
from .pairs import Axes, Key, check_shape, pair
from .report import ConversionReport, Converted
from .slots import Arrays, Slot, slots, states_of
from .tensors import as_numpy

NESTED = "__bnb_optimizer_quant_state__"  # where 0.50 puts tensors, to hide them from FSDP
NO_TRANSPOSE: Mapping[str, Sequence[int]] = MappingProxyType({})
# The names that the optimizers of torch give to state1 and state2, and those that none of ours can continue.
OF_TORCH = dict.fromkeys(["exp_avg", "square_avg", "sum", "momentum_buffer"], "state1") | {"exp_avg_sq": "state2"}
NOT_OURS = {"max_exp_avg_sq": "amsgrad=True", "grad_avg": "centered=True"}
CLIPS = ("lamb", "lars")  # these also store `unorm_vec`, which every step writes before it reads


def load_optimizer_state(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Params,
    *,
    order: Sequence[str | None] | Mapping[Any, str | None],
    transpose: Mapping[str, Sequence[int]] = NO_TRANSPOSE,
    step: int | None = None,
) -> tuple[Any, ConversionReport]:
    """Loads the state of an optimizer of bitsandbytes, 8-bit or 32-bit, or of torch, as a state of `tx`.

    Of torch it reads `AdamW`, `Adam`, `SparseAdam`, `SGD` with momentum, `RMSprop` and `Adagrad`, and others whose
    state has the same names. torch's `SGD` does not count its steps, so give `step`.

    `tx` and its rules decide how each moment is stored, as in `tx.init`. Shapes and dtypes are therefore those of
    `tx.init(params)`. Codes and scales are copied bit for bit if all of this holds: the codec is "dynamic", the map of
    the checkpoint is the usual one (up to a few float32 roundings), the parameter is not transposed, and the blocks are
    the same. With the defaults of this module, blocks are the same for vectors and for parameters whose last axis is a
    multiple of 256. All other moments are decoded. They are encoded again if `tx` stores them in 8 bits, and the report
    has the error.

    Hyper-parameters are those of `tx`. The values in `state_dict["param_groups"]` are not read. Every `count` in the
    state becomes the step, including the one of a learning rate schedule.

    Args:
        state_dict: The result of `optimizer.state_dict()`, with torch tensors or numpy arrays. The layouts before and
            since bitsandbytes 0.50 are both read.
        tx: An optimizer with the same moments, alone or in a chain: the one of the same name in this module, or another
            8-bit optimizer of this library.
        params: The parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`).
        order: Says which parameter of torch is which of ours. Either our paths, such as "block/kernel", in the order in
            which torch's optimizer has its parameters, or a mapping from torch's keys (indices or names) to our paths.
            Use None in place of a path for a parameter that `params` does not have.
        transpose: Says which tensors have their axes in another order. A mapping from regular expressions, searched in
            our paths, to the axes of torch's tensor in our order. Use {"kernel$": (1, 0)} for the weights of
            `torch.nn.Linear`.
        step: The number of steps taken. By default it is read from `state_dict`. It is needed if the parameters there
            have different counts, because our state has one count for all of them.

    Returns:
        The state, and a `ConversionReport` that says how each moment was converted.

    Raises:
        TypeError: If `state_dict` is not a mapping.
        ValueError: If `order`, shapes, moments or steps do not fit, if a moment is negative that cannot be, or if
            `transpose` says nothing about a square kernel, for which both orders of its axes fit.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> saved = {"state": {0: {"step": 7, "state1": jnp.ones((2, 3))}}, "param_groups": [{"params": [0]}]}
    >>> tx, params = fse.interop.bitsandbytes.lion8bit(), {"kernel": jnp.zeros((3, 2))}
    >>> state, report = load_optimizer_state(saved, tx, params, order=["kernel"], transpose={"kernel": (1, 0)})
    >>> print(report)
    path    key  moment  how    error
    kernel  0    mu      exact  0.0e+00
    >>> int(state[0].count), state[0].mu["kernel"].shape
    (7, (3, 2))
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be the result of `optimizer.state_dict()`, got {type(state_dict).__name__}. Open a "
            "file with torch.load(path, map_location='cpu', weights_only=True)."
        )
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"`state_dict` must have 'state' and 'param_groups', got {', '.join(map(repr, state_dict))}.")
    kept, saved = layout(tx, params), {key: _unwrapped(key, one) for key, one in state_dict["state"].items()}
    keys = dict.fromkeys([*(key for group in state_dict["param_groups"] for key in group["params"]), *saved])
    pairs = pair(order, keys, kept.plans)
    saved = {key: saved[key] for key in pairs if saved.get(key)}
    _check_states(saved, len(states_of(kept.method)), kept.method.name)
    step = _common_step(saved, step)
    fresh = tx.init(params)
    arrays, rows = Arrays(kept.find(fresh), kept.method), []
    for slot in slots(kept, pairs, Axes(transpose, kept.plans)):
        how, error = "absent", 0.0
        if slot.key in saved:
            moment = _read(saved[slot.key], slot)
            check_shape(slot.key, slot.path, moment.values.shape, slot.place.plan.shape, slot.place.axes)
            values, absmax, how, error = to_ours(moment, slot.place, arrays[slot.values], arrays[slot.absmax])
            arrays[slot.values], arrays[slot.absmax] = values, absmax
        rows.append(Converted(slot.path, slot.key, slot.place.moment.name, how, error))
    return _counted(kept.replace(fresh, arrays.filled()), step), ConversionReport(tuple(rows))


def dump_optimizer_state(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    *,
    order: Sequence[str | None] | Mapping[Any, str | None],
    param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    transpose: Mapping[str, Sequence[int]] = NO_TRANSPOSE,
    tensor: Callable[[np.ndarray], Any] = lambda array: array,
    nested: bool = True,
) -> tuple[dict[str, Any], ConversionReport]:
    """Returns a state dict for `optimizer.load_state_dict` of a bitsandbytes optimizer.

    This is the inverse of `load_optimizer_state`. Moments that are in 8 bits here are in 8 bits there, in blocks of 256
    elements of the flattened tensor, with bitsandbytes' map. They are copied bit for bit where `load_optimizer_state`
    would copy them, and encoded again elsewhere. All other moments become float32. Parameters are not part of the
    result.

    Args:
        tx: The optimizer that made the state.
        params: The parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`).
        state: The state to convert, as `tx.init` or `tx.update` returns it.
        order: As for `load_optimizer_state`. A key of torch that is mapped to None gets no state.
        param_groups: The hyper-parameters with which bitsandbytes shall continue, under its names, because an optax
            transform does not reveal its own. Either one mapping for all parameters with "lr", "betas", "eps" and
            "weight_decay" (and "alpha" for AdEMAMix), or a sequence like `state_dict["param_groups"]`, where "params"
            has the keys of each group.
        transpose: As for `load_optimizer_state`.
        tensor: A function that turns a numpy array into a tensor, such as torch.from_numpy. By default the state dict
            has numpy arrays.
        nested: Whether tensors are in a dictionary of their own, as bitsandbytes has them since 0.50. Use False for
            older versions.

    Returns:
        The state dict, and a `ConversionReport` that says how each moment was converted.

    Raises:
        ValueError: If something does not fit, as for `load_optimizer_state`, or if a hyper-parameter is missing.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx, params = fse.interop.bitsandbytes.lion8bit(), {"kernel": jnp.ones((16, 256))}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> group = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0}
    >>> saved, report = dump_optimizer_state(tx, params, state, order=["kernel"], param_groups=group, nested=False)
    >>> report.exact, {name: getattr(x, "shape", x) for name, x in saved["state"][0].items()}
    (True, {'step': 1, 'state1': (16, 256), 'absmax1': (16,), 'qmap1': (256,)})
    """
    kept, rows = layout(tx, params), []
    core = kept.find(state)
    kept.check(core)
    keys = dict(order) if isinstance(order, Mapping) else dict(enumerate(order))
    groups = _groups(param_groups, list(keys), len(states_of(kept.method)), kept.method.name)
    pairs = pair(order, [key for group in groups for key in group["params"]], kept.plans)
    arrays, count, moments = Arrays(core, kept.method), int(core.count), {}
    for slot in slots(kept, pairs, Axes(transpose, kept.plans)):
        values, absmax = np.asarray(arrays[slot.values]), np.asarray(arrays[slot.absmax])
        if is_codes(values.dtype) != (slot.place.plan.blocks is not None):
            raise ValueError(
                f"`state` has {values.dtype} for {slot.path!r}, but `tx` stores that parameter otherwise. Pass the "
                "optimizer that made the state."
            )
        moment, how, error = to_theirs(values, absmax, slot.place)
        moments.setdefault(slot.key, {}).setdefault(slot.number, []).append(moment)
        rows.append(Converted(slot.path, slot.key, slot.place.moment.name, how, error))
    states = {}
    for key, of_parameter in moments.items() if count else ():
        tensors = {name: tensor(array) for name, array in _written(of_parameter, kept.method.name)}
        states[key] = {"step": count} | ({NESTED: tensors} if nested else tensors)
    return {"state": states, "param_groups": groups}, ConversionReport(tuple(rows))


def _unwrapped(key: Key, state: Any) -> dict[str, Any]:
    if not isinstance(state, Mapping):
        raise ValueError(f"`state_dict` has {state!r} for the state of parameter {key!r}. It must be a mapping.")
    found = {**{name: value for name, value in state.items() if name != NESTED}, **state.get(NESTED, {})}
    found = {name: value for name, value in found.items() if value is not None}  # SGD before its first step
    if lost := [name for name in NOT_OURS if name in found]:
        raise ValueError(
            f"`state_dict` has {lost[0]!r} for parameter {key!r}, which torch keeps with {NOT_OURS[lost[0]]}. No 8-bit "
            "optimizer of this library has it."
        )
    if {"square_avg", "momentum_buffer"} <= found.keys():
        raise ValueError(
            f"`state_dict` has 'square_avg' and 'momentum_buffer' for parameter {key!r}: RMSprop with momentum, which "
            "cannot be loaded."
        )
    return {(OF_TORCH[name] if name in OF_TORCH else name): value for name, value in found.items()}


def _check_states(saved: Mapping[Key, Mapping], states: int, name: str) -> None:
    for key, state in saved.items():
        there = sum(f"state{number}" in state for number in (1, 2))
        if there != states:
            raise ValueError(
                f"`state_dict` has {there} states for parameter {key!r} ({', '.join(state)}), but {name} in `tx` has "
                f"{states}. Use the optimizer that was saved."
            )


def _read(state: Mapping[str, Any], slot: Slot) -> Stored:
    """Reads a moment from the state of one parameter in the state dict."""
    names = {field: f"{field}{slot.number}" for field in ("state", "absmax", "qmap")}
    found = {field: as_numpy(state[name]) for field, name in names.items() if name in state}
    values, absmax = found["state"], found.get("absmax")
    if slot.plane is not None:
        if values.ndim != len(slot.place.plan.shape) + 1 or len(values) <= slot.plane:
            raise ValueError(
                f"`state1` of parameter {slot.key!r} has the shape {values.shape}, but AdEMAMix stacks two moments in "
                f"it, {(2, *slot.place.plan.shape)}. Use the optimizer that was saved."
            )
        values, absmax = values[slot.plane], None if absmax is None else absmax[slot.plane]
    if jnp.issubdtype(values.dtype, jnp.floating) and absmax is None:
        return Stored(values)
    if values.dtype != np.uint8:
        found_type = f"{values.dtype}{'' if absmax is None else ' with scales'}"
        raise ValueError(
            f"`state{slot.number}` of parameter {slot.key!r} is {found_type}. It must be uint8 codes with `absmax` and "
            "`qmap`, or floating point numbers without them."
        )
    if absmax is None or "qmap" not in found:
        raise ValueError(
            f"`state{slot.number}` of parameter {slot.key!r} is in 8 bits, but without its `absmax{slot.number}` or "
            f"`qmap{slot.number}`. It has {', '.join(state)}. Only block-wise states can be loaded."
        )
    moment = Stored(values, absmax.reshape(-1).astype(np.float32), found["qmap"])
    if found["qmap"].shape != (256,) or not np.isfinite(found["qmap"]).all():
        raise ValueError(f"`qmap{slot.number}` of parameter {slot.key!r} must be 256 finite numbers.")
    if not moment.block_size:
        raise ValueError(
            f"`absmax{slot.number}` of parameter {slot.key!r} has {absmax.size} scales for {values.size} elements: "
            f"that fits neither blocks of {flat.BLOCK} nor blocks of {flat.OLD_BLOCK}."
        )
    return moment


def _written(moments: Mapping[int, Sequence[Stored]], name: str) -> Iterator[tuple[str, np.ndarray]]:
    for number, planes in moments.items():
        for field, column in (("state", "values"), ("absmax", "absmax")):
            arrays = [getattr(moment, column) for moment in planes]
            if arrays[0] is not None:
                yield f"{field}{number}", arrays[0].copy() if len(arrays) == 1 else np.stack(arrays)
        if planes[0].qmap is not None:
            yield f"qmap{number}", planes[0].qmap
    if name in CLIPS:
        yield "unorm_vec", np.zeros(1, np.float32)


def _groups(given: Any, keys: list[Key], states: int, name: str) -> list[dict[str, Any]]:
    groups = [{"params": keys, **given}] if isinstance(given, Mapping) else [dict(group) for group in given]
    needed = ["lr", "betas", "eps", "weight_decay", "params"] + (["alpha"] if name == "ademamix" else [])
    for group in groups:
        if missing := [key for key in needed if key not in group]:
            raise ValueError(
                f"`param_groups` lacks {', '.join(missing)}. bitsandbytes' optimizers read their hyper-parameters from "
                "it, and an optax transform does not reveal its own. Add them."
            )
    more = {"alpha": 0.0, "t_alpha": None, "t_beta3": None} if states == 2 else {}
    return [{**more, **group, "params": list(group["params"])} for group in groups]


def _common_step(saved: Mapping[Key, Mapping], step: int | None) -> int:
    if step is not None:
        return _as_count("`step`", step)
    if without := [key for key, state in saved.items() if "step" not in state]:
        raise ValueError(f"`state_dict` has no 'step' for parameter {without[0]!r}. Set `step` to the steps taken.")
    steps = {key: _as_count(f"The step of parameter {key!r}", state["step"]) for key, state in saved.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"The parameters have different numbers of steps, {steps}, but our state has one count for all of them. "
            f"Choose one, such as step={max(steps.values())}."
        )
    return next(iter(steps.values()), 0)


def _as_count(name: str, step: Any) -> int:
    try:
        number = int(step) if float(step).is_integer() else -1
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < 2**31:
        raise ValueError(f"{name} must be an integer from 0 to 2^31 - 1, got {step!r}.")
    return number


def _counted(state: Any, step: int) -> Any:
    """Returns the state with every count set to `step`: that of the moments and those of schedules."""

    def set_count(path, x):
        is_count = path and isinstance(path[-1], GetAttrKey) and path[-1].name.startswith("count")
        return jnp.full_like(x, step) if is_count and x.shape == () else x

    return jax.tree_util.tree_map_with_path(set_count, state)
