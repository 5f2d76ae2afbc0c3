"""Tests the sharding metadata of scales in the wrappers of NNX and Linen, with and without a known mesh."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed.optim.boxes import unbox
from tests.tools import may_straddle

TX = fse.scale_by_adam8bit(state_format=fse.StateFormat(min_size=0))


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)


def names_of(leaf):
    return leaf.get_metadata()["out_sharding"] if isinstance(leaf, nnx.Variable) else leaf.names


def boxed(value, names, box):
    if box == "nnx":
        return nnx.Param(value, out_sharding=names, eager_sharding=False)
    return meta.Partitioned(value, names)


@pytest.mark.parametrize("box", ["nnx", "linen"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x", None), ("x", None)),  # an axis that is not blocked has the parameter's size
        ((None, "x"), (None, "x")),  # 8 blocks and shards=8
        (("x", "y"), ("x", "y")),
        (("x",), ("x",)),
        ((None, ("x", "y")), (None, ("x", "y"))),
        ((), ()),
    ],
)
def test_without_a_mesh_names_stay_if_shards_divides_the_number_of_blocks(box, names, expected):
    param = boxed(jax.ShapeDtypeStruct((64, 256), jnp.float32), names, box)
    state = TX.init({"kernel": param})
    assert unbox(state.mu_absmax["kernel"]).shape == (64, 8)
    assert names_of(state.mu["kernel"]) == names
    assert names_of(state.mu_absmax["kernel"]) == names_of(state.nu_absmax["kernel"]) == expected


@pytest.mark.parametrize("box", ["nnx", "linen"])
def test_a_name_whose_axis_may_not_be_divisible_is_dropped(box):
    for shape, names, expected in (
        ((64, 96), ("x", "y"), (None, "y")),  # two blocks along the first axis
        ((7, 96), ("x", "y"), ("x", None)),  # three blocks along the last
        ((96,), ("x",), (None,)),
        ((50257,), ("x",), (None,)),
    ):
        state = TX.init({"kernel": boxed(jax.ShapeDtypeStruct(shape, jnp.float32), names, box)})
        assert names_of(state.mu_absmax["kernel"]) == expected, shape


@pytest.mark.parametrize("box", ["nnx", "linen"])
def test_a_placeholder_has_no_names(box):
    state = TX.init({"embedding": boxed(jax.ShapeDtypeStruct((64, 256), jnp.float32), ("x", "y"), box)})
    assert names_of(state.mu["embedding"]) == ("x", "y")
    assert names_of(state.mu_absmax["embedding"]) == (None, None)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("names", [("a", "b"), P("a", "b"), P(None, "b"), P("b")], ids=str)
@pytest.mark.one_in(4)
def test_on_a_known_mesh_scales_are_sharded_like_their_codes(kind, names):
    with jax.set_mesh(mesh_of(kind)):
        state = TX.init({"kernel": nnx.Param(jnp.ones((64, 256)), out_sharding=names)})
    codes, absmax = state.mu["kernel"], state.mu_absmax["kernel"]
    assert codes.get_value().dtype == jnp.int8
    assert names_of(absmax) == names and type(names_of(absmax)) is type(names)
    assert absmax.get_value().sharding.is_equivalent_to(codes.get_value().sharding, 2)


def test_metadata_can_hold_a_sharding_instead_of_names():
    mesh = mesh_of()
    params = {
        name: nnx.Param(jnp.ones((64, 256)), out_sharding=NamedSharding(mesh, P("a", "b")), eager_sharding=False)
        for name in ("kernel", "embedding")
    }
    state = TX.init(params)
    assert names_of(state.mu_absmax["kernel"]) == NamedSharding(mesh, P("a", "b"))
    assert names_of(state.mu_absmax["embedding"]) == NamedSharding(mesh, P(None, None))


@pytest.mark.parametrize(("size", "count", "expected"), [(128, 3, None), (32, 12, "b")])
@may_straddle
def test_a_known_mesh_takes_precedence_over_shards(size, count, expected):
    """Neither 3 nor 12 blocks can be split over 8 shards, but 12 can be split over the 4 devices of this axis."""
    tx = fse.scale_by_adam8bit(state_format=fse.StateFormat(block_size=size, min_size=0))
    with jax.set_mesh(mesh_of()):
        state = tx.init({"kernel": nnx.Param(jnp.ones((7, 384)), out_sharding=(None, "b"))})
    assert state.mu_absmax["kernel"].get_value().shape == (7, count)
    assert names_of(state.mu_absmax["kernel"]) == (None, expected)


def test_logical_names_depend_on_shards():
    rules = (("mlp", "b"), ("embed", "a"))
    with jax.set_mesh(mesh_of()), nnx.logical_axis_rules(rules):
        state = TX.init({"kernel": nnx.Param(jnp.ones((64, 256)), out_sharding=("embed", "mlp"))})
        assert names_of(state.mu_absmax["kernel"]) == ("embed", "mlp")
        assert state.mu_absmax["kernel"].get_value().sharding.spec == P("a", "b")


def test_nested_boxes_keep_their_structure():
    inner = meta.Partitioned(jnp.ones((64, 256)), ("x", "y"))
    params = {"kernel": meta.Partitioned(inner, ("u", "v"))}
    state = TX.init(params)
    for tree in (state.mu, state.mu_absmax):
        assert isinstance(tree["kernel"].value, meta.Partitioned)
    assert state.mu["kernel"].value.value.dtype == jnp.int8
    updates, after = jax.jit(TX.update)(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_box_without_names_is_kept():
    class Plain(meta.AxisMetadata):
        def __init__(self, content):
            self.content = content

        def unbox(self):
            return self.content

        def replace_boxed(self, val):
            return Plain(val)

        def add_axis(self, index, params):
            return self

        def remove_axis(self, index, params):
            return self

    jax.tree_util.register_pytree_node(Plain, lambda p: ((p.content,), None), lambda _, c: Plain(*c))
    state = TX.init({"kernel": Plain(jnp.ones((64, 256)))})
    assert state.mu["kernel"].unbox().dtype == jnp.int8
    assert state.mu_absmax["kernel"].unbox().shape == (64, 8)
