"""The state of bitsandbytes' optimizers, `optimizer.state_dict()`, as the state of ours, and back.

bitsandbytes keeps for each parameter `step`, `state1` and perhaps `state2`; where they are uint8, `absmax` and `qmap`
beside each. Since 0.50 they lie in a dictionary of their own, before that beside `step`; both are read. Where blocks
and maps agree (`flat_blocks.py`), codes survive bit by bit.
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
from . import flat_blocks as flat
from .conversion import Stored, to_ours, to_theirs
from .layout import layout
from .pairs import Axes, Key, check_shape, pair
from .report import ConversionReport, Converted
from .slots import Arrays, Slot, slots, states_of
from .tensors import as_numpy

NESTED = "__bnb_optimizer_quant_state__"  # where 0.50 puts tensors, to hide them from FSDP


STRAIGHT: Mapping[str, Sequence[int]] = MappingProxyType({})


CLIPS = ("lamb", "lars")  # these keep `unorm_vec`, which every step writes before it reads


def load_optimizer_state(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    *,
    order: Sequence[str | None] | Mapping[Any, str | None],
    transpose: Mapping[str, Sequence[int]] = STRAIGHT,
    step: int | None = None,
) -> tuple[Any, ConversionReport]:
    """The state of `tx` from `optimizer.state_dict()` of a bitsandbytes optimizer, 8-bit or 32-bit.

    How a moment is stored is decided by `tx` and its rules, as in `tx.init`. Codes and scales survive bit by bit where
    the codec is "dynamic", the map is ours (but for last digits), the parameter is not transposed and blocks are the
    same: vectors, and parameters whose last axis is a multiple of 256, with the defaults of this module. All else is
    decoded, and encoded anew where `tx` stores bytes; the report has the error.

    Hyper-parameters are those of `tx`: what `state_dict["param_groups"]` has is not read. Every `count` in the state
    (the learning rate's schedule has one) becomes the step.

    Args:
        state_dict: of numpy arrays or torch tensors; the layouts before and since 0.50.
        tx: an optimizer with the same moments: of this module, or another one of this library, alone or in a chain.
        params: the parameters, or their shapes.
        order: our paths ("block/kernel") in the order of torch's parameters, or a mapping from torch's keys (indices,
            or names) to them. None for a parameter that we do not have.
        transpose: for patterns of our paths, the axes of torch's tensor in our order: {"kernel$": (1, 0)} for the
            weights of `torch.nn.Linear`.
        step: for all parameters; needed where their own counts differ, as we keep one for all.

    Returns:
        The state, and a `ConversionReport` of what became of each moment.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: what does not fit: `order`, shapes, moments (negative where they cannot be), steps; a square kernel
            that `transpose` is silent on.

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
            f"`state_dict` must be the mapping that `optimizer.state_dict()` gives, got {type(state_dict).__name__}. A "
            "file opens with torch.load(path, map_location='cpu', weights_only=True)."
        )
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"`state_dict` must have 'state' and 'param_groups', got {', '.join(map(repr, state_dict))}.")
    kept, saved = layout(tx, params), {key: _unwrapped(key, one) for key, one in state_dict["state"].items()}
    keys = dict.fromkeys([*(key for group in state_dict["param_groups"] for key in group["params"]), *saved])
    pairs = pair(order, keys, kept.parameters)
    saved = {key: saved[key] for key in pairs if saved.get(key)}
    _check_states(saved, len(states_of(kept.method)), kept.method.name)
    step = _common_step(saved, step)
    whole = tx.init(params)
    arrays, rows = Arrays(kept.find(whole), kept.method), []
    for slot in slots(kept, pairs, Axes(transpose, kept.parameters)):
        how, error = "absent", 0.0
        if slot.key in saved:
            moment = _read(saved[slot.key], slot)
            check_shape(slot.key, slot.path, moment.values.shape, slot.place.shape, slot.place.axes)
            values, absmax, how, error = to_ours(moment, slot.place, arrays[slot.values], arrays[slot.absmax])
            arrays[slot.values], arrays[slot.absmax] = values, absmax
        rows.append(Converted(slot.path, slot.key, slot.place.moment.name, how, error))
    return _counted(kept.replace(whole, arrays.filled()), step), ConversionReport(tuple(rows))


