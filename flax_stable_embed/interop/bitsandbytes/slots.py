"""Maps bitsandbytes' `state1` and `state2` of every parameter to the fields of our optimizer states."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ...optim.boxes import is_box, rebox, unbox
from ...optim.engine.method import Method
from ...optim.methods.adagrad import ScaleByAdagrad8bitState
from ...optim.methods.adam import ScaleByAdam8bitState
from ...optim.methods.ademamix import ScaleByAdemamix8bitState
from ...optim.methods.lion import ScaleByLion8bitState
from ...optim.methods.rmsprop import ScaleByRmsprop8bitState
from ...optim.methods.sgd import ScaleBySgd8bitState
from ...optim.trees import path_name
from .conversion import Place
from .layout import Layout
from .pairs import Axes, Key

# The names of our moments that are state1 and state2 in bitsandbytes. AdEMAMix stacks two moments in state1.
STATES: dict[type, tuple[tuple[str, ...], ...]] = {
    ScaleByAdam8bitState: (("mu",), ("nu",)),
    ScaleByAdemamix8bitState: (("m1", "m2"), ("nu",)),
    ScaleBySgd8bitState: (("trace",),),
    ScaleByRmsprop8bitState: (("nu",),),
    ScaleByAdagrad8bitState: (("sum_of_squares",),),
    ScaleByLion8bitState: (("mu",),),
}


class Slot(NamedTuple):
    """One moment of one parameter, in bitsandbytes and here."""

    key: Key  # torch's key of the parameter
    path: str  # our path of the parameter
    number: int  # 1 for `state1`, 2 for `state2`
    plane: int | None  # the index along the first axis where `state1` stacks two moments
    place: Place

    @property
    def values(self) -> tuple[str, str]:
        """The key of the moment in `Arrays`."""
        return self.place.moment.name, self.path

    @property
    def absmax(self) -> tuple[str, str]:
        """The key of its scales in `Arrays`."""
        return f"{self.place.moment.name}_absmax", self.path


def slots(kept: Layout, pairs: Mapping[Key, str], axes: Axes) -> Iterator[Slot]:
    """Yields the slots of all moments, parameter by parameter.

    Raises:
        ValueError: If the optimizer has moments that no optimizer of bitsandbytes has, or if the axes do not fit.
    """
    states, moments = states_of(kept.method), {moment.name: moment for moment in kept.method.moments}
    for key, path in pairs.items():
        plan = kept.plans[path]
        order = axes.of(path, plan.shape)
        for number, names in enumerate(states, 1):
            for plane, name in enumerate(names):
                place = Place(moments[name], number == 1, plan, order)
                yield Slot(key, path, number, plane if len(names) > 1 else None, place)


def states_of(method: Method) -> tuple[tuple[str, ...], ...]:
    """Returns the names of our moments that are state1 and state2 in bitsandbytes."""
    states = STATES.get(method.state, ())
    ours = {moment.name for moment in method.moments}
    if not states or {name for names in states for name in names} != ours:
        raise ValueError(
            f"`tx` ({method.name}) has {', '.join(sorted(ours)) or 'no moments'}, unlike any optimizer of "
            "bitsandbytes. There, RMSprop is not centered and has no momentum, and SGD always has momentum."
        )
    if any(moment.sums in ("directions", "steps") for moment in method.moments):
        raise ValueError(
            f"The trace of {method.name} in `tx` sums gradients scaled by the trust ratio, but the trace of "
            "bitsandbytes' LARS sums the gradients themselves. Use fse.interop.bitsandbytes.lars8bit, or "
            "fse.lars8bit(max_unorm=...)."
        )
    return states


class Arrays:
    """The arrays of a state's moments by (field, path). A replaced array keeps its wrapper and its sharding."""

    def __init__(self, state: Any, method: Method):
        self.state = state
        flat = {f: jax.tree_util.tree_flatten_with_path(getattr(state, f), is_leaf=is_box) for f in method.fields}
        self._trees = {field: tree for field, (_, tree) in flat.items()}
        self._boxes = {field: {path_name(path): box for path, box in leaves} for field, (leaves, _) in flat.items()}

    def __getitem__(self, at: tuple[str, str]) -> Any:
        field, path = at
        return unbox(self._boxes[field][path])

    def __setitem__(self, at: tuple[str, str], array: np.ndarray) -> None:
        field, path = at
        box = self._boxes[field][path]
        before = unbox(box)
        assert (array.shape, array.dtype) == (before.shape, before.dtype), (at, array.shape, array.dtype)
        self._boxes[field][path] = rebox(box, jax.device_put(array, before.sharding))

    def filled(self) -> Any:
        """Returns the state with the replaced arrays."""
        new = {field: tree.unflatten(self._boxes[field].values()) for field, tree in self._trees.items()}
        return self.state._replace(**new)
