"""Tests that row gradients equal the rows of the gradients of `jax.value_and_grad`, whatever is around the lookup."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from flax_stable_embed.optim.trees import path_name

V, D = 50, 8
IDS = jnp.array([[1, 4, 4, 3], [49, -1, 1, 7]])


def is_rows(x):
    return isinstance(x, fse.SparseRows)


def dense(grads):
    return jax.tree.map(lambda x: x.to_dense() if is_rows(x) else x, grads, is_leaf=is_rows)


def assert_same(grads, want, tables):
    """Asserts that gradients are those of JAX, and that exactly `tables` have row gradients."""
    pairs = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_rows)[0]
    assert {path_name(path) for path, x in pairs if is_rows(x)} == set(tables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), dense(grads), want)


class Model(nn.Module):
    """Two lookups of one sparse table, one of another, and positions with a dense gradient."""

    dtype: object = None
    param_dtype: object = jnp.float32

    def setup(self):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.tokens = fse.linen.StableEmbed(V, D, padding_idx=3, sparse=True, **options)
        self.users = fse.linen.Embed(V, D, max_norm=0.5, sparse=True, **options)
        self.positions = fse.linen.Embed(8, D, **options)

    def __call__(self, ids):
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1]))[None]
        return x * self.tokens(ids[:, ::-1]) + self.users(ids + 1)


def params_and_loss(model=None, **options):
    model = model or Model(**options)
    params = model.init(jax.random.key(0), IDS)["params"]
    return params, lambda params, ids: jnp.sum(model.apply({"params": params}, ids).astype(jnp.float32) ** 2)


TABLES = {"tokens/embedding", "users/embedding"}


EAGER, JIT = (lambda f: f), jax.jit


@pytest.mark.parametrize(
    ("jit", "ids"),
    [(JIT, IDS), (JIT, IDS[:, :0]), (JIT, IDS.astype(jnp.int8)), pytest.param(EAGER, IDS[:1], marks=pytest.mark.slow)],
    ids=["jit", "empty", "int8", "eager"],
)
@pytest.mark.one_in(5)
def test_a_linen_model_has_the_gradients_of_jax(jit, ids):
    params, loss = params_and_loss()
    value, grads = jit(fse.row_value_and_grad(loss))(params, ids)
    want_value, want = jax.jit(jax.value_and_grad(loss))(params, ids)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    assert_same(grads, want, TABLES)
    assert grads["tokens"]["embedding"].values.shape == (min(2 * ids.size, V), D)
    assert not dense(grads)["tokens"]["embedding"][3].any()  # padding


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_tables_have_gradients_of_their_dtype(dtype):
    params, loss = params_and_loss(param_dtype=dtype, dtype=dtype)
    _, grads = jax.jit(fse.row_value_and_grad(loss))(params, IDS)
    _, want = jax.jit(jax.value_and_grad(loss))(params, IDS)
    assert grads["tokens"]["embedding"].dtype == dtype
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=5e-2, atol=5e-2),
        dense(grads),
        want,
    )


def test_a_token_that_repeats_is_summed_in_float32():
    embed = fse.linen.Embed(V, 1, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, sparse=True)
    ids = jnp.zeros(4096, jnp.int32)
    params = embed.init(jax.random.key(0), ids)["params"]

    def loss(params):
        return embed.apply({"params": params}, ids).astype(jnp.float32).sum()

    assert fse.row_value_and_grad(loss)(params)[1]["embedding"].values[0, 0] == 4096


AROUND = {
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "vmap": lambda f: lambda params, ids: jax.vmap(lambda row: f(params, row[None]))(ids).sum(),
    "scan": lambda f: lambda params, ids: jax.lax.scan(lambda c, row: (c + f(params, row[None]), None), 0.0, ids)[0],
    "cond": lambda f: lambda params, ids: jax.lax.cond(ids[0, 0] > 0, lambda: f(params, ids), lambda: 0.0),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", AROUND)
def test_a_transformation_around_the_lookup_needs_token_ids(name):
    params, loss = params_and_loss()
    around = AROUND[name](loss)
    with pytest.raises(ValueError, match=r"jax\.checkpoint.*token_ids="):
        fse.row_value_and_grad(around)(params, IDS)

    def ids_of_tables(params, ids):
        return {"tokens/embedding": ids, "users/embedding": [ids + 1]}

    _, grads = jax.jit(fse.row_value_and_grad(around, token_ids=ids_of_tables))(params, IDS)
    assert_same(grads, jax.jit(jax.grad(around))(params, IDS), TABLES)


@pytest.mark.slow
def test_the_outer_transformations_of_a_step_work():
    params, loss = params_and_loss()

    def of_one(ids):
        return fse.row_value_and_grad(loss)(params, ids)[1]

    batches = IDS[:, None]
    grads = [jax.jit(jax.grad(loss))(params, batch) for batch in batches]
    want = jax.tree.map(lambda *xs: sum(xs), *grads)
    mapped = jax.jit(lambda: fse.sum_microbatches(jax.vmap(of_one)(batches)))()
    scanned = jax.jit(lambda: fse.sum_microbatches(jax.lax.map(jax.checkpoint(of_one), batches)))()
    for found in (scanned, mapped):
        assert_same(found, want, TABLES)


@pytest.mark.slow
def test_ids_that_token_ids_leaves_out_give_nan():
    params, loss = params_and_loss()

    def ids_of_tables(params, ids):
        return {"tokens/embedding": ids, "users/embedding": ids}

    value, _ = fse.row_value_and_grad(loss, token_ids=ids_of_tables)(params, IDS)
    assert jnp.isnan(value)


def test_ids_outside_the_table_have_no_gradient():
    params, _ = params_and_loss(fse.linen.Embed(V, D, sparse=True))
    embed = fse.linen.Embed(V, D, sparse=True)

    def finite(params, ids):
        return jnp.nansum(embed.apply({"params": params}, ids) ** 2)

    ids = jnp.array([V, -V - 1, 2, 2])
    _, grads = fse.row_value_and_grad(finite)(params, ids)
    assert_same(grads, jax.grad(finite)(params, ids), {"embedding"})
    assert grads["embedding"].indices[0] == 2


def test_every_id_looks_up_the_only_row_as_in_flax():
    embed = fse.linen.Embed(1, D, sparse=True)
    params = embed.init(jax.random.key(0), IDS)["params"]

    def loss(params):
        return jnp.sum(embed.apply({"params": params}, IDS) ** 2)

    assert_same(fse.row_value_and_grad(loss)(params)[1], jax.grad(loss)(params), {"embedding"})


def test_aux_keyword_arguments_and_static_arguments_pass_through():
    params, loss = params_and_loss()

    def with_aux(params, ids, *, power, note):
        assert note == "static"
        return loss(params, ids) * power, {"ids": ids, "note": note}

    (value, aux), grads = fse.row_value_and_grad(with_aux, has_aux=True)(params, ids=IDS, power=2.0, note="static")
    np.testing.assert_allclose(value, 2 * loss(params, IDS), rtol=1e-6)
    assert aux["note"] == "static" and aux["ids"] is IDS
    assert_same(grads, jax.grad(lambda p: 2 * loss(p, IDS))(params), TABLES)


def test_the_dense_gradient_is_in_no_compiled_program():
    embed = fse.linen.Embed(100_000, 64, sparse=True)
    params = {"embedding": jax.ShapeDtypeStruct((100_000, 64), jnp.float32)}
    ids = jax.ShapeDtypeStruct((32,), jnp.int32)

    def loss(params, ids):
        return jnp.sum(jnp.tanh(embed.apply({"params": params}, ids)) ** 2)

    compiled = jax.jit(fse.row_value_and_grad(loss)).lower(params, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100_000
    assert jax.jit(jax.value_and_grad(loss)).lower(params, ids).compile().memory_analysis().output_size_in_bytes > 25e6


def test_boxed_parameters_keep_their_boxes():
    init = nn.with_partitioning(fse.linen.Embed(V, D).embedding_init, ("vocab", "embed"))
    embed = fse.linen.Embed(V, D, sparse=True, embedding_init=init)
    params = embed.init(jax.random.key(0), IDS)["params"]

    def loss(params, ids):
        return jnp.sum(embed.apply({"params": params}, ids) ** 2)

    _, grads = jax.jit(fse.row_value_and_grad(loss))(params, IDS)
    assert isinstance(grads["embedding"], nn.Partitioned) and is_rows(grads["embedding"].value)
    assert_same(nn.unbox(grads), nn.unbox(jax.grad(loss)(params, IDS)), {"embedding"})


def test_attend_raises_and_names_sampled_ids_as_the_way_out():
    embed = fse.linen.Embed(V, D, sparse=True)
    params = embed.init(jax.random.key(0), IDS)["params"]

    def tied(params, ids):
        bound = embed.bind({"params": params})
        return bound.attend(bound(ids)).sum()

    def sampled(params, ids):  # the way out that the message names
        bound = embed.bind({"params": params})
        candidates = jnp.array([0, 5, 9])
        return jnp.einsum("...d,kd->...k", bound(ids), bound(candidates)).sum()

    with pytest.raises(TypeError, match=r"gradient for every row.*sampled ids"):
        fse.row_value_and_grad(tied)(params, IDS)
    assert_same(fse.row_value_and_grad(sampled)(params, IDS)[1], jax.grad(sampled)(params, IDS), {"embedding"})


def no_table(params, loss):
    model = fse.linen.Embed(V, D)
    params = model.init(jax.random.key(0), IDS)["params"]
    return fse.row_value_and_grad(lambda p, ids: model.apply({"params": p}, ids).sum())(params, IDS)


def cast_table(params, loss):
    def cast(p, ids):
        return loss(jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), ids)

    return fse.row_value_and_grad(cast)(params, IDS)


def integer_table(params, loss):
    model = fse.linen.Embed(V, D, param_dtype=jnp.int32, embedding_init=nn.initializers.ones, sparse=True)
    params = model.init(jax.random.key(0), IDS)["params"]
    return fse.row_value_and_grad(lambda p, ids: model.apply({"params": p}, ids).sum() * 1.0)(params, IDS)


def frequency(params, loss):
    model = fse.linen.Embed(V, D, scale_grad_by_freq=True)
    params = model.init(jax.random.key(0), IDS)["params"]
    of_rows = fse.row_value_and_grad(lambda p, ids: model.apply({"params": p}, ids).sum(), token_ids=lambda p, ids: ids)
    return of_rows(params, IDS)


def given(ids):
    return lambda params, loss: fse.row_value_and_grad(loss, token_ids=lambda *_: ids)(params, IDS)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (no_table, ValueError, "looks up no table with `sparse=True`"),
        (cast_table, ValueError, "no parameter is this array. Either it was cast"),
        (integer_table, TypeError, "'embedding' has dtype int32, but only floating"),
        (frequency, ValueError, "scale_grad_by_freq=True` does not work with a sparse gradient, as in torch"),
        (given(IDS), ValueError, "`token_ids` is one array, but there are 3 tables.*Name the table"),
        (given({"tokens": IDS}), ValueError, "names 'tokens', which is not a table. It may name: .*tokens/embedding"),
        (given({"tokens/embedding": [1, 2]}), TypeError, "must be an array of integers, got 1"),
        (given({"tokens/embedding": IDS * 1.0}), ValueError, "must be integers, got float32"),
        (
            lambda params, loss: fse.row_value_and_grad(loss, token_ids=IDS),
            TypeError,
            "must be a function of the arguments",
        ),
    ],
)
def test_a_wrong_use_raises_an_error_with_the_way_out(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong(*params_and_loss())


@pytest.mark.slow
def test_a_sum_over_all_parameters_raises():
    """Regularization reads the table as an array. An error is better than a gradient without that term."""
    params, loss = params_and_loss()

    def decayed(p, ids):
        return loss(p, ids) + sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    with pytest.raises(TypeError, match=r"fse\.SparseRows"):
        fse.row_value_and_grad(decayed)(params, IDS)


def test_derivatives_of_the_gradient_and_of_the_value_are_those_of_jax():
    params, _ = params_and_loss(fse.linen.Embed(V, D, padding_idx=3, sparse=True))
    embed = fse.linen.Embed(V, D, padding_idx=3, sparse=True)

    def curved(params, ids):
        return jnp.sum(jnp.sin(embed.apply({"params": params}, ids)) ** 2)

    of_rows = fse.row_value_and_grad(curved, token_ids=lambda params, ids: ids)
    norm = lambda params: fse.global_norm(of_rows(params, IDS)[1])  # noqa: E731
    for found, want in [
        (jax.grad(lambda p: of_rows(p, IDS)[0])(params), jax.grad(curved)(params, IDS)),
        (jax.grad(norm)(params), jax.grad(lambda p: optax.tree.norm(jax.grad(curved)(p, IDS)))(params)),
        (
            jax.jvp(lambda p: dense(of_rows(p, IDS)[1]), (params,), (params,))[1],
            jax.jvp(lambda p: jax.grad(curved)(p, IDS), (params,), (params,))[1],
        ),
    ]:
        np.testing.assert_allclose(found["embedding"], want["embedding"], rtol=1e-5, atol=1e-6)
        assert np.abs(want["embedding"]).max() > 0.1


@pytest.mark.parametrize("jit", [EAGER, JIT], ids=["eager", "jit"])
def test_a_sum_over_chosen_parameters_raises(jit):
    params, loss = params_and_loss()
    for chosen in (lambda x: x.ndim > 1, lambda x: jnp.issubdtype(x.dtype, jnp.floating)):

        def decayed(p, ids, chosen=chosen):
            return loss(p, ids) + sum(jnp.sum(x**2) for x in jax.tree.leaves(p) if chosen(x))

        with pytest.raises(TypeError, match="for more than lookups, so the table has a dense gradient"):
            jit(fse.row_value_and_grad(decayed))(params, IDS)


def test_a_table_that_is_cast_in_the_loss_has_its_gradient_summed_in_float32():
    embed = fse.linen.Embed(V, 2, sparse=True)
    ids = jnp.ones(2400, jnp.int32)
    params = embed.init(jax.random.key(0), ids)["params"]

    def loss(params, ids):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
        return embed.apply({"params": half}, ids).astype(jnp.float32).sum()

    _, grads = fse.row_value_and_grad(loss, token_ids=lambda params, ids: ids)(params, ids)
    assert grads["embedding"].values[0, 0] == jax.grad(loss)(params, ids)["embedding"][1, 0] == 2400


@pytest.mark.slow
def test_numpy_parameters_work_next_to_a_constant_table():
    params, loss = params_and_loss()
    other = fse.linen.Embed(V + 1, D, sparse=True)
    constant = other.init(jax.random.key(1), IDS)["params"]
    both = lambda p, ids: loss(p, ids) + jnp.sum(other.apply({"params": constant}, ids))  # noqa: E731
    _, grads = jax.jit(fse.row_value_and_grad(both))(jax.tree.map(np.asarray, params), IDS)
    assert_same(grads, jax.jit(jax.grad(loss))(params, IDS), TABLES)


def test_tables_in_aux_are_returned_as_arrays():
    params, loss = params_and_loss()
    (_, aux), _ = fse.row_value_and_grad(lambda p, ids: (loss(p, ids), p), has_aux=True)(params, IDS)
    jax.tree.map(np.testing.assert_array_equal, aux, params)


@pytest.mark.one_in(5, start=1)
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("x", None), PartitionSpec(None, "x")], ids=str)
def test_ids_can_be_sharded_on_an_explicit_mesh(spec):
    embed = fse.linen.Embed(16, 4, sparse=True)
    ids = jnp.array([1, 3, 3, 7])
    params = embed.init(jax.random.key(0), ids)["params"]
    loss = lambda params, ids: jnp.sum(jnp.tanh(embed.apply({"params": params}, ids)) ** 2)  # noqa: E731
    want = jax.grad(loss)(params, ids)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        sharded_ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("x" if "x" not in spec else "y")))
        tx = fse.row_sparse(optax.sgd(1.0))

        @jax.jit
        def step(params, ids):
            _, grads = fse.row_value_and_grad(loss)(params, ids)
            updates, _ = tx.update(grads, tx.init(params), params)
            return optax.apply_updates(params, updates)

        new = step(placed, sharded_ids)["embedding"]
    np.testing.assert_allclose(params["embedding"] - np.asarray(new), want["embedding"], rtol=1e-5, atol=1e-7)


# --- NNX --------------------------------------------------------------------------------------------------------------


class Module(nnx.Module):
    """A sparse table, looked up twice, and layers with other state."""

    def __init__(self, rngs, sparse=True):
        self.tokens = fse.nnx.StableEmbed(V, D, padding_idx=3, sparse=sparse, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs), nnx.BatchNorm(D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    def __call__(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x * self.tokens(ids[:, ::-1])


def nnx_loss(model, ids):
    return jnp.sum(model(ids) ** 2)


@pytest.mark.one_in(4, start=1)
@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_an_nnx_model_has_the_gradients_and_the_side_effects_of_nnx(jit):
    ours, theirs = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    of_rows, of_all = jit(fse.row_value_and_grad(nnx_loss)), jit(nnx.value_and_grad(nnx_loss))
    for _ in range(2):
        (value, grads), (want_value, want) = of_rows(ours, IDS), of_all(theirs, IDS)
        np.testing.assert_allclose(value, want_value, rtol=1e-6)
        assert isinstance(grads, nnx.State)
        assert_same(nnx.to_pure_dict(grads), nnx.to_pure_dict(want), {"tokens/embedding"})
        states = (nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *states)
    counts = [m.layers[2].rngs.count[...] for m in (ours, theirs)]
    assert counts[0] == counts[1] == 2
    assert isinstance(ours.tokens.embedding[...], jax.Array)


def test_aux_is_returned_and_a_table_can_be_shared_by_two_modules():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = fse.nnx.Embed(V, D, sparse=True, rngs=rngs)
            self.b = fse.nnx.Embed(V, D, sparse=True, rngs=rngs)
            self.b.embedding = self.a.embedding

    model = Tied(nnx.Rngs(0))

    def loss(m, ids):
        return (jnp.sum(m.a(ids) * m.b(ids + 1)), ids)

    (_, aux), grads = fse.row_value_and_grad(loss, has_aux=True)(model, IDS)
    _, want = nnx.value_and_grad(loss, has_aux=True)(model, IDS)
    assert aux is IDS
    assert_same(nnx.to_pure_dict(grads), nnx.to_pure_dict(want), {"a/embedding"})


def test_remat_inside_an_nnx_loss_needs_token_ids():
    model = Module(nnx.Rngs(0))
    model.layers = nnx.List([model.layers[0]])
    around = nnx.remat(nnx_loss)
    with pytest.raises(ValueError, match=r"jax\.checkpoint.*token_ids="):
        fse.row_value_and_grad(around)(model, IDS)
    _, grads = fse.row_value_and_grad(around, token_ids=lambda m, ids: ids)(model, IDS)
    _, want = nnx.value_and_grad(nnx_loss)(model, IDS)
    assert_same(nnx.to_pure_dict(grads), nnx.to_pure_dict(want), {"tokens/embedding"})


@pytest.mark.slow
def test_keyword_arguments_and_random_streams_pass_through():
    model, stream = Module(nnx.Rngs(0)), nnx.Rngs(7)

    def loss(model, ids, rngs, scale):
        negatives = jax.random.randint(rngs.negatives(), (4,), 0, V)
        return scale * jnp.sum(model(ids) ** 2) + jnp.sum(model.tokens(negatives) ** 2)

    of_rows, of_all = (
        nnx.jit(lambda m, s, f=f: f(loss)(m, IDS, s, scale=2.0)) for f in (fse.row_value_and_grad, nnx.value_and_grad)
    )
    value, grads = of_rows(model, stream)
    want_value, want = of_all(Module(nnx.Rngs(0)), nnx.Rngs(7))
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    assert_same(nnx.to_pure_dict(grads), nnx.to_pure_dict(want), {"tokens/embedding"})
    assert stream.negatives.count[...] == 1


def test_a_table_outside_wrt_is_constant_and_a_table_without_lookups_has_no_rows():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c = (fse.nnx.Embed(V, D, sparse=True, rngs=rngs) for _ in range(3))

    model = Two(nnx.Rngs(0))
    loss = lambda m, ids: jnp.sum(m.a(ids) * m.b(ids))  # noqa: E731
    wrt = nnx.All(nnx.Param, lambda path, _: "b" not in path)
    _, grads = fse.row_value_and_grad(loss, wrt=wrt)(model, IDS)
    want = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model, IDS)
    assert_same(nnx.to_pure_dict(grads), nnx.to_pure_dict(want), {"a/embedding", "c/embedding"})
    assert nnx.to_pure_dict(grads)["c"]["embedding"].values.shape == (0, D)
    only_a = {"a/embedding": IDS}  # without b, whose gradient would be lost
    assert jnp.isnan(fse.row_value_and_grad(loss, token_ids=lambda *_: only_a)(model, IDS)[0])


def test_attend_of_an_nnx_module_raises():
    model = fse.nnx.Embed(V, D, sparse=True, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="gradient for every row"):
        fse.row_value_and_grad(lambda m, ids: m.attend(m(ids)).sum())(model, IDS)
    assert model.attend(model(IDS)).shape == (*IDS.shape, V)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.one_in(4)
def test_a_model_learns_with_row_gradients_end_to_end(api):
    """TrainState and nnx.Optimizer take row gradients and row updates like any others."""
    tx = optax.chain(fse.clip_by_global_norm(1.0), fse.row_sparse(optax.adam(0.05)))
    ids = jnp.arange(8).reshape(2, 4) * 5
    target = jnp.linspace(-1, 1, ids.size * D).reshape(*ids.shape, D)
    losses = []
    if api == "linen":
        from flax.training.train_state import TrainState

        model = fse.linen.Embed(V, D, sparse=True)
        params = model.init(jax.random.key(0), ids)["params"]
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, ids) - target) ** 2)

        @jax.jit
        def step(state):
            value, grads = fse.row_value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value

        for _ in range(60):
            state, value = step(state)
            losses.append(float(value))
    else:
        model = fse.nnx.Embed(V, D, sparse=True, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, grads = fse.row_value_and_grad(lambda m: jnp.mean((m(ids) - target) ** 2))(model)
            optimizer.update(model, grads)
            return value

        losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.01 * losses[0]


# --- parameters that hold the same array, and shard_map ---


@pytest.mark.parametrize("jit", [False, True])
def test_two_parameters_that_hold_the_same_array_are_told_apart(jit):
    embed, array = fse.linen.Embed(V, D, sparse=True), jnp.ones((V, D))

    def loss(params, ids):
        a, b = (embed.apply({"params": {"embedding": params[name]}}, ids + k) for k, name in enumerate("ab"))
        return jnp.sum(a * b)

    def of(array, ids):
        return fse.row_value_and_grad(loss)({"a": array, "b": array}, ids)

    value, grads = (jax.jit(of) if jit else of)(array, IDS[0])
    want_value, want = jax.value_and_grad(loss)({"a": array, "b": array}, IDS[0])
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    assert_same(grads, want, "ab")
    assert set(np.asarray(grads["a"].indices)[:3]) == {1, 3, 4}  # no row of b


def test_an_nnx_table_that_was_copied_from_another_is_told_apart():
    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = (fse.nnx.Embed(V, D, sparse=True, rngs=nnx.Rngs(k)) for k in range(2))

        def __call__(self, ids):
            return jnp.sum(self.a(ids) * self.b(ids + 1))

    model = Two()
    nnx.update(model.b, nnx.state(model.a))
    value, grads = fse.row_value_and_grad(lambda model, ids: model(ids))(model, IDS[0])
    want_value, want = nnx.value_and_grad(lambda model, ids: model(ids))(model, IDS[0])
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    for name in "ab":
        np.testing.assert_allclose(
            grads[name]["embedding"].get_raw_value().to_dense(), want[name]["embedding"].get_value(), rtol=1e-5
        )


def test_a_part_of_the_model_in_a_keyword_argument_is_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.embed = fse.nnx.Embed(V, D, sparse=True, rngs=nnx.Rngs(0))

    model = Model()
    with pytest.raises(ValueError, match="`embed` shares variables with the model"):
        fse.row_value_and_grad(lambda model, ids, embed: embed(ids).sum())(model, IDS, embed=model.embed)


def test_an_outer_derivative_needs_no_jit():
    embed = fse.linen.Embed(V, D, sparse=True)
    params = embed.init(jax.random.key(0), IDS)["params"]

    def loss(params):
        return jnp.sum(embed.apply({"params": params}, IDS) ** 3)

    twice = jax.grad(lambda params: fse.row_value_and_grad(loss)(params)[0])(params)
    np.testing.assert_allclose(twice["embedding"], jax.grad(loss)(params)["embedding"], rtol=1e-5)


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("with_token_ids", [False, True])
def test_inside_shard_map_every_device_has_the_rows_of_its_own_ids(checks, with_token_ids):
    embed, mesh = fse.linen.Embed(V, D, sparse=True), jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    params = embed.init(jax.random.key(0), IDS)["params"]
    ids = jnp.array([0, 1, 2, 3, 4, 5, 6, 0])

    def loss(params, ids):
        return jnp.sum(embed.apply({"params": params}, ids) ** 2)

    def of_one(params, ids):
        token_ids = (lambda params, ids: ids) if with_token_ids else None
        rows = fse.row_value_and_grad(loss, token_ids=token_ids)(params, ids)[1]["embedding"]
        exchanged = fse.SparseRows.of_lookups(
            jax.lax.all_gather(rows.indices, "data"), jax.lax.all_gather(rows.values, "data"), rows.num_rows
        )
        return jax.lax.psum(rows.to_dense(), "data"), exchanged.to_dense()[None]

    specs = {
        "in_specs": (PartitionSpec(), PartitionSpec("data")),
        "out_specs": (PartitionSpec(), PartitionSpec("data")),
    }
    summed, exchanged = jax.jit(jax.shard_map(of_one, mesh=mesh, check_vma=checks, **specs))(params, ids)
    want = jax.grad(loss)(params, ids)["embedding"]
    np.testing.assert_allclose(summed, want, rtol=1e-5)
    for of_device in exchanged:
        np.testing.assert_allclose(of_device, want, rtol=1e-5)
