"""Tests the Linen modules: equality with Flax's nn.Embed, and boxes, fields and collections, which only Linen has."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed import linen

IDS = np.array([[1, 0, 3, 3], [6, -1, 7, -9]], np.int32)  # 7 and -9 are outside a table of 7 rows
both_modules = pytest.mark.parametrize("module", [linen.Embed, linen.StableEmbed], ids=lambda module: module.__name__)


def apply(module, table, ids):
    params = {"embedding": table}
    if isinstance(module, linen.StableEmbed):
        params["norm"] = {"scale": jnp.ones(module.features), "bias": jnp.zeros(module.features)}
    return module.apply({"params": params}, ids)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))  # numpy has no bfloat16 NaN


# --- a drop-in for nn.Embed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
@pytest.mark.parametrize("rows", [7, 1])
@pytest.mark.one_in(10)
def test_embed_with_flax_initializer_equals_flax_embed_bit_for_bit(rows, dtypes):
    ours = linen.Embed(rows, 4, **dtypes, embedding_init=nn.linear.default_embed_init)
    flax = nn.Embed(rows, 4, **dtypes)
    params = flax.init(jax.random.key(0), IDS)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), IDS), params)
    for ids in (IDS, IDS[0], IDS[:, :0], IDS.astype(np.int8)):
        assert_same_bits(ours.apply(params, ids), flax.apply(params, ids))
    query = jnp.ones((3, 4))
    assert_same_bits(*(module.apply(params, query, method="attend") for module in (ours, flax)))


def test_the_gradient_equals_that_of_flax_embed_bit_for_bit():
    ours, flax = linen.Embed(7, 4), nn.Embed(7, 4)
    params = flax.init(jax.random.key(0), IDS)
    weights = jax.random.normal(jax.random.key(1), (*IDS.shape, 4))

    def gradient(module):
        return jax.jit(jax.grad(lambda params: jnp.nansum(weights * module.apply(params, IDS) ** 2)))(params)

    jax.tree.map(np.testing.assert_array_equal, gradient(ours), gradient(flax))


@both_modules
def test_modules_subclass_nn_embed_and_keep_its_positional_arguments(module):
    assert issubclass(module, nn.Embed) and fse.linen is linen
    positional = {
        cls: [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for cls in (nn.Embed, module)
    }
    assert positional[module] == positional[nn.Embed]
    keyword_only = [p.name for p in inspect.signature(module).parameters.values() if p.kind is p.KEYWORD_ONLY]
    torch_options = ["padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "lookup", "mode"]
    assert keyword_only == torch_options + ["norm_epsilon"] * (module is linen.StableEmbed)


@both_modules
@pytest.mark.one_in(4)
def test_modules_can_be_subclassed_and_used_inside_other_modules(module):
    class Scaled(module):
        def __call__(self, inputs):
            return super().__call__(inputs) * 2

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = Scaled(7, 4, padding_idx=0, name="wte")
            return embed.attend(nn.Dense(4)(embed(ids)))

    params = Model().init(jax.random.key(0), IDS[:1])["params"]
    assert params["wte"]["embedding"].shape == (7, 4)
    assert Model().apply({"params": params}, IDS[:1]).shape == (1, 4, 7)


def test_parameters_of_nn_embed_can_be_put_into_stable_embed():
    params = nn.Embed(7, 4).init(jax.random.key(0), IDS)["params"]
    stable = linen.StableEmbed(7, 4)
    own = stable.init(jax.random.key(1), IDS)["params"]
    assert stable.apply({"params": {**own, **params}}, IDS).shape == (2, 4, 4)


@both_modules
def test_wrong_ids_and_options_raise(module):
    params = module(7, 4).init(jax.random.key(0), IDS)
    with pytest.raises(ValueError, match=r"^Input type must be an integer or unsigned integer\. Got float32"):
        module(7, 4).apply(params, jnp.ones(3))
    with pytest.raises(TypeError, match="`inputs` must be an array of integer ids"):
        module(7, 4).apply(params, [1, 2])
    for option in ({"padding_idx": 7}, {"max_norm": 0.0}, {"norm_type": -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}`"):
            module(7, 4, **option)
    with pytest.raises(ValueError, match="scale_grad_by_freq=True` does not work with a sparse gradient"):
        module(7, 4, sparse=True, scale_grad_by_freq=True)


# --- the table -------------------------------------------------------------------------------------------------------


@both_modules
def test_the_table_starts_xavier_uniform_with_a_zero_padding_row(module):
    table = module(400, 100, padding_idx=-2).init(jax.random.key(0), IDS)["params"]["embedding"]
    bound = np.sqrt(6 / 500)
    assert bound * 0.99 < np.abs(table).max() <= bound
    np.testing.assert_array_equal(np.flatnonzero(~np.any(table, axis=1)), [398])
    assert module(400, 100, padding_idx=-2).padding_idx == 398


def boxes():
    return {
        "partitioning": (lambda init: nn.with_partitioning(init, ("a", "b")), nn.Partitioned),
        "logical": (lambda init: nn.with_logical_partitioning(init, ("vocab", "embed")), nn.LogicallyPartitioned),
    }


@pytest.mark.parametrize("box", boxes())
@pytest.mark.parametrize("under_mesh", [False, True])
def test_the_padding_row_is_zeroed_inside_flax_boxes(box, under_mesh):
    wrap, kind = boxes()[box]
    module = linen.StableEmbed(8, 16, padding_idx=1, embedding_init=wrap(nn.initializers.ones))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    with nn.logical_axis_rules([("vocab", "a"), ("embed", "b")]):
        if under_mesh:
            with jax.set_mesh(mesh):
                params = jax.jit(module.init)(jax.random.key(0), IDS)["params"]
        else:
            params = module.init(jax.random.key(0), IDS)["params"]
    assert isinstance(params["embedding"], kind)
    expected = np.ones((8, 16))
    expected[1] = 0
    np.testing.assert_array_equal(nn.unbox(params)["embedding"], expected)


@pytest.mark.parametrize("wrap", [lambda init: init, *(wrap for wrap, _ in boxes().values())])
def test_a_pretrained_table_keeps_its_padding_row(wrap):
    table = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
    module = linen.Embed(4, 3, padding_idx=0, embedding_init=wrap(linen.pretrained(table)))
    params = nn.unbox(module.init(jax.random.key(0), IDS))["params"]
    np.testing.assert_array_equal(params["embedding"], table)
    gradient = jax.grad(lambda params: module.apply({"params": params}, jnp.array([0, 1])).sum())(params)
    np.testing.assert_array_equal(gradient["embedding"], [[0] * 3, [1] * 3, [0] * 3, [0] * 3])


def test_a_pretrained_table_of_another_shape_raises():
    module = linen.StableEmbed(4, 3, embedding_init=linen.pretrained(np.ones((5, 3))))
    with pytest.raises(ValueError, match=r"`table` has shape \(5, 3\), but the module needs \(4, 3\)"):
        module.init(jax.random.key(0), IDS)


@both_modules
def test_an_empty_vocabulary_works(module):
    empty = module(0, 4)
    params = empty.init(jax.random.key(0), np.zeros((2, 0), np.int32))
    assert empty.apply(params, np.zeros((2, 0), np.int32)).shape == (2, 0, 4)
    assert np.isnan(empty.apply(params, np.array([0]))).all()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_token_that_appears_65536_times_gets_that_gradient_in_bfloat16_compute():
    module = linen.Embed(3, 2, dtype=jnp.bfloat16)
    ids = np.zeros(65536, np.int32)

    def gradient(module):
        def loss(table):
            return apply(module, table, ids).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss))(jnp.ones((3, 2)))[0, 0]

    assert gradient(module) == 65536
    assert gradient(nn.Embed(3, 2, dtype=jnp.bfloat16)) == 256, "Flax sums in float32 now: change the docs"


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.one_in(4)
def test_stable_embed_normalizes_in_float32_and_casts_once(param_dtype, dtype):
    table = (jax.random.normal(jax.random.key(0), (7, 32)) * 0.01).astype(param_dtype)
    found = apply(linen.StableEmbed(7, 32, dtype, param_dtype), table, IDS[:1])
    x = np.asarray(table, np.float64)[IDS[:1]]
    x = x - x.mean(axis=-1, keepdims=True)
    expected = jnp.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5), jnp.float32)
    assert found.dtype == (dtype or param_dtype)
    # A float32 result next to a midpoint of the narrower dtype may be rounded the other way.
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected, rtol=float(jnp.finfo(found.dtype).eps) / 2, atol=2e-6
    )


def test_a_padding_token_gives_the_bias_of_the_norm():
    module = linen.StableEmbed(7, 4, padding_idx=2)
    params = module.init(jax.random.key(0), IDS)["params"]
    params["norm"]["bias"] = jnp.arange(4.0)
    np.testing.assert_array_equal(module.apply({"params": params}, np.array(2)), np.arange(4))


def test_max_norm_does_not_change_the_stored_table():
    module = linen.Embed(2, 2, max_norm=1.0)
    table = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    rows, changed = module.apply({"params": {"embedding": table}}, np.array([0, 1]), mutable=True)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    np.testing.assert_array_equal(changed["params"]["embedding"], table)


@both_modules
def test_a_custom_promote_dtype_is_used(module):
    def to_float16(*arrays, dtype, inexact=True):
        return [array.astype(jnp.float16) for array in arrays]

    assert apply(module(7, 4, promote_dtype=to_float16), jnp.ones((7, 4)), IDS).dtype == jnp.float16


@pytest.mark.slow
@both_modules
def test_float64_works_under_x64(module):
    with jax.enable_x64(True):
        embed = module(7, 4, param_dtype=jnp.float64, padding_idx=0, max_norm=0.5, scale_grad_by_freq=True)
        params = embed.init(jax.random.key(0), IDS)
        ids = jnp.asarray([1, 2, -1, 2**40], jnp.int64)
        y, gradient = jax.value_and_grad(lambda params: jnp.nansum(embed.apply(params, ids)))(params)
        assert {a.dtype for a in jax.tree.leaves((y, params, gradient))} == {np.dtype("float64")}
        assert np.isnan(embed.apply(params, ids)[-1]).all()


def test_out_sharding_places_rows_and_logits_under_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    module = linen.Embed(8, 16)
    with jax.set_mesh(mesh):
        params = {"params": {"embedding": jax.device_put(jnp.ones((8, 16)), P("a", "b"))}}
        query = jax.device_put(jnp.ones((4, 16)), P("a", None))  # without out_sharding: logits twice along "a"
        logits = module.apply(params, query, out_sharding=P("a", None), method="attend")
        rows = module.apply(params, np.arange(8), out_sharding=P("b", None))
        assert (logits.sharding.spec, rows.sharding.spec) == (P("a", None), P("b", None))
