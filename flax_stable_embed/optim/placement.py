"""The sharding of each parameter, by path: from the parameter itself, or as the user gives it."""

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ..ops.blockwise_step.capabilities import Seen, Spec
from .boxes import is_box, unbox
from .trees import Params, Specs, path_name


class Placed(NamedTuple):
    """A parameter whose sharding is known."""

    shape: tuple[int, ...]
    sharding: Sharding

    @property
    def shards(self) -> tuple[int, ...]:
        """Into how many shards each axis is split."""
        local = self.sharding.shard_shape(self.shape)
        return tuple(d // n if n else 1 for d, n in zip(self.shape, local))


def placed_by_path(shardings: Specs, params: Params) -> dict[str, Placed]:
    """Returns every parameter whose sharding is known, by path.

    Args:
        shardings: A pytree like the parameters of PartitionSpec or NamedSharding, None where nothing is known. None for
            all means the shardings of the parameters themselves.
        params: The parameters, or their shapes.

    Raises:
        TypeError: `shardings` holds something else than shardings.
        ValueError: It is not a pytree like the parameters, names axes that a mesh does not have, or does not divide a
            shape.
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
                f"`shardings` must be a pytree of PartitionSpec or NamedSharding like the parameters, got "
                f"{sharding!r:.80} at {path!r}."
            )
    if different := [path for path in (*arrays, *given) if path not in arrays or path not in given]:
        has, lacks = ("parameters", "`shardings`") if different[0] in arrays else ("`shardings`", "parameters")
        raise ValueError(
            f"`shardings` must be a pytree like the parameters, but the {has} have {different[0]!r} and the {lacks} do "
            "not. PartitionSpec() means replicated, None means that the sharding is not known."
        )
    given = {path: _on_mesh(path, sharding) for path, sharding in given.items() if sharding is not None}
    return {path: _placed(path, arrays[path].shape, sharding) for path, sharding in given.items()}


def num_devices(placed: dict[str, Placed], params: Params) -> int | None:
    """Returns the number of devices of a program with these parameters; None where nothing is known about it."""
    leaves = [unbox(box) for box in jax.tree.leaves(params, is_leaf=is_box)]
    arrays = [x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    known = [x.sharding.num_devices for x in (*placed.values(), *arrays)]
    return max(known, default=None)


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | Sharding)


def _on_mesh(path: str, sharding: PartitionSpec | Sharding) -> Sharding:
    """Returns a sharding as it is, and a PartitionSpec on the mesh in the context."""
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
    """Returns the mesh of `jax.set_mesh`, with its devices where they are known. Under jit they are not."""
    abstract = jax.sharding.get_abstract_mesh()
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return abstract
    return abstract if mesh.empty or mesh.abstract_mesh != abstract else mesh


def _placed(path: str, shape: tuple[int, ...], sharding: Sharding) -> Placed:
    placed = Placed(shape, sharding)
    try:
        _ = placed.shards
    except (ValueError, IndexError) as error:  # IndexError for a spec that is longer than the shape
        raise ValueError(f"Parameter {path!r} of shape {shape} cannot be sharded as given: {error}") from None
    return placed


def device_of(tree: Any) -> SingleDeviceSharding | None:
    """Returns the device that all arrays of a pytree are committed to; None if it is not one, or not known."""
    leaves = [x for x in map(unbox, jax.tree.leaves(tree, is_leaf=is_box)) if hasattr(x, "shape")]
    if not leaves or not all(isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed for x in leaves):
        return None
    devices = set().union(*(x.devices() for x in leaves))
    return SingleDeviceSharding(*devices) if len(devices) == 1 else None


# Shardings by path while `describe` or `abstract_state` traces `init`, whose arrays then have none. `describe` reports
# what they lead to. `abstract_state`, which prepares a run, lets the transform remember them.
REPORTED: ContextVar[Mapping[str, Any]] = ContextVar("reported", default=MappingProxyType({}))
REMEMBERED: ContextVar[Mapping[str, Any]] = ContextVar("remembered", default=MappingProxyType({}))


def sharding_at_init(path: str, parameter: Any) -> NamedSharding | None:
    """Returns how a parameter is sharded that `init` gets as an array, or as a shape with a sharding; else None."""
    own = None if isinstance(parameter, Tracer) else getattr(parameter, "sharding", None)
    sharding = REMEMBERED.get().get(path, own)
    return sharding if isinstance(sharding, NamedSharding) else None


class SpecsByPath:
    """The argument `partition_specs`, by path, and the shardings that `init` saw."""

    def __init__(self, partition_specs: Specs = None):
        self.seen: dict[str, NamedSharding | None] = {}  # None where `init` saw two for one path
        pairs = jax.tree_util.tree_flatten_with_path(partition_specs, is_leaf=_is_spec)[0]
        self.by_path: dict[str, Any] = {path_name(path): spec for path, spec in pairs}
        self.given = partition_specs is not None
        for path, spec in self.by_path.items():
            if self.given and not _is_spec(spec):
                raise TypeError(
                    f"`partition_specs` must be a pytree of PartitionSpec or NamedSharding like the parameters, got "
                    f"{spec!r:.80} at {path!r}."
                )

    def of(self, path: str, shape: tuple[int, ...]) -> Spec | None:
        """Returns the spec of one parameter; None where `partition_specs` was not given.

        Raises:
            ValueError: There are specs, but none for this parameter; or its spec is longer than the shape, names an
                axis that the mesh in the context does not have, or is on another mesh.
        """
        if not self.given:
            seen = REPORTED.get().get(path) or self.seen.get(path)
            return None if seen is None else Seen(seen)
        if path not in self.by_path:
            raise ValueError(
                f"`partition_specs` has no entry for parameter {path!r}. It has {', '.join(list(self.by_path)[:8])}. "
                "Give a pytree like the parameters, with PartitionSpec() for replicated ones."
            )
        spec, mesh = self.by_path[path], jax.sharding.get_abstract_mesh()
        entries = spec.spec if isinstance(spec, NamedSharding) else spec or ()
        if len(entries) > len(shape):
            raise ValueError(
                f"`partition_specs` has {entries} for parameter {path!r}, but its shape {shape} has {len(shape)} axes."
            )
        if isinstance(spec, NamedSharding) and not mesh.empty and dict(spec.mesh.shape) != dict(mesh.shape):
            raise ValueError(
                f"`partition_specs` has a NamedSharding on the mesh {dict(spec.mesh.shape)} for parameter {path!r}, "
                f"but jax.set_mesh has {dict(mesh.shape)}. Give the sharding that the parameter has in this program."
            )
        if isinstance(spec, PartitionSpec) and not mesh.empty:
            if unknown := [name for name in _axis_names(spec) if name not in mesh.axis_names]:
                raise ValueError(
                    f"`partition_specs` has {spec} for parameter {path!r}, but the mesh has the axes "
                    f"{', '.join(map(str, mesh.axis_names))} and no {unknown[0]!r}. Correct the name, or set the mesh "
                    "that has it with jax.set_mesh(mesh)."
                )
        return spec

    def remember(self, path: str, parameter: Any) -> None:
        """Remembers how a parameter is sharded, if it is an array or a shape with a sharding over several devices.

        Not if it is replicated, because the state of replicated parameters may be sharded later (ZeRO-1), and a step
        in `jax.shard_map` would gather it.
        """
        sharding = sharding_at_init(path, parameter)
        if sharding is not None and isinstance(sharding.mesh, Mesh) and not sharding.is_fully_replicated:
            same = self.seen.setdefault(path, sharding) == sharding
            self.seen[path] = sharding if same else None

    def check_mesh(self, path: str) -> None:
        """Raises where a step would have to ignore the spec of a parameter because no mesh is set.

        For parameters whose type does not say how they are sharded.
        """
        spec = self.by_path.get(path) if self.given else None
        if isinstance(spec, PartitionSpec) and any(_axis_names(spec)) and jax.sharding.get_abstract_mesh().empty:
            raise ValueError(
                f"`partition_specs` has {spec} for parameter {path!r}, which needs a mesh. Run the step under "
                "jax.set_mesh(mesh), or give NamedSharding(mesh, spec)."
            )


def _axis_names(spec: PartitionSpec) -> list[str]:
    names = [name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,))]
    return [name for name in names if isinstance(name, str)]


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | NamedSharding)
