"""The state that an optimizer would make, as shapes with shardings: to restore into, to place by, to compile for."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding

from ._boxes import is_box, rebox, unbox
from ._rules import path_name
from ._shardings import placed_by_path


def abstract_state(tx: optax.GradientTransformation, params: Any, *, shardings: Any = None) -> Any:
    """`jax.eval_shape(tx.init, params)` with the sharding of every array, and nothing allocated.

    Whatever `tx.init` makes in the likeness of a parameter is cut as the parameter is; so are the scales of 8-bit
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
    known = {path: placed.sharding for path, placed in placed_by_path(shardings, params).items()}
    if not known:
        return jax.eval_shape(tx.init, params)
    where = _where(list(known.values()))
    mesh = where.mesh if isinstance(where, NamedSharding) else AbstractMesh((), ())
    # Types of Explicit axes say how an array is cut, and JAX infers them through whatever an `init` does.
    typed = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def shape(path, box):
        x, sharding = unbox(box), known.get(path_name(path))
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return box
        spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
        return rebox(box, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(typed, spec)))

    def placed(x, aval):
        kind = "pinned_host" if aval.memory_space == jax.memory.Space.Host else None
        sharding = NamedSharding(mesh, aval.sharding.spec) if isinstance(where, NamedSharding) else where
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.with_memory_kind(kind) if kind else sharding)

    shapes = jax.tree_util.tree_map_with_path(shape, params, is_leaf=is_box)
    with jax.sharding.use_abstract_mesh(typed):
        jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    leaves, tree = jax.tree.flatten(state)
    return tree.unflatten(map(placed, leaves, jaxpr.out_avals))


def _where(shardings: list[Sharding]) -> Sharding:
    """One of them, for the mesh or the device that they share."""
    first = shardings[0]
    named = isinstance(first, NamedSharding)
    if not named and len(first.device_set) > 1:
        raise TypeError(f"`shardings` must be NamedShardings where there is more than one device, got {first!r:.80}.")
    for other in shardings[1:]:
        if not (isinstance(other, NamedSharding) and other.mesh == first.mesh if named else other == first):
            raise ValueError(f"`shardings` must be of one mesh, got {first!r:.80} and {other!r:.80}.")
    return first
