"""Finds the 8-bit transform in an optimizer, its state, and how it stores each parameter.

The user may give `adamw8bit` itself or a chain, `optax.inject_hyperparams` or another wrapper around it. The state of
the 8-bit transform is therefore found by its type, anywhere in the optimizer's state. Tracing `init` tells how each
parameter is stored, so nothing here repeats the rules.
"""

from typing import Any, NamedTuple

import jax
import optax

from ...optim.engine.method import Method
from ...optim.engine.records import trace_init
from ...optim.storage.format_code import format_code, format_difference, is_right
from ...optim.storage.plan import LeafPlan
from ...optim.storage.state_format import StateFormat
from ...optim.trees import Params


class Layout(NamedTuple):
    """The one 8-bit transform in an optimizer, and how it stores the moments of each parameter."""

    method: Method
    plans: dict[str, LeafPlan]  # by path
    formats: list[StateFormat]

    def find(self, state: Any) -> Any:
        """Returns the transform's own state from the optimizer's state.

        Raises:
            ValueError: If `state` does not have exactly one state of this type.
        """
        found = [x for x in jax.tree.leaves(state, is_leaf=self._is_ours) if self._is_ours(x)]
        if len(found) != 1:
            raise ValueError(
                f"`state` must have one {self.method.state.__name__}, got {len(found)}. Pass a state that `tx.init` or "
                "`tx.update` returned."
            )
        return found[0]

    def check(self, own: Any) -> None:
        """Checks that `own`, the transform's state, is stored as its optimizer stores it.

        Raises:
            ValueError: Another optimizer made the state, or the same with other rules or another format.
        """
        if not is_right(own.format, format_code(self.formats, list(self.plans.values()))):
            found = format_difference(own.format, self.formats) or "its `format` says so"
            raise ValueError(
                f"`state` was not made by `tx`: {found}. Pass the optimizer that made the state. (A checkpoint loader "
                "that pads or truncates arrays makes such states too.)"
            )

    def replace(self, state: Any, new: Any) -> Any:
        """Returns the optimizer's state with `new` in place of the transform's own state."""
        return jax.tree.map(lambda x: new if self._is_ours(x) else x, state, is_leaf=self._is_ours)

    def _is_ours(self, x: Any) -> bool:
        return isinstance(x, self.method.state)


def layout(tx: optax.GradientTransformation, params: Params) -> Layout:
    """Returns the layout of the 8-bit transform in `tx`, which may be inside optax's wrappers.

    Raises:
        ValueError: If `tx` does not have exactly one 8-bit transform.
    """
    records = [record for _, record in trace_init(tx, params)[1]]
    found = [Layout(r.method, r.plans, r.formats) for r in records if r.method is not None]
    if len(found) != 1:
        raise ValueError(
            f"`tx` must have one 8-bit transform of this library, got {len(found)}. Pass the optimizer itself, or a "
            "chain with one 8-bit optimizer in it."
        )
    return found[0]
