"""Says what a new state of `quantize_state` stores, for `describe` and `convert_state`."""

from typing import Any

from jax.tree_util import DictKey, GetAttrKey

from ..boxes import unbox
from ..engine.records import StayedField, StoredMoment
from ..storage.moments import is_codes
from ..storage.plan import LeafPlan
from ..trees import entry, flatten, is_array, nbytes
from .state_fields import REASONS, Field, Slot, count_index, field_of
from .wrapped_moment import moment_of


def implementation_text(plan: LeafPlan, slots: list[Slot]) -> str:
    """Describes how a parameter is updated, for the report."""
    return f"decoded for {', '.join(slot.field.name for slot in slots)}" if plan.blocks else "the transform's own"


def sizes_of(
    inner: Any, absmax: dict[str, Any], slots: list[Slot], slots_by_path: dict
) -> tuple[dict[str, int], tuple]:
    """Counts the bytes stored for every parameter, and lists the fields that stay as they are."""
    leaves = flatten(inner)
    scales = {name: iter([x for _, x in flatten(tree)]) for name, tree in absmax.items()}
    sizes = {slot.index: _bytes(leaves[slot.index][1]) + _bytes(next(scales[slot.field.name])) for slot in slots}
    by_path = {path: sum(sizes.pop(slot.index) for slot in own) for path, own in slots_by_path.items()}
    moments = {slot.index for own in slots_by_path.values() for slot in own}
    fields, stayed = {slot.index: slot.field.name for slot in slots}, {}
    for index, (path, box) in enumerate(leaves):
        if index not in moments and is_array(box) and unbox(box).shape:
            name = fields.get(index) or field_of(path)
            reason = REASONS.get(name.rpartition(".")[2], "not in `moments`")
            reason = "not of the parameter's shape" if index in fields else reason
            size = sizes.get(index) or _bytes(box)
            stayed[name] = StayedField(name, size + (stayed[name].bytes if name in stayed else 0), reason)
    return by_path, tuple(stayed.values())


def stored_moments(
    inner: Any, absmax: dict[str, Any], fields: list[Field], slots: list[Slot], plans: dict[str, LeafPlan]
) -> list[StoredMoment]:
    """Lists where and how the state stores each moment."""
    leaves = flatten(inner)
    counted = count_index(leaves) is not None
    scale_paths = {field.name: iter([path for path, _ in flatten(absmax[field.name])]) for field in fields}
    found = []
    for index, field, path in slots:
        scales = (GetAttrKey("absmax"), DictKey(field.name), *next(scale_paths[field.name]))
        key_path, box = leaves[index]
        if is_array(box):
            x, plan, moment_and_blocks = unbox(box), plans.get(path), (None, None)
            if plan is not None and plan.blocks is not None and is_codes(x.dtype):
                moment = moment_of(field, plan.state_format)
                moment_and_blocks = moment if counted else moment._replace(rounding="nearest"), plan.blocks
            codes = (GetAttrKey("inner"), *key_path)
            found.append(StoredMoment(path, entry(field.path[-1]), codes, scales, x.shape, *moment_and_blocks))
    return found


def _bytes(box: Any) -> int:
    return nbytes(box) if is_array(box) else 0
