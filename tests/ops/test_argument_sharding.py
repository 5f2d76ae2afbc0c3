"""Tests which operands of a program show how they are sharded while it is lowered."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_stable_embed.ops.lowering import primitive

FOUND = []


def chosen(program):
    FOUND.extend(program.shardings)
    return lambda x: [x]


probe = primitive("probe", lambda x: [x], choose=chosen)


def shardings_in(function, *args, **options):
    """Returns the shardings that `probe` finds in a program."""
    FOUND.clear()
    jax.jit(lambda *args: function(*args), **options).lower(*args)  # another function: jit keeps programs
    return [x and x.spec for x in FOUND]


def mesh_of(shape=(4, 2), devices=None):
    devices = np.array(jax.devices() if devices is None else devices).reshape(shape)
    return Mesh(devices, ("data", "b")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def array(spec, mesh=None, dtype=jnp.float32):
    return jax.device_put(jnp.ones((16, 16), dtype), NamedSharding(mesh or mesh_of(), spec))


def probed(x):
    return probe.bind(x)[0]


@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "b"), P("b", "data"), P(("data", "b")), P(None, ("b", "data")), P()]
)
def test_an_argument_shows_its_sharding(spec):
    (found,) = shardings_in(probed, array(spec))
    assert NamedSharding(mesh_of(), found).is_equivalent_to(NamedSharding(mesh_of(), spec), 2)
    mesh = FOUND[0].mesh
    assert dict(mesh.shape) == {"data": 4, "b": 2} and mesh.axis_types == (AxisType.Auto,) * 2


def test_the_order_of_devices_does_not_matter():
    assert shardings_in(probed, array(P("data", "b"), mesh_of(devices=jax.devices()[::-1]))) == [P("data", "b")]


def test_meshes_of_one_program_may_differ():
    one, other = array(P("data", "b")), array(P("data"), mesh_of((8,)))
    assert shardings_in(lambda x, y: (probed(x), probed(y)), one, other) == [P("data", "b"), P("data", None)]
    assert [dict(x.mesh.shape) for x in FOUND] == [{"data": 4, "b": 2}, {"data": 8}]


THROUGH = {
    "a cast": lambda x: x.astype(jnp.bfloat16),
    "a barrier": lambda x: jax.lax.optimization_barrier((jnp.zeros(3), x))[1],
    "a constraint": lambda x: jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh_of(), P("data"))),
}
NOT_THROUGH = {
    "a sum": lambda x: x + 1,
    "a function of its own": jax.jit(lambda x: x * 1.0),
}


@pytest.mark.parametrize("name", THROUGH)
def test_operations_that_keep_a_sharding_are_followed(name):
    assert shardings_in(lambda x: probed(THROUGH[name](x)), array(P("data"))) == [P("data", None)]


@pytest.mark.parametrize("name", NOT_THROUGH)
def test_a_result_of_arithmetic_has_no_known_sharding(name):
    assert shardings_in(lambda x: probed(NOT_THROUGH[name](x)), array(P("data"))) == [None]


def test_functions_of_their_own_do_not_see_the_arguments():
    x = array(P("data"))
    scanned = partial(jax.lax.scan, lambda c, _: (probed(c), None), length=2, xs=None)
    for function in (jax.jit(probed), lambda x: jax.lax.cond(x[0, 0] > 0, probed, jnp.sin, x), scanned):
        assert set(shardings_in(function, x)) == {None}, function


def test_shapes_and_in_shardings_are_arguments_too():
    sharding = NamedSharding(mesh_of(), P("data"))
    assert shardings_in(probed, jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=sharding)) == [P("data", None)]
    assert shardings_in(probed, jnp.ones((16, 16)), in_shardings=sharding) == [P("data", None)]


def test_one_device_has_no_shardings():
    assert shardings_in(probed, jnp.ones((16, 16))) == []


def test_an_uncommitted_array_has_no_known_sharding():
    assert shardings_in(lambda x, y: (probed(x), y), jnp.ones((16, 16)), array(P("data"))) == [None]


def test_a_moment_in_host_memory_is_followed():
    host = jax.device_put(array(P("data")), NamedSharding(mesh_of(), P("data"), memory_kind="pinned_host"))
    on_device = NamedSharding(mesh_of(), P("data"), memory_kind="device")
    assert shardings_in(lambda x: probed(jax.device_put(x, on_device)), host) == [P("data", None)]
    assert shardings_in(lambda x: probed(jax.device_put(x, jax.memory.Space.Device)), host) == [P("data", None)]


def test_a_slice_keeps_a_sharding_that_still_divides_it():
    x = array(P("data"))
    assert shardings_in(lambda x: probed(x[:, :-1]), x) == [P("data", None)]
    assert shardings_in(lambda x: probed(x[:-1]), x) == [None]
