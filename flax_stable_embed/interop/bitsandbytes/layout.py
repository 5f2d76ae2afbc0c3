"""What a transform stores where: its method, its state within the whole one, and the decision for each parameter."""

from typing import Any, NamedTuple

import jax
import optax

from ...optim.engine.method import Method
from ...optim.engine.records import trace_init
from ...optim.storage.rules import Decision


class Layout(NamedTuple):
    """How the one 8-bit transform in an optimizer stores the moments of each parameter."""

    method: Method
    parameters: dict[str, tuple[tuple[int, ...], Decision]]  # by path: the shape, and the decision

    def find(self, state: Any) -> Any:
        """Its state, from within the whole one.

        Raises:
            ValueError: there is none in it.
        """
        found = [x for x in jax.tree.leaves(state, is_leaf=self._is_ours) if self._is_ours(x)]
        if len(found) != 1:
            raise ValueError(
                f"`state` must hold one {self.method.state.__name__}, as `tx.init(params)` makes it, got {len(found)}."
            )
        return found[0]

    def replace(self, state: Any, new: Any) -> Any:
        """The whole state with `new` in place of its own."""
        return jax.tree.map(lambda x: new if self._is_ours(x) else x, state, is_leaf=self._is_ours)

    def _is_ours(self, x: Any) -> bool:
        return isinstance(x, self.method.state)


def layout(tx: optax.GradientTransformation, params: Any) -> Layout:
    """The layout of the 8-bit transform in `tx`, alone or in optax's wrappers.

    Raises:
        ValueError: there is none, or more than one.
    """
    records = [record for _, record in trace_init(tx, params)[1]]
    found = [Layout(r.method, r.parameters) for r in records if r.method is not None]
    if len(found) != 1:
        raise ValueError(
            f"`tx` must hold one 8-bit transform of this library, got {len(found)}. Give it the optimizer itself, or a "
            "chain of which one member is one."
        )
    return found[0]
