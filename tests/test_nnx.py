"""Tests the NNX modules: equality with nnx.Embed, and metadata and from_pretrained, which only NNX has."""

import inspect
import pickle

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx.nn.linear import default_embed_init
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed import linen, nnx

IDS = np.array([[1, 0, 3, 3], [6, -1, 7, -9]], np.int32)  # 7 and -9 are outside a table of 7 rows
both_modules = pytest.mark.parametrize("module", [nnx.Embed, nnx.StableEmbed], ids=lambda module: module.__name__)


def rngs(seed=0):
    return flax.nnx.Rngs(seed)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))  # numpy has no bfloat16 NaN


@pytest.mark.parametrize("dtypes", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
@pytest.mark.parametrize("rows", [7, 1])
@pytest.mark.one_in(4)
def test_embed_with_flax_initializer_equals_flax_embed_bit_for_bit(rows, dtypes):
    ours = nnx.Embed(rows, 4, **dtypes, embedding_init=default_embed_init, rngs=rngs())
    flax_embed = flax.nnx.Embed(rows, 4, **dtypes, rngs=rngs())
    assert_same_bits(ours.embedding[...], flax_embed.embedding[...])
    for ids in (IDS, IDS[0], IDS[:, :0], IDS.astype(np.int8)):
        assert_same_bits(ours(ids), flax_embed(ids))
    query = jnp.ones((3, 4))
    assert_same_bits(ours.attend(query), flax_embed.attend(query))


@both_modules
def test_modules_subclass_nnx_embed_and_accept_all_its_arguments(module):
    assert issubclass(module, flax.nnx.Embed) and fse.nnx is nnx
    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (flax.nnx.Embed, module))
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
    added = ["padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "lookup", "mode", "write_back"]
    assert [name for name in ours if name not in theirs] == added + ["norm_epsilon"] * (module is nnx.StableEmbed)
    for name in ours:
        in_linen = inspect.signature(getattr(linen, module.__name__)).parameters.get(name)
        if in_linen is not None and name not in ("promote_dtype", "self"):
            assert ours[name].default == in_linen.default, name


@both_modules
def test_modules_draw_as_many_keys_as_flax_embed(module):
    used = rngs()
    module(7, 4, rngs=used)
    assert used.params.count[...] == 1


@both_modules
def test_wrong_ids_and_options_raise(module):
    embed = module(7, 4, rngs=rngs())
    with pytest.raises(ValueError, match=r"^Input type must be an integer or unsigned integer\. Got float32"):
        embed(jnp.ones(3))
    with pytest.raises(TypeError, match="`inputs` must be an array of integer ids"):
        embed([1, 2])
    for option in ({"padding_idx": -8}, {"max_norm": -1.0}, {"norm_type": -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}`"):
            module(7, 4, **option, rngs=rngs())
    with pytest.raises(ValueError, match="scale_grad_by_freq=True` does not work with a sparse gradient"):
        module(7, 4, sparse=True, scale_grad_by_freq=True, rngs=rngs())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("how", ["metadata", "initializer"])
@pytest.mark.one_in(4)
def test_the_padding_row_is_zeroed_in_a_sharded_table(how, kind):
    ones = flax.nnx.initializers.ones
    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))):
        options = {
            "metadata": {"embedding_init": ones, "embedding_metadata": {"out_sharding": ("a", "b")}},
            "initializer": {"embedding_init": flax.nnx.with_partitioning(ones, ("a", "b"))},
        }[how]
        embed = nnx.StableEmbed(8, 16, padding_idx=-8, **options, rngs=rngs())
        assert embed.embedding.get_metadata()["out_sharding"] == ("a", "b")
        assert embed.embedding[...].sharding.spec == P("a", "b")
        table = np.asarray(embed.embedding[...])
        np.testing.assert_array_equal(table, [[0.0] * 16] + [[1.0] * 16] * 7)

        embed.reset_parameters(rngs(1))
        assert embed.embedding[...].sharding.spec == P("a", "b")
        table = np.asarray(embed.embedding[...])
        np.testing.assert_array_equal(~np.any(table, axis=1), [True] + [False] * 7)


