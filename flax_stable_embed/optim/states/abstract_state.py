"""Computes the shapes and shardings of an optimizer state: to restore into, to place arrays by, to compile for.

    abstract_state(tx, params) == jax.eval_shape(tx.init, params), with a sharding for every array

JAX's types infer the shardings: `init` is traced with parameters whose mesh axes are Explicit, whatever they are in
the program.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ...ops.sharding import where_it_divides
from ..arguments import check_params, check_transform
from ..boxes import is_box, rebox, unbox
from ..placement import REMEMBERED, Placed, placed_by_path
from ..trees import Params, Specs, path_name


def abstract_state(tx: optax.GradientTransformation, params: Params, *, shardings: Specs = None) -> Any:
    """Returns `jax.eval_shape(tx.init, params)` with the sharding of every array. Nothing is allocated.

    Arrays that `tx.init` derives from a parameter are sharded like the parameter. JAX's types tell which these are. If
    `init` does something that types do not follow (`optax.flatten`, for example), arrays whose path ends with that of a
    parameter are sharded like it. The scales of 8-bit moments are sharded like the parameter, except along axes whose
    number of blocks is not divisible. All other arrays, such as counts, are replicated. Moments in host memory
    (`fse.Rule(memory_kind="pinned_host")`) have that memory kind in their sharding.

    It works for every optax transform, alone or wrapped, and for NNX variables and Linen boxes.

    Args:
        tx: Any optax transform.
        params: The parameters, or their shapes from `jax.eval_shape`.
        shardings: Pytree with the structure of the parameters that holds the sharding of each. A leaf is a
            NamedSharding, a PartitionSpec (on the mesh of `jax.set_mesh`), or None for a replicated parameter. For a
            single device, every leaf is the same SingleDeviceSharding. By default the shardings are those of the
            parameters, if these are arrays or shapes with a NamedSharding.

    Returns:
        A tree of `jax.ShapeDtypeStruct` like `tx.init(params)`. Orbax restores into it, and `jax.jit(f).lower` takes
        it. Each `.sharding` can be used in `out_shardings` and in `jax.device_put`. It is None if no parameter has a
        known sharding.

    Raises:
        TypeError: `shardings` holds something else, `tx` is not a transform, or the parameters have random keys, as a
            model has.
        ValueError: `shardings` has another structure than the parameters, has no mesh or several, or does not fit the
            mesh and the shapes.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))  # no devices are needed
    >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 768), jnp.float32)}
    >>> state = fse.abstract_state(fse.lion8bit(1e-3), shapes, shardings={"kernel": NamedSharding(mesh, P("fsdp"))})
    >>> codes, scales = state[0].mu["kernel"], state[0].mu_absmax["kernel"]
    >>> codes.shape, str(codes.dtype), tuple(codes.sharding.spec)
    ((1024, 768), 'int8', ('fsdp', None))
    >>> scales.shape, tuple(scales.sharding.spec), tuple(state[0].count.sharding.spec)
    ((8, 768), ('fsdp', None), ())
    """
    check_transform(tx)
    check_params(params)
    placed = placed_by_path(shardings, params)
    token = REMEMBERED.set({path: x.sharding for path, x in placed.items()})
    try:
        return state_shapes(tx, params, placed)
    finally:
        REMEMBERED.reset(token)


def state_shapes(tx: optax.GradientTransformation, params: Params, placed: Mapping[str, Placed]) -> Any:
    """Does what `abstract_state` does, without telling the transform how parameters are sharded."""
    by_path = {path: x.sharding for path, x in placed.items()}
    if not by_path:
        return jax.eval_shape(tx.init, params)
    common = _common_placement(list(by_path.values()))
    layout = _from_types(tx, params, by_path, common) or _from_paths(tx, params, by_path, common)
    state, avals, shardings = layout
    leaves, tree = jax.tree.flatten(state)
    in_host = [aval.memory_space == jax.memory.Space.Host for aval in avals]
    shardings = [s.with_memory_kind("pinned_host") if host else s for s, host in zip(shardings, in_host)]
    return tree.unflatten(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, shardings))


# The state's shapes as a tree, and the JAX types and the shardings of its leaves.
Layout = tuple[Any, list[Any], list[Sharding]]


def _from_types(tx: Any, params: Params, by_path: dict[str, Sharding], common: Sharding) -> Layout | None:
    """Returns the layout that JAX's types infer, or None if `init` does something that types do not support.

    On a mesh with Explicit axes, the type of an array contains its sharding, and every operation propagates it.
    """
    mesh = common.mesh if isinstance(common, NamedSharding) else AbstractMesh((), ())
    typed = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh  # it knows the kind of devices if `mesh` does
    typed = typed.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def typed_like(sharding: Sharding | None) -> NamedSharding:
        return NamedSharding(typed, sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec())

    shapes = _shapes(params, lambda path: typed_like(by_path.get(path)))
    try:
        with jax.sharding.use_abstract_mesh(typed):
            jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    except Exception:  # of any kind; an error that is not about types is raised again by `_from_paths`
        return None
    named = isinstance(common, NamedSharding)
    return state, jaxpr.out_avals, [NamedSharding(mesh, x.sharding.spec) if named else common for x in jaxpr.out_avals]


def _from_paths(tx: Any, params: Params, by_path: dict[str, Sharding], common: Sharding) -> Layout:
    """Returns the layout in which arrays are sharded like the parameter whose path their own path ends with.

    Axes that are not divisible, and all other arrays, are replicated.
    """

    def placed(path, x):
        name = f"/{path_name(path)}"
        own = next((sharding for of, sharding in by_path.items() if name.endswith(f"/{of}")), None)
        if not isinstance(common, NamedSharding):
            return common
        if not isinstance(own, NamedSharding) or len(own.spec) > x.ndim:
            return NamedSharding(common.mesh, PartitionSpec())
        return where_it_divides(own, x.shape)

    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(_shapes(params, lambda path: None))
    return state, jaxpr.out_avals, [placed(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def _shapes(params: Params, sharding_of: Callable[[str], NamedSharding | None]) -> Any:
    """Returns the parameters as ShapeDtypeStructs with shardings, in their wrappers."""

    def shape(path, box):
        x = unbox(box)
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return box
        return rebox(box, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(path_name(path))))

    return jax.tree_util.tree_map_with_path(shape, params, is_leaf=is_box)


def _common_placement(shardings: list[Sharding]) -> Sharding:
    """Returns one of the shardings, to know the mesh or device that all share.

    Raises:
        TypeError: Several devices, but not by NamedShardings.
        ValueError: The shardings have different meshes or devices.
    """
    first = shardings[0]
    named = isinstance(first, NamedSharding)
    if not named and len(first.device_set) > 1:
        raise TypeError(
            f"`shardings` must be NamedShardings if there is more than one device, got {first!r:.80}. Make them with "
            "jax.sharding.NamedSharding(mesh, spec)."
        )
    for other in shardings[1:]:
        if not (isinstance(other, NamedSharding) and other.mesh == first.mesh if named else other == first):
            raise ValueError(
                f"`shardings` must all be on one mesh, got {first!r:.80} and {other!r:.80}. Make them on the same mesh."
            )
    return first
