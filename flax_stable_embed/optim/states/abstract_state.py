"""The state that an optimizer would make, as shapes with shardings: to restore into, to place by, to compile for."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ...ops.sharding import where_it_divides
from ..boxes import is_box, rebox, unbox
from ..placement import placed_by_path
from ..trees import path_name


def abstract_state(tx: optax.GradientTransformation, params: Any, *, shardings: Any = None) -> Any:
    """`jax.eval_shape(tx.init, params)` with the sharding of every array, and nothing allocated.

    Whatever `tx.init` makes in the likeness of a parameter is cut as the parameter is (by JAX's types; where an `init`
    does what these do not follow, say `optax.flatten`'s, by paths that end as the parameter's); so are scales of 8-bit
    moments, but for axes that their number of blocks does not divide. All else, such as counts, is whole on every
    device. Moments in the host's memory (`fse.Rule(memory_kind="pinned_host")`) have it in their sharding. For every
    transform of optax, alone or wrapped, and for NNX variables and Linen boxes.

    Args:
        tx: any transform.
        params: the parameters, or their shapes (`jax.eval_shape`).
        shardings: how the parameters are cut, a tree like them of PartitionSpec (of the mesh in `jax.set_mesh`) or
            NamedSharding, None for what is whole; SingleDeviceSharding, the same for all, for a single device. By
            default as they lie, where they are arrays or shapes with a NamedSharding.

    Returns:
        A tree like `tx.init(params)` of `jax.ShapeDtypeStruct`: what orbax restores into, and `jax.jit(f).lower` takes.
        Their `.sharding` is for `out_shardings` and `jax.device_put`; None where that of no parameter is known.

    Raises:
        TypeError: `shardings` holds something else.
        ValueError: it is no tree like the parameters, has no mesh or several, or does not fit mesh and shapes.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))  # of devices that nobody has
    >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 768), jnp.float32)}
    >>> state = fse.abstract_state(fse.lion8bit(1e-3), shapes, shardings={"kernel": NamedSharding(mesh, P("fsdp"))})
    >>> codes, scales = state[0].mu["kernel"], state[0].mu_absmax["kernel"]
    >>> codes.shape, str(codes.dtype), codes.sharding.spec
    ((1024, 768), 'int8', P('fsdp', None))
    >>> scales.shape, scales.sharding.spec, state[0].count.sharding.spec
    ((8, 768), P('fsdp', None), P())
    """
    sharding_of = {path: placed.sharding for path, placed in placed_by_path(shardings, params).items()}
    if not sharding_of:
        return jax.eval_shape(tx.init, params)
    common = _common_placement(list(sharding_of.values()))
    state, avals, shardings = _from_types(tx, params, sharding_of, common) or _from_paths(
        tx, params, sharding_of, common
    )
    leaves, tree = jax.tree.flatten(state)
    in_host = [aval.memory_space == jax.memory.Space.Host for aval in avals]
    shardings = [s.with_memory_kind("pinned_host") if host else s for s, host in zip(shardings, in_host)]
    return tree.unflatten(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, shardings))


Layout = tuple[Any, list[Any], list[Sharding]]  # the state's shapes, and what JAX and we know of each


def _from_types(tx: Any, params: Any, sharding_of: dict[str, Sharding], common: Sharding) -> Layout | None:
    """As JAX infers them; None where an `init` does what it does not follow.

    Types of Explicit axes say how an array is cut, through whatever is done with it.
    """
    mesh = common.mesh if isinstance(common, NamedSharding) else AbstractMesh((), ())
    typed = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh  # knows the kind of its devices, where there are any
    typed = typed.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def typed_like(sharding: Sharding | None) -> NamedSharding:
        return NamedSharding(typed, sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec())

    shapes = _shapes(params, lambda path: typed_like(sharding_of.get(path)))
    try:
        with jax.sharding.use_abstract_mesh(typed):
            jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    except Exception:  # of any kind; one that is not of types comes again
        return None
    named = isinstance(common, NamedSharding)
    return state, jaxpr.out_avals, [NamedSharding(mesh, x.sharding.spec) if named else common for x in jaxpr.out_avals]


def _from_paths(tx: Any, params: Any, sharding_of: dict[str, Sharding], common: Sharding) -> Layout:
    """The same, where an array at a path that ends as a parameter's is cut like it if it divides; all else is whole."""

    def placed(path, x):
        name = f"/{path_name(path)}"
        own = next((sharding for of, sharding in sharding_of.items() if name.endswith(f"/{of}")), None)
        if not isinstance(common, NamedSharding):
            return common
        if not isinstance(own, NamedSharding) or len(own.spec) > x.ndim:
            return NamedSharding(common.mesh, PartitionSpec())
        return where_it_divides(own, x.shape)

    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(_shapes(params, lambda path: None))
    return state, jaxpr.out_avals, [placed(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def _shapes(params: Any, sharding_of: Callable[[str], NamedSharding | None]) -> Any:
    """Parameters as shapes with shardings, in their wrappers."""

    def shape(path, box):
        x = unbox(box)
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return box
        return rebox(box, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(path_name(path))))

    return jax.tree_util.tree_map_with_path(shape, params, is_leaf=is_box)


def _common_placement(shardings: list[Sharding]) -> Sharding:
    """One of them, for the mesh or the device that they share."""
    first = shardings[0]
    named = isinstance(first, NamedSharding)
    if not named and len(first.device_set) > 1:
        raise TypeError(f"`shardings` must be NamedShardings where there is more than one device, got {first!r:.80}.")
    for other in shardings[1:]:
        if not (isinstance(other, NamedSharding) and other.mesh == first.mesh if named else other == first):
            raise ValueError(f"`shardings` must be of one mesh, got {first!r:.80} and {other!r:.80}.")
    return first