def dump_optimizer_state(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    *,
    order: Sequence[str | None] | Mapping[Any, str | None],
    param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    transpose: Mapping[str, Sequence[int]] = STRAIGHT,
    tensor: Callable[[np.ndarray], Any] = lambda array: array,
    nested: bool = True,
) -> tuple[dict[str, Any], ConversionReport]:
    """What `optimizer.load_state_dict` of a bitsandbytes optimizer takes: the inverse of `load_optimizer_state`.

    Moments that are bytes here are bytes there, in blocks of 256 of the flattened tensor with bitsandbytes' map: bit by
    bit where `load_optimizer_state` would keep them, else encoded anew. All others are fp32 there.

    Args:
        tx: the optimizer that the state is of.
        params: the parameters, or their shapes.
        state: the state, as `tx.init(params)` or `tx.update` make it.
        order: as for `load_optimizer_state`; torch's keys for None get no state.
        param_groups: what bitsandbytes shall go on with, under its names, as no optax transform tells: one mapping with
            "lr", "betas", "eps" and "weight_decay" for all parameters (AdEMAMix: and "alpha"), or the sequence that
            `state_dict["param_groups"]` is, where "params" has the keys of each.
        transpose: as for `load_optimizer_state`.
        tensor: makes a tensor of a numpy array: torch.from_numpy.
        nested: tensors in a dictionary of their own, as bitsandbytes saves them since 0.50; False for older versions.

    Returns:
        The state dict, and a `ConversionReport` of what became of each moment.

    Raises:
        ValueError: what does not fit, as for `load_optimizer_state`; a missing hyper-parameter.

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
    keys = dict(order) if isinstance(order, Mapping) else dict(enumerate(order))
    groups = _groups(param_groups, list(keys), len(states_of(kept.method)), kept.method.name)
    pairs = pair(order, [key for group in groups for key in group["params"]], kept.parameters)
    arrays, count, moments = Arrays(core, kept.method), int(core.count), {}
    for slot in slots(kept, pairs, Axes(transpose, kept.parameters)):
        values, absmax = np.asarray(arrays[slot.values]), np.asarray(arrays[slot.absmax])
        if is_codes(values.dtype) != (slot.place.decision.blocks is not None):
            raise ValueError(
                f"`state` has {values.dtype} for {slot.path!r}, which `tx` stores otherwise: is it its own?"
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
        raise ValueError(f"`state_dict` has {state!r} for the state of parameter {key!r}, which must be a mapping.")
    return {**{name: value for name, value in state.items() if name != NESTED}, **state.get(NESTED, {})}


def _check_states(saved: Mapping[Key, Mapping], states: int, name: str) -> None:
    for key, state in saved.items():
        there = sum(f"state{number}" in state for number in (1, 2))
        if there != states:
            raise ValueError(
                f"`state_dict` has {there} states for parameter {key!r} ({', '.join(state)}), but {name} in `tx` has "
                f"{states}. Is it the same optimizer?"
            )


def _read(state: Mapping[str, Any], slot: Slot) -> Stored:
    """The moment as it is stored there."""
    names = {field: f"{field}{slot.number}" for field in ("state", "absmax", "qmap")}
    found = {field: as_numpy(state[name]) for field, name in names.items() if name in state}
    values, absmax = found["state"], found.get("absmax")
    if slot.plane is not None:
        if values.ndim != len(slot.place.shape) + 1 or len(values) <= slot.plane:
            raise ValueError(
                f"`state1` of parameter {slot.key!r} has the shape {values.shape}; that of AdEMAMix has two moments, "
                f"{(2, *slot.place.shape)}. Is it the same optimizer?"
            )
        values, absmax = values[slot.plane], None if absmax is None else absmax[slot.plane]
    if jnp.issubdtype(values.dtype, jnp.floating) and absmax is None:
        return Stored(values)
    if values.dtype != np.uint8:
        what = f"{values.dtype}{'' if absmax is None else ' with scales'}"
        raise ValueError(
            f"`state{slot.number}` of parameter {slot.key!r} is {what}: a moment is uint8 codes with `absmax` and "
            "`qmap`, or floating point numbers without them."
        )
    if absmax is None or "qmap" not in found:
        raise ValueError(
            f"`state{slot.number}` of parameter {slot.key!r} is in 8 bits, without its `absmax{slot.number}` or "
            f"`qmap{slot.number}`: there are {', '.join(state)}. States that are not block-wise cannot be read."
        )
    moment = Stored(values, absmax.reshape(-1).astype(np.float32), found["qmap"])
    if found["qmap"].shape != (256,) or not np.isfinite(found["qmap"]).all():
        raise ValueError(f"`qmap{slot.number}` of parameter {slot.key!r} must be 256 finite numbers.")
    if not moment.block_size:
        raise ValueError(
            f"`absmax{slot.number}` of parameter {slot.key!r} has {absmax.size} scales for {values.size} elements: "
            f"neither blocks of {flat.BLOCK} nor of {flat.OLD_BLOCK}."
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
                f"`param_groups` lacks {', '.join(missing)}: no optax transform tells its hyper-parameters, and "
                "bitsandbytes' optimizers read theirs from here."
            )
    more = {"alpha": 0.0, "t_alpha": None, "t_beta3": None} if states == 2 else {}
    return [{**more, **group, "params": list(group["params"])} for group in groups]


def _common_step(saved: Mapping[Key, Mapping], step: int | None) -> int:
    if step is not None:
        return _whole("`step`", step)
    if without := [key for key, state in saved.items() if "step" not in state]:
        raise ValueError(f"`state_dict` has no 'step' for parameter {without[0]!r}. Say how many there were: step=...")
    steps = {key: _whole(f"The step of parameter {key!r}", state["step"]) for key, state in saved.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"the parameters were updated a different number of times, {steps}, and we keep one count for all. Say "
            f"which to go on from: step={max(steps.values())}."
        )
    return next(iter(steps.values()), 0)


def _whole(who: str, step: Any) -> int:
    try:
        number = int(step) if float(step).is_integer() else -1
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < 2**31:
        raise ValueError(f"{who} must be a whole number of at least 0, got {step!r}.")
    return number


def _counted(state: Any, step: int) -> Any:
    """The state with `step` in every count: of the moments, and of schedules."""

    def set_count(path, x):
        is_count = path and isinstance(path[-1], GetAttrKey) and path[-1].name.startswith("count")
        return jnp.full_like(x, step) if is_count and x.shape == () else x

    return jax.tree_util.tree_map_with_path(set_count, state)