@both_modules
def test_from_pretrained_keeps_the_table_its_dtype_and_its_padding_row(module):
    table = np.arange(12, dtype=np.float16).reshape(4, 3) + 1
    embed = module.from_pretrained(table, padding_idx=-4, max_norm=99.0, rngs=rngs())
    assert type(embed) is module and (embed.num_embeddings, embed.features, embed.padding_idx) == (4, 3, 0)
    assert embed.embedding.dtype == embed.param_dtype == np.float16
    np.testing.assert_array_equal(embed.embedding[...], table)
    again = module.from_pretrained(table.tolist(), param_dtype=jnp.bfloat16, rngs=rngs())
    assert again.embedding.dtype == jnp.bfloat16
    boxed = flax.nnx.with_metadata(linen.pretrained(table), note="mine")
    np.testing.assert_array_equal(module(4, 3, padding_idx=0, embedding_init=boxed, rngs=rngs()).embedding[...], table)


def test_from_pretrained_raises_unless_the_table_has_two_axes():
    with pytest.raises(ValueError, match=r"`table` must have shape \(num_embeddings, features\), got \(3,\)"):
        nnx.Embed.from_pretrained(np.ones(3), rngs=rngs())


def test_from_pretrained_does_not_store_a_second_copy_of_the_table():
    embed = nnx.Embed.from_pretrained(np.ones((100, 100), np.float32), rngs=rngs())
    graph, _ = flax.nnx.split(embed)
    assert len(pickle.dumps(graph)) < 10_000


@both_modules
def test_reset_parameters_draws_xavier_uniform_in_place(module):
    embed = module.from_pretrained(np.full((400, 100), 9, np.float16), padding_idx=1, rngs=rngs())
    parameter = embed.embedding
    if module is nnx.StableEmbed:
        embed.norm.bias[...] = jnp.ones(100)
    embed.reset_parameters(rngs(5))
    assert embed.embedding is parameter and parameter.dtype == jnp.float16
    table = np.asarray(parameter[...], np.float32)
    bound = np.sqrt(6 / 500)
    assert bound * 0.99 < np.abs(table).max() <= bound * 1.001
    np.testing.assert_array_equal(np.flatnonzero(~np.any(table, axis=1)), [1])
    if module is nnx.StableEmbed:
        np.testing.assert_array_equal(embed.norm.bias[...], np.ones(100))
    fresh = module(400, 100, param_dtype=jnp.float16, padding_idx=1, rngs=rngs(5))
    np.testing.assert_array_equal(parameter[...], fresh.embedding[...])


def test_reset_parameters_works_inside_jit():
    embed = nnx.StableEmbed(7, 4, padding_idx=0, rngs=rngs())
    before = np.asarray(embed.embedding[...])
    flax.nnx.jit(lambda module, rngs: module.reset_parameters(rngs))(embed, rngs(1))
    assert not np.array_equal(embed.embedding[...], before)
    np.testing.assert_array_equal(embed.embedding[0], np.zeros(4))


def test_the_norm_is_part_of_the_module_and_can_be_replaced():
    embed = nnx.StableEmbed(7, 4, norm_epsilon=1e-3, rngs=rngs())
    rows = embed.embedding[...][IDS[0]]
    np.testing.assert_array_equal(embed(IDS[0]), embed.norm(rows))
    embed.norm = flax.nnx.LayerNorm(4, epsilon=1e-3, use_fast_variance=False, rngs=rngs())
    np.testing.assert_allclose(embed(IDS[0]), embed.norm(rows), rtol=1e-6)


@both_modules
def test_a_custom_promote_dtype_is_used(module):
    def to_float16(arrays, /, *, dtype, inexact=True):
        return tuple(array.astype(jnp.float16) for array in arrays)

    assert module(7, 4, promote_dtype=to_float16, rngs=rngs())(IDS).dtype == jnp.float16


def test_out_sharding_places_rows_under_an_explicit_mesh_and_is_ignored_elsewhere():
    embed = nnx.StableEmbed(8, 16, rngs=rngs())
    expected = embed(np.arange(8), out_sharding=P("a"))
    for kind in (AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))):
            metadata = {"out_sharding": ("a", "b")}
            sharded = nnx.StableEmbed(8, 16, embedding_metadata=metadata, rngs=rngs())
            rows = sharded(np.arange(8), out_sharding=P("b", None))
            assert kind == AxisType.Auto or rows.sharding.spec == P("b", None)
            np.testing.assert_allclose(np.asarray(rows), expected, rtol=1e-6, atol=1e-6)
