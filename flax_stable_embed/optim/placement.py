"""How parameters are cut over a mesh, by their paths, as their types or someone says."""

from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from ..ops.blockwise_step.capabilities import Spec
from .boxes import is_box, unbox
from .trees import path_name


class Placed(NamedTuple):
    """A parameter whose sharding is known."""

    shape: tuple[int, ...]
    sharding: Sharding

    @property
    def pieces(self) -> tuple[int, ...]:
        """In how many pieces each axis is cut."""
        of_device = self.sharding.shard_shape(self.shape)
        return tuple(d // piece if piece else 1 for d, piece in zip(self.shape, of_device))


def placed_by_path(shardings: Any, params: Any) -> dict[str, Placed]:
    """Every parameter whose sharding is known, by path; without `shardings`, as the parameters lie on a mesh.

    Raises:
        TypeError: `shardings` holds something else than shardings.
        ValueError: it is no tree like the parameters, names axes that a mesh does not have, or cuts unequal pieces.
    """
    pairs = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None or is_box(x))[0]
    leaves = {path_name(path): unbox(box) for path, box in pairs}
    arrays = {path: x for path, x in leaves.items() if hasattr(x, "shape")}
    if shardings is None:
        found = {path: getattr(x, "sharding", None) for path, x in arrays.items()}
        found = {path: sharding for path, sharding in found.items() if isinstance(sharding, NamedSharding)}
        return {path: _placed(path, arrays[path].shape, sharding) for path, sharding in found.items()}
    pairs = jax.tree_util.tree_flatten_with_path(shardings, is_leaf=_is_sharding)[0]
    given = {path_name(path): sharding for path, sharding in pairs}
    given = {path: sharding for path, sharding in given.items() if path in arrays or path not in leaves}
    for path, sharding in given.items():
        if not _is_sharding(sharding):
            raise TypeError(
                f"`shardings` must be a tree of PartitionSpec or NamedSharding like the parameters, got "
                f"{sharding!r:.80} at {path!r}."
            )
    if different := [path for path in (*arrays, *given) if path not in arrays or path not in given]:
        has, lacks = ("parameters", "`shardings`") if different[0] in arrays else ("`shardings`", "parameters")
        raise ValueError(
            f"`shardings` must be a tree like the parameters, but the {has} have {different[0]!r} and the {lacks} do "
            "not. PartitionSpec() says that nothing is cut, None that it is not known."
        )
    given = {path: _on_mesh(path, sharding) for path, sharding in given.items() if sharding is not None}
    return {path: _placed(path, arrays[path].shape, sharding) for path, sharding in given.items()}


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | Sharding)


def _on_mesh(path: str, sharding: PartitionSpec | Sharding) -> Sharding:
    """The sharding itself, or that of a spec on the mesh in the context."""
    if isinstance(sharding, Sharding):
        return sharding
    mesh = _mesh_in_context()
    if mesh.empty:
        raise ValueError(
            f"`shardings` has {sharding} for parameter {path!r}, which needs a mesh: use jax.set_mesh(mesh), or "
            "give NamedSharding(mesh, spec)."
        )
    try:
        return NamedSharding(mesh, sharding)
    except ValueError as error:
        raise ValueError(f"`shardings` has {sharding} for parameter {path!r}: {error}") from None


def _mesh_in_context() -> Mesh | AbstractMesh:
    """That of `jax.set_mesh`, with its devices where they are known, which they are not under jit."""
    abstract = jax.sharding.get_abstract_mesh()
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return abstract
    return abstract if mesh.empty or mesh.abstract_mesh != abstract else mesh


def _placed(path: str, shape: tuple[int, ...], sharding: Sharding) -> Placed:
    placed = Placed(shape, sharding)
    try:
        _ = placed.pieces
    except (ValueError, IndexError) as error:  # the latter for a spec that is longer than the shape
        raise ValueError(f"Parameter {path!r} of shape {shape} cannot be cut as its sharding says: {error}") from None
    return placed


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
