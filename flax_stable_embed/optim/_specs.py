"""`partition_specs`: how parameters are cut, by their paths, for a mesh that does not say it where a step is traced."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ..ops.blockwise.implementations import Spec
from ._rules import path_name


class Specs:
    """The spec of each parameter, from a tree like the parameters; without one, none."""

    def __init__(self, partition_specs: Any):
        pairs = jax.tree_util.tree_flatten_with_path(partition_specs, is_leaf=_is_spec)[0]
        self.by_path: dict[str, Any] = {path_name(path): spec for path, spec in pairs}
        self.given = partition_specs is not None
        for path, spec in self.by_path.items():
            if self.given and not _is_spec(spec):
                raise TypeError(
                    f"`partition_specs` must be a tree of PartitionSpec or NamedSharding like the parameters, got "
                    f"{spec!r:.80} at {path!r}."
                )

    def of(self, path: str) -> Spec | None:
        """The spec of one parameter; None where nothing is known of any.

        Raises:
            ValueError: there are specs, but none of this parameter.
        """
        if not self.given:
            return None
        if path not in self.by_path:
            raise ValueError(
                f"`partition_specs` has no entry for parameter {path!r}, but for {', '.join(list(self.by_path)[:8])}. "
                "Give a tree like the parameters; PartitionSpec() where nothing is cut."
            )
        return self.by_path[path]


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | NamedSharding)
