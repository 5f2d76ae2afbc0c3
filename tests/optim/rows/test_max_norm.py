"""Tests `with_max_norm`. tests/golden/test_embedding_training.py compares its trajectories with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_stable_embed as fse

TABLE = jnp.array([[3.0, 4.0], [6.0, 8.0], [0.3, 0.4], [30.0, 40.0]])
PARAMS = {"embedding": TABLE, "kernel": jnp.full((2, 2), 9.0)}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def stepped(tx, params=PARAMS, grads=ZEROS, **extra_args):
    updates, _ = tx.update(grads, tx.init(params), params, **extra_args)
    return optax.apply_updates(params, updates)


def test_rows_that_were_looked_up_are_stored_scaled_down():
    new = stepped(fse.with_max_norm(optax.sgd(0.1), 1.0), token_ids=jnp.array([[1, 2], [1, -1]]))
    np.testing.assert_allclose(new["embedding"], [[3, 4], [0.6, 0.8], [0.3, 0.4], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(new["kernel"], PARAMS["kernel"])


def test_weight_decay_starts_from_the_scaled_rows():
    tx = fse.with_max_norm(optax.adamw(0.1, weight_decay=0.5), 1.0)
    new = stepped(tx, token_ids={"embedding": jnp.array([1])})
    np.testing.assert_allclose(new["embedding"][1], 0.95 * np.array([0.6, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(new["embedding"][0], 0.95 * TABLE[0], rtol=1e-6)


def test_ids_outside_the_table_and_empty_ids_change_nothing():
    tx = fse.with_max_norm(optax.sgd(0.1), 1.0)
    for ids in (jnp.array([4, -5]), jnp.zeros(0, jnp.int32), jnp.zeros((2, 0), jnp.uint8)):
        np.testing.assert_array_equal(stepped(tx, token_ids=ids)["embedding"], TABLE)


ROWS = fse.SparseRows.of_lookups(jnp.array([1, 3, 1]), jnp.ones((3, 2)), 4)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused_update"])
def test_row_gradients_know_their_rows_in_either_order(order, fused):
    grads = PARAMS | {"embedding": ROWS}
    inner = fse.adamw8bit(0.1, weight_decay=0.5)
    if order == "inside":
        tx = fse.row_sparse(fse.with_max_norm(inner, 1.0))
    else:
        tx = fse.with_max_norm(fse.row_sparse(inner), 1.0)
    if fused:
        new, _ = fse.fused_update(tx, grads, tx.init(PARAMS), PARAMS)
    else:
        new = stepped(tx, grads=grads)
    scaled = PARAMS | {"embedding": jnp.array([[3.0, 4.0], [0.6, 0.8], [0.3, 0.4], [0.6, 0.8]])}
    dense = PARAMS | {"embedding": ROWS.to_dense()}
    updates, _ = inner.update(dense, inner.init(scaled), scaled)
    want = optax.apply_updates(scaled, updates)
    for row in (1, 3):
        np.testing.assert_allclose(new["embedding"][row], want["embedding"][row], rtol=1e-5)
    np.testing.assert_array_equal(new["embedding"][jnp.array([0, 2])], TABLE[jnp.array([0, 2])])
    np.testing.assert_allclose(new["kernel"], want["kernel"], rtol=1e-6)


def test_mask_selects_the_tables():
    params = {"wte": TABLE, "kernel": PARAMS["kernel"]}
    tx = fse.with_max_norm(optax.sgd(0.1), 1.0, mask={"wte": True, "kernel": False})
    new = stepped(tx, params, jax.tree.map(jnp.zeros_like, params), token_ids=jnp.array([0]))
    np.testing.assert_allclose(new["wte"][0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(new["kernel"], params["kernel"])


def test_max_norm_can_be_a_schedule_by_inject_hyperparams():
    make = optax.inject_hyperparams(fse.with_max_norm, static_args=("norm_type",))
    tx = make(optax.sgd(0.1), optax.linear_schedule(2.0, 1.0, 10))
    np.testing.assert_allclose(stepped(tx, token_ids=jnp.array([1]))["embedding"][1], [1.2, 1.6], rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda: fse.with_max_norm(0.1, 1.0),
            TypeError,
            "`tx` must be an optax transform, with `init` and `update`, got 0.1",
        ),
        (lambda: fse.with_max_norm(optax.sgd(0.1), None), TypeError, "`max_norm` must be a number, got None"),
        (lambda: fse.with_max_norm(optax.sgd(0.1), -1.0), ValueError, "`max_norm` must be positive, got -1.0"),
        (lambda: fse.with_max_norm(optax.sgd(0.1), 1.0, -2.0), ValueError, "`norm_type`.*must be 0 or more, got -2.0"),
        (
            lambda: stepped(fse.with_max_norm(optax.sgd(0.1), 1.0)),
            ValueError,
            r"which rows of 'embedding'.*token_ids=\{",
        ),
        (
            lambda: fse.with_max_norm(optax.sgd(0.1), 1.0).update(ZEROS, optax.sgd(0.1).init(PARAMS)),
            ValueError,
            r"`params` is None.*Call `update\(grads, state, params\)`",
        ),
        (
            lambda: stepped(fse.with_max_norm(optax.sgd(0.1), 1.0), token_ids={"kernel": jnp.array([1])}),
            ValueError,
            "names 'kernel', which is not a table. It may name: embedding",
        ),
        (
            lambda: stepped(
                fse.with_max_norm(optax.sgd(0.1), 1.0), {"k": TABLE}, {"k": TABLE}, token_ids=jnp.array([1])
            ),
            ValueError,
            "found no table among the parameters: k. Give it a `mask`",
        ),
        (
            lambda: optax.inject_hyperparams(fse.with_max_norm)(optax.sgd(0.1), 1.0).init(PARAMS),
            TypeError,
            r"`norm_type` must be a Python number.*static_args=\(\"norm_type\",\)",
        ),
    ],
)
def test_a_wrong_use_raises_an_error_with_the_way_out(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


# --- the module that writes rows back ---


def writer(module=fse.nnx.Embed, **options):
    return module.from_pretrained(TABLE, max_norm=1.0, write_back=True, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("module", [fse.nnx.Embed, fse.nnx.StableEmbed])
def test_a_lookup_stores_the_rows_that_it_scales(module):
    embed = writer(module)
    plain = module.from_pretrained(TABLE, max_norm=1.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(embed(jnp.array([1, 2])), plain(jnp.array([1, 2])))
    np.testing.assert_allclose(embed.embedding[...], [[3, 4], [0.6, 0.8], [0.3, 0.4], [30, 40]], rtol=1e-6)
    nnx.jit(lambda m: m(jnp.array([3])))(embed)
    np.testing.assert_allclose(embed.embedding[...][3], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(plain.embedding[...], TABLE)


@pytest.mark.parametrize(
    "closes_over",
    [
        lambda embed: jax.jit(lambda ids: embed(ids))(jnp.array([1])),
        lambda embed: jax.grad(lambda x: (embed(jnp.array([1])) * x).sum())(1.0),
        lambda embed: jax.vmap(lambda ids: embed(ids))(jnp.array([1, 2])),
        lambda embed: jax.eval_shape(embed, jnp.array([1])),
        lambda embed: jax.lax.scan(lambda c, i: (c, embed(i)), 0, jnp.array([1, 2])),
    ],
    ids=["jit", "grad", "vmap", "eval_shape", "scan"],
)
def test_a_module_that_is_closed_over_cannot_write_rows_back(closes_over):
    with pytest.raises(ValueError, match=r"which NNX forbids. Pass the module as an argument.*fse\.with_max_norm"):
        closes_over(writer())


def test_write_back_needs_max_norm_and_refuses_sparse():
    with pytest.raises(
        ValueError, match="`write_back=True` stores the rows that `max_norm` scales, but `max_norm` is None"
    ):
        fse.nnx.Embed(4, 2, write_back=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"cannot be combined with `sparse=True`.*fse\.row_sparse\(fse\.with_max_norm"):
        fse.nnx.Embed(4, 2, write_back=True, max_norm=1.0, sparse=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_attend_can_scale_the_looked_up_rows_first(api):
    query, ids = jnp.array([[1.0, 1.0]]), jnp.array([1, 2])
    if api == "linen":
        attend = fse.linen.Embed(4, 2, max_norm=1.0).bind({"params": {"embedding": TABLE}}).attend
        unbound = fse.linen.Embed(4, 2).bind({"params": {"embedding": TABLE}}).attend
    else:
        attend = fse.nnx.Embed.from_pretrained(TABLE, max_norm=1.0, rngs=nnx.Rngs(0)).attend
        unbound = fse.nnx.Embed.from_pretrained(TABLE, rngs=nnx.Rngs(0)).attend
    np.testing.assert_allclose(attend(query, token_ids=ids), [[7, 1.4, 0.7, 70]], rtol=1e-6)
    np.testing.assert_allclose(attend(query), [[7, 14, 0.7, 70]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"`max_norm` is None\. Drop them"):
        unbound(query, token_ids=ids)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rows_are_stored_as_renorm_returns_them(dtype):
    table = (100 * jax.random.normal(jax.random.key(0), (8, 16))).astype(dtype)
    want = fse.linen.Embed(8, 16, max_norm=1.0, param_dtype=dtype).apply(
        {"params": {"embedding": table}}, jnp.arange(8)
    )
    embed = fse.nnx.Embed.from_pretrained(table, max_norm=1.0, write_back=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(embed(jnp.arange(8)), want)
    np.testing.assert_array_equal(embed.embedding[...], want)
    params = {"embedding": table}
    new = stepped(fse.with_max_norm(optax.sgd(0.1), 1.0), params, {"embedding": table * 0}, token_ids=jnp.arange(8))
    assert new["embedding"].dtype == dtype
    np.testing.assert_array_equal(new["embedding"], want)


def test_mode_clip_also_clips_the_ids_of_stored_rows():
    options = {"max_norm": 1.0, "mode": "clip", "rngs": nnx.Rngs(0)}
    stores, plain = (fse.nnx.Embed.from_pretrained(TABLE, write_back=w, **options) for w in (True, False))
    ids = jnp.array([99, -1])
    np.testing.assert_allclose(plain.attend(jnp.ones((1, 2)), token_ids=ids), [[1.4, 14, 0.7, 1.4]], rtol=1e-6)
    np.testing.assert_array_equal(stores(ids), plain(ids))
    np.testing.assert_allclose(stores.embedding[...], [[0.6, 0.8], [6, 8], [0.3, 0.4], [0.6, 0.8]], rtol=1e-6)


def test_a_table_of_one_row_that_writes_back_gives_nan_for_other_ids():
    embed = fse.nnx.Embed.from_pretrained(TABLE[:1], max_norm=1.0, write_back=True, rngs=nnx.Rngs(0))
    assert jnp.isnan(embed(jnp.array([3]))).all() and embed(jnp.array([0]))[0, 0] == pytest.approx(0.6)
