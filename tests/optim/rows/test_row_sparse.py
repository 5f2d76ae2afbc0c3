"""Tests that `row_sparse` makes the dense step on the touched rows of a table, and changes nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from flax_stable_embed.optim.rows import row_step

V, D = 300, 8


def params_of(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "embedding": jnp.asarray(rng.standard_normal((V, D)), dtype),
        "kernel": jnp.asarray(rng.standard_normal((64, 64)), jnp.float32),
    }


def gradients(step, tokens=40, table=("embedding",), dtype=jnp.float32):
    """Returns a dense gradient, and row gradients of 40 ids. Many ids repeat, and some are outside the table."""
    rng = np.random.default_rng([1, step])
    ids = rng.integers(0, V + 3, tokens)
    terms = jnp.asarray(rng.standard_normal((tokens, D)), dtype)
    rows = fse.SparseRows.of_lookups(jnp.asarray(ids), terms, V)
    return {"kernel": jnp.asarray(rng.standard_normal((64, 64)), jnp.float32), **{name: rows for name in table}}


def is_rows(x):
    return isinstance(x, fse.SparseRows)


def dense(tree):
    return jax.tree.map(lambda x: x.to_dense() if is_rows(x) else x, tree, is_leaf=is_rows)


def lazily(tx, steps, params, state, of_step=gradients):
    """The oracle: makes the dense step, then puts back the untouched rows of parameters and state."""
    for step in range(steps):
        grads = of_step(step)
        touched = np.zeros(V, bool)
        indices = np.asarray(grads["embedding"].indices)
        touched[indices[indices < V]] = True
        updates, new = jax.jit(tx.update)(dense(grads), state, params)

        def put_back(new, old, touched=touched):
            if getattr(new, "shape", ())[:1] != (V,):
                return new
            return jnp.where(touched.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        params = jax.tree.map(put_back, optax.apply_updates(params, updates), params)
        state = jax.tree.map(put_back, new, state)
    return params, state


def trained(tx, steps, params, *, fused=False, of_step=gradients):
    @partial(jax.jit, donate_argnums=(0, 1))
    def one(params, state, grads):
        if fused:
            return fse.fused_update(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for step in range(steps):
        params, state = one(params, state, of_step(step))
    return params, state


def assert_close(found, want, tolerance=2e-6):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)


SCHEDULE = optax.linear_schedule(0.1, 0.01, 5)
ROW_BY_ROW = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(SCHEDULE, weight_decay=0.1),
    "amsgrad": optax.amsgrad(0.01),
    "nadamw": optax.nadamw(0.01),
    "adamax": optax.adamax(0.01),
    "adabelief": optax.adabelief(0.01),
    "yogi": optax.yogi(0.01),
    "rmsprop": optax.rmsprop(0.01, centered=True, momentum=0.9),
    "lion": optax.lion(0.01),
    "adan": optax.adan(0.01),
    "rprop": optax.rprop(0.01),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(SCHEDULE),
    "chain": optax.chain(optax.zero_nans(), optax.clip(0.5), optax.scale_by_adam(), optax.scale(-0.1)),
    "masked": optax.masked(optax.adam(0.01), {"embedding": True, "kernel": False}),
    "partition": optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"embedding": "a", "kernel": "b"}),
    "fse.adamw8bit": fse.adamw8bit(0.01, weight_decay=0.1),
    "fse.sgd8bit": fse.sgd8bit(0.1, momentum=0.9),
    "fse.rmsprop8bit": fse.rmsprop8bit(0.01, momentum=0.9),
    "fse.adagrad8bit": fse.adagrad8bit(0.1),
    "fse.lion8bit": fse.lion8bit(0.01),
    "fse.ademamix8bit": fse.ademamix8bit(0.01),
    "rowwise": fse.adam8bit(0.01, rules=(("embedding", "rowwise"),)),
    "with_max_norm": fse.with_max_norm(optax.adam(0.1), 2.0),
}


@pytest.mark.one_in(13)
@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_touched_rows_make_the_dense_step_and_others_make_none(name, monkeypatch):
    monkeypatch.setattr(row_step, "CHUNK_BYTES", 4 * D * 16)  # chunks of 16 rows: 40 rows are 8 + 16 + 16
    inner = ROW_BY_ROW[name]
    found = trained(fse.row_sparse(inner), 4, params_of())
    if name == "with_max_norm":  # scales all rows; the oracle puts the untouched ones back
        inner = as_dense(inner)
    assert_close(found, lazily(inner, 4, params_of(), inner.init(params_of())))


def as_dense(tx):
    def update(grads, state, params):
        return tx.update(grads, state, params, token_ids=jnp.arange(V))

    return optax.GradientTransformation(tx.init, update)


FUSED = ["fse.adamw8bit", "fse.sgd8bit", "fse.lion8bit"]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", FUSED)
def test_parameters_can_be_written_in_place(name, monkeypatch):
    monkeypatch.setattr(row_step, "CHUNK_BYTES", 4 * D * 16)
    tx = fse.chain(fse.clip_by_global_norm(5.0), fse.row_sparse(ROW_BY_ROW[name]))
    found, want = trained(tx, 3, params_of(), fused=True), trained(tx, 3, params_of())
    assert_close(found[0], want[0])
    jax.tree.map(np.testing.assert_array_equal, found[1], want[1])


@pytest.mark.one_in(5, start=1)
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 39, 40, 41, 1000])
def test_the_chunk_size_does_not_change_the_result(rows_per_chunk, monkeypatch):
    want = trained(fse.row_sparse(optax.adamw(0.01)), 2, params_of())
    monkeypatch.setattr(row_step, "CHUNK_BYTES", 4 * D * rows_per_chunk)
    found = trained(fse.row_sparse(optax.adamw(0.01)), 2, params_of())
    assert_close(found, want, 1e-6)  # the compiler may fuse products and sums differently


COUPLED = {
    "lamb": optax.lamb(0.01),
    "lars": optax.lars(0.01),
    "adafactor": optax.adafactor(0.01),
    "novograd": optax.novograd(0.01),
    "sm3": optax.sm3(0.01),
    "muon": optax.contrib.muon(0.01),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(3.0), optax.adam(0.01)),
    "a limit that random numbers do not reach": optax.chain(optax.clip_by_global_norm(1e3), optax.sgd(1.0)),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(1.0), 3),
    "percentile_clipping": optax.chain(fse.percentile_clipping(50), optax.sgd(1.0)),
    "prodigy": optax.contrib.prodigy(),
    "dadapt_adamw": optax.contrib.dadapt_adamw(),
    "mechanize": optax.contrib.mechanize(optax.adam(0.01)),
    "fse.lamb8bit": fse.lamb8bit(0.01),
    "fse.lars8bit": fse.lars8bit(0.01),
}


@pytest.mark.one_in(13, start=2)
@pytest.mark.parametrize("name", COUPLED)
def test_an_optimizer_that_couples_rows_is_refused(name):
    tx = fse.row_sparse(COUPLED[name])
    state = tx.init(params_of())
    with pytest.raises(TypeError, match="does not treat the rows of a table one by one"):
        jax.jit(tx.update)(gradients(0), state, params_of())


def test_moments_that_are_factored_only_in_large_tables_are_refused():
    params = {"embedding": jnp.ones((128, 128))}
    rows = fse.SparseRows.of_lookups(jnp.arange(5), jnp.ones((5, 128)), 128)
    tx = fse.row_sparse(optax.scale_by_factored_rms())
    with pytest.raises(TypeError, match=r"does not have a row for each|does not treat the rows"):
        tx.update({"embedding": rows}, tx.init(params), params)


@pytest.mark.parametrize(
    "tx",
    [optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), optax.chain(optax.apply_every(2), optax.sgd(0.1))],
    ids=["MultiSteps", "apply_every"],
)
def test_an_optimizer_that_sums_gradients_over_steps_is_refused(tx):
    tx = fse.row_sparse(tx)
    with pytest.raises(TypeError, match=r"sums gradients over steps.*fse\.sum_microbatches"):
        tx.update(gradients(0), tx.init(params_of()), params_of())


def wrong_update(tx, grads=None, params=None, **extra_args):
    tx = fse.row_sparse(tx)
    return tx.update(grads or gradients(0), tx.init(params_of()), params or params_of(), **extra_args)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda: fse.row_sparse(optax.MultiSteps(optax.sgd(0.1), 2)),
            TypeError,
            r"contains optax\.MultiSteps, which sums gradients",
        ),
        (lambda: fse.row_sparse(0.1), TypeError, "`tx` must be an optax transform, with `init` and `update`, got 0.1"),
        (lambda: fse.row_sparse(optax.sgd(0.1), "eager"), ValueError, "must be 'lazy' or 'catch_up', got 'eager'"),
        (
            lambda: wrong_update(optax.sgd(0.1), dense(gradients(0))),
            ValueError,
            "holds no row gradients.*token_ids=ids",
        ),
        (
            lambda: wrong_update(
                fse.adamw8bit(0.1, rules=(("embedding", 8),), state_format=fse.StateFormat(min_size=0))
            ),
            TypeError,
            "moments of 'embedding' are stored in 8 bits.*`rules`",
        ),
        (
            lambda: wrong_update(optax.sgd(0.1), params=params_of() | {"embedding": jnp.ones((V, 2))}),
            ValueError,
            r"'embedding' is for a table of shape \(300, 8\), but the parameter has shape \(300, 2\)",
        ),
        (
            lambda: wrong_update(optax.sgd(0.1), dense(gradients(0)), token_ids={"wte": jnp.array([1])}),
            ValueError,
            "names 'wte', which is not a table. It may name: embedding",
        ),
        (
            lambda: fse.adamw8bit(0.1).update(gradients(0), fse.adamw8bit(0.1).init(params_of()), params_of()),
            TypeError,
            r"(?i)a gradient is a fse\.SparseRows, but adam takes arrays.*fse\.row_sparse",
        ),
        (
            lambda: fse.row_sparse(optax.sgd(0.1), "catch_up").update(
                gradients(0), fse.row_sparse(optax.sgd(0.1), "catch_up").init(params_of())
            ),
            ValueError,
            "`params` is None, but semantics='catch_up' needs",
        ),
    ],
)
def test_a_wrong_use_raises_an_error_with_the_way_out(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_token_ids_say_which_rows_of_a_dense_gradient_are_used():
    tx, params = fse.row_sparse(optax.adam(0.01)), params_of()
    grads = gradients(0)
    ids = jnp.concatenate([grads["embedding"].indices, jnp.array([1, 1, -1])])  # ids without a gradient are touched too
    for given in (ids, {"embedding": ids}, {"embedding": [ids[:5], ids[5:].reshape(1, -1)]}):
        updates, _ = tx.update(dense(grads), tx.init(params), params, token_ids=given)
        want, _ = optax.adam(0.01).update(dense(grads), optax.adam(0.01).init(params), params)
        np.testing.assert_allclose(updates["embedding"].to_dense(), want["embedding"], rtol=1e-6, atol=1e-8)
        assert is_rows(updates["embedding"]) and not is_rows(updates["kernel"])


def test_one_array_of_ids_for_two_tables_needs_a_mask():
    params = params_of() | {"pos_embedding": jnp.ones((V, D))}
    grads = dense(gradients(0, table=("embedding", "pos_embedding")))
    tx = fse.row_sparse(optax.sgd(0.1))
    with pytest.raises(ValueError, match="one array, but there are 2 tables: embedding, pos_embedding"):
        tx.update(grads, tx.init(params), params, token_ids=jnp.array([1]))

    def mask(tree):
        return {name: name == "embedding" for name in tree}

    updates, _ = fse.row_sparse(optax.sgd(0.1), mask=mask).update(
        grads, tx.init(params), params, token_ids=jnp.array([1])
    )
    assert is_rows(updates["embedding"]) and not is_rows(updates["pos_embedding"])


@pytest.mark.slow
def test_two_tables_can_have_different_numbers_of_rows():
    params = {"a_embedding": jnp.ones((50, 3)), "b": {"embedding": jnp.ones((9, 5))}}

    def rows(ids, n, d):
        return fse.SparseRows.of_lookups(jnp.asarray(ids), jnp.ones((len(ids), d)), n)

    grads = {"a_embedding": rows([3, 4, 3], 50, 3), "b": {"embedding": rows([1] * 20, 9, 5)}}
    tx = fse.row_sparse(optax.adam(0.1))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    want, want_state = optax.adam(0.1).update(dense(grads), optax.adam(0.1).init(params), params)
    assert_close((dense(updates), state), (want, want_state))


def test_a_bare_array_is_a_table_too():
    tx, table = fse.row_sparse(optax.adam(0.1)), jnp.ones((V, D))
    rows = gradients(0)["embedding"]
    updates, _ = tx.update(rows, tx.init(table), table)
    want, _ = optax.adam(0.1).update(rows.to_dense(), optax.adam(0.1).init(table), table)
    np.testing.assert_allclose(table + updates, table + want, rtol=1e-6)


def test_a_parameter_named_like_a_field_of_the_state_is_not_confused_with_it():
    params = {"embedding": jnp.ones((V, D)), "nu": {"embedding": jnp.ones((V, D))}}
    grads = {"embedding": gradients(0)["embedding"], "nu": {"embedding": gradients(1)["embedding"]}}
    tx = fse.row_sparse(optax.adam(0.1))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    want, want_state = optax.adam(0.1).update(dense(grads), optax.adam(0.1).init(params), params)
    assert_close((dense(updates), state), (want, want_state))


def test_rules_that_depend_on_shapes_see_the_shape_of_the_table():
    rules = ((fse.where(lambda path, shape: shape == (V, D)), fse.Rule(32, lr_scale=0.1)),)
    tx, plain = fse.row_sparse(fse.adamw8bit(0.1, rules=rules, weight_decay=0.0)), optax.adam(0.01)
    updates, _ = tx.update(gradients(0), tx.init(params_of()), params_of())
    want, _ = plain.update(dense(gradients(0)), plain.init(params_of()), params_of())
    np.testing.assert_allclose(updates["embedding"].to_dense(), want["embedding"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_numpy_parameters_and_states_work_as_after_a_restore():
    tx = fse.row_sparse(optax.adam(0.1), "catch_up")
    params, state = (jax.tree.map(np.asarray, x) for x in (params_of(), tx.init(params_of())))
    updates, _ = tx.update(gradients(0), state, params)
    want, _ = tx.update(gradients(0), tx.init(params_of()), params_of())
    assert_close(optax.apply_updates(params, updates), optax.apply_updates(params_of(), want))


def test_row_gradients_need_no_ids_but_may_have_them():
    tx, grads = fse.row_sparse(optax.sgd(0.1)), gradients(0)
    updates, _ = tx.update(grads, tx.init(params_of()), params_of(), token_ids=jnp.array([1, 2]))
    np.testing.assert_array_equal(updates["embedding"].indices, grads["embedding"].indices)


def test_stochastic_rounding_of_other_parameters_works_around_row_sparse():
    params = params_of() | {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    grads = gradients(0) | {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    tx = fse.stochastic_round_updates(fse.row_sparse(fse.adamw8bit(1e-4)))
    new = optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    assert len(jnp.unique(new["kernel"])) == 2 and (new["embedding"] != params["embedding"]).any()
    params["embedding"] = params["embedding"].astype(jnp.bfloat16)
    with pytest.raises(
        TypeError, match="of a table in half precision, but stochastic_round_updates cannot round single rows"
    ):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize(
    "tx", [fse.quantize_state(optax.adam(0.1)), fse.adam8bit(0.1)], ids=["quantize_state", "adam8bit"]
)
def test_an_optimizer_that_takes_arrays_refuses_row_gradients(tx):
    with pytest.raises(TypeError, match=r"(?i)a gradient is a fse\.SparseRows, but .* takes arrays"):
        tx.update(gradients(0), tx.init(params_of()), params_of())


def test_a_gradient_without_rows_changes_nothing():
    params = params_of()
    for semantics in ("lazy", "catch_up"):
        tx = fse.row_sparse(optax.adam(0.1), semantics)
        grads = gradients(0, tokens=0)
        assert grads["embedding"].values.shape == (0, D)
        updates, _state = jax.jit(tx.update)(grads, tx.init(params), params)
        np.testing.assert_array_equal(optax.apply_updates(params, updates)["embedding"], params["embedding"])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_tables_make_the_dense_step(dtype):
    of_step = partial(gradients, dtype=dtype)
    tx = fse.adamw8bit(0.01)
    found = trained(fse.row_sparse(tx), 3, params_of(dtype), of_step=of_step)
    assert_close(found, lazily(tx, 3, params_of(dtype), tx.init(params_of(dtype)), of_step=of_step), 1e-2)


@pytest.mark.slow
def test_float64_tables_keep_their_digits():
    with jax.enable_x64():
        params = {"embedding": jnp.ones((V, D), jnp.float64)}
        rows = fse.SparseRows.of_lookups(jnp.array([1, 1]), jnp.full((2, D), 1e-12, jnp.float64), V)
        tx = fse.row_sparse(optax.sgd(1.0))
        updates, _ = tx.update({"embedding": rows}, tx.init(params), params)
        assert optax.apply_updates(params, updates)["embedding"][1, 0] == 1 - 2e-12


# --- semantics="catch_up" ---

WITHOUT_MOMENTUM = {
    "sgd and decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(SCHEDULE)),
    "rmsprop": optax.rmsprop(0.01),
    "adagrad": optax.adagrad(0.1),
    "adamw, b1=0": optax.adamw(SCHEDULE, b1=0.0, weight_decay=0.3),
    "fse.adamw8bit, b1=0": fse.adamw8bit(SCHEDULE, b1=0.0, weight_decay=0.3),
    "fse.rmsprop8bit": fse.rmsprop8bit(0.01),
}
SKIPPING_STEPS = 12


def rare_then_all(step):
    """Returns gradients of a few rows, and in the last step of all rows, so that every row has caught up."""
    if step < SKIPPING_STEPS - 1:
        return gradients(step, tokens=20)
    rng = np.random.default_rng(step)
    rows = fse.SparseRows.of_lookups(jnp.arange(V), jnp.asarray(rng.standard_normal((V, D)), jnp.float32), V)
    return gradients(step) | {"embedding": rows}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", WITHOUT_MOMENTUM)
def test_catching_up_gives_the_dense_trajectory_if_there_is_no_momentum(name):
    inner, params = WITHOUT_MOMENTUM[name], params_of()
    found, state = trained(fse.row_sparse(inner, "catch_up"), SKIPPING_STEPS, params, of_step=rare_then_all)
    want, want_state = params, inner.init(params)
    update = jax.jit(inner.update)
    for step in range(SKIPPING_STEPS):
        updates, want_state = update(dense(rare_then_all(step)), want_state, want)
        want = optax.apply_updates(want, updates)
    assert_close((found["embedding"], state.inner_state), (want["embedding"], want_state), 1e-5)
    lazy, _ = trained(fse.row_sparse(inner), SKIPPING_STEPS, params, of_step=rare_then_all)
    if name not in ("adagrad",):  # nothing decays in Adagrad, so both are the dense trajectory
        assert np.abs(lazy["embedding"] - want["embedding"]).max() > 1e-3


@pytest.mark.one_in(7)
@pytest.mark.parametrize("name", ["amsgrad", "nadamw", "lion", "adamax"])
def test_catching_up_decays_the_moments_of_the_dense_optimizer(name):
    """Only the parameters differ, by momentum. The moments follow from the gradients, so they are the same."""
    inner, params = ROW_BY_ROW[name], params_of()
    _, state = trained(fse.row_sparse(inner, "catch_up"), SKIPPING_STEPS, params, of_step=rare_then_all)
    want = inner.init(params)
    update = jax.jit(inner.update)
    for step in range(SKIPPING_STEPS):
        _, want = update(dense(rare_then_all(step)), want, params)
    assert_close(state.inner_state, want, 1e-4)


@pytest.mark.parametrize(
    "tx",
    [optax.chain(optax.trace(0.9), optax.trace(0.5), optax.scale(-0.1)), optax.contrib.schedule_free_sgd(0.1)],
    ids=["a trace of a trace", "schedule_free"],
)
def test_catching_up_refuses_moments_that_depend_on_each_other(tx):
    tx = fse.row_sparse(tx, "catch_up")
    with pytest.raises((ValueError, TypeError), match=r"by factors|one by one"):
        tx.update(gradients(0), tx.init(params_of()), params_of())


@pytest.mark.parametrize("skipped", [3, 110, 222, 1000])
def test_a_strong_decay_stays_correct_after_many_skipped_steps(skipped):
    """The factor is 0.75^k: e^-32 after 111 steps, e^-64 after 222."""
    tx = fse.row_sparse(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.5)), "catch_up")
    params = {"embedding": jnp.ones((4, 2))}

    def one(carry, row):
        params, state = carry
        rows = fse.SparseRows.of_lookups(row[None], jnp.zeros((1, 2)), num_rows=4)
        updates, state = tx.update({"embedding": rows}, state, params)
        return (optax.apply_updates(params, updates), state), None

    steps = jnp.array([0] * skipped + [1])
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(one, carry, steps))((params, tx.init(params)))
    np.testing.assert_allclose(params["embedding"][1], 0.75 ** (skipped + 1), rtol=1e-4, atol=1e-7)


def test_a_state_of_the_other_semantics_is_refused():
    params, tx = params_of(), optax.adam(0.1)
    lazy, catch_up = fse.row_sparse(tx), fse.row_sparse(tx, "catch_up")
    with pytest.raises(TypeError, match="`state` is a tuple, which was not made with semantics='catch_up'"):
        catch_up.update(gradients(0), lazy.init(params), params)
    with pytest.raises(TypeError, match="`state` is a RowSparseState, which was not made with semantics='lazy'"):
        lazy.update(gradients(0), catch_up.init(params), params)


def test_a_mask_that_is_true_for_a_vector_is_refused():
    tx = fse.row_sparse(optax.sgd(0.1), "catch_up", mask={"bias": True, "embedding": True})
    with pytest.raises(ValueError, match=r"`mask` is True for 'bias', which has shape \(3,\)"):
        tx.init({"embedding": jnp.ones((4, 2)), "bias": jnp.ones(3)})


def test_every_id_looks_up_the_only_row_of_a_table_with_one_row():
    tx, params = fse.row_sparse(optax.sgd(1.0)), {"embedding": jnp.ones((1, 2))}
    updates, _ = tx.update({"embedding": jnp.ones((1, 2))}, tx.init(params), params, token_ids=jnp.array([5, -7]))
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["embedding"], 0)


@pytest.mark.slow
def test_a_last_step_with_zero_gradients_brings_the_table_up_to_date():
    """Weight decay is then that of the dense optimizer in every row, as the docstring says."""
    tx = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    rows, dense_tx = fse.row_sparse(tx, "catch_up"), tx
    params, grads = {"embedding": jnp.ones((4, 2))}, {"embedding": jnp.zeros((4, 2))}
    ours, state, theirs, their_state = params, rows.init(params), params, dense_tx.init(params)
    for ids in ([0], [1], [0, 1], [0, 1, 2, 3]):
        updates, state = rows.update(grads, state, ours, token_ids=jnp.array(ids))
        ours = optax.apply_updates(ours, updates)
        updates, their_state = dense_tx.update(grads, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["embedding"], theirs["embedding"], rtol=1e-6)


@pytest.mark.slow
def test_small_decays_add_up_over_a_long_run():
    """Decays by 1e-7 per step while the sum of logarithms is already large. A float32 sum would not change."""
    tx, params = fse.row_sparse(optax.adamw(1e-3, b1=0.0, weight_decay=1e-4), "catch_up"), params_of()
    state = tx.init(params)
    far = jnp.array([-20, 0])
    state = state._replace(
        log_decay=state.log_decay | {"embedding": far},
        last_log_decay=state.last_log_decay | {"embedding": jnp.broadcast_to(far, (V, 2))},
    )
    untouched = gradients(0, tokens=0)

    @jax.jit
    def skip(state):
        step = lambda _, state: tx.update(untouched, state, params)[1]  # noqa: E731
        return jax.lax.fori_loop(0, 20_000, step, state)

    rows = fse.SparseRows.of_lookups(jnp.array([5]), jnp.zeros((1, D)), V)
    updates, _ = tx.update(untouched | {"embedding": rows}, skip(state), params)
    new = optax.apply_updates(params, updates)["embedding"][5]
    np.testing.assert_allclose(new / params["embedding"][5], (1 - 1e-7) ** 20_001, rtol=3e-7)


@pytest.mark.one_in(4, start=1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.slow
def test_an_nnx_table_with_sharding_metadata_catches_up(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        metadata = {"out_sharding": ("x", None)}
        model = fse.nnx.Embed(16, 4, sparse=True, embedding_metadata=metadata, rngs=nnx.Rngs(0))
        before = np.asarray(model.embedding[...])
        optimizer = nnx.Optimizer(model, fse.row_sparse(optax.adamw(0.1), "catch_up"), wrt=nnx.Param)
        ids = jnp.array([1, 3, 3, 7])

        @nnx.jit
        def step(model, optimizer):
            _, grads = fse.row_value_and_grad(lambda m: jnp.sum(m(ids) ** 2))(model)
            optimizer.update(model, grads)

        step(model, optimizer)
        step(model, optimizer)
        moved = (np.asarray(model.embedding[...]) != before).any(axis=1)
        assert np.flatnonzero(moved).tolist() == [1, 3, 7]


def test_specs_can_be_mapped_over_the_state():
    tx = fse.row_sparse(optax.adam(0.1), "catch_up", mask={"embedding": True, "kernel": False})
    specs = optax.tree.map_params(tx, lambda _: "param", tx.init(params_of()), transform_non_params=lambda _: "other")
    assert specs.inner_state[0].mu == {"embedding": "param", "kernel": "param"} and specs.count == "other"


def test_catching_up_decays_both_moments_of_adam():
    params, inner = params_of(), optax.adam(0.01)
    _, state = trained(fse.row_sparse(inner, "catch_up"), SKIPPING_STEPS, params, of_step=rare_then_all)
    _, lazy = trained(fse.row_sparse(inner), SKIPPING_STEPS, params, of_step=rare_then_all)
    want = inner.init(params)
    for step in range(SKIPPING_STEPS):
        _, want = inner.update(dense(rare_then_all(step)), want, params)
    for name in ("mu", "nu"):
        moments = [getattr(s[0], name)["embedding"] for s in (state.inner_state, want, lazy)]
        np.testing.assert_allclose(moments[0], moments[1], rtol=1e-4, atol=1e-6)
        assert np.abs(moments[2] - moments[1]).max() > 5e-5


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.01)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9)),
    ],
    ids=["adam", "momentum"],
)
def test_catching_up_needs_decoupled_weight_decay(tx):
    tx = fse.row_sparse(tx, "catch_up")
    with pytest.raises(ValueError, match=r"multiplies moments and weights by factors.*'lazy'"):
        tx.update(gradients(0), tx.init(params_of()), params_of())


def test_catching_up_needs_history_and_a_row_gradient_for_every_table():
    tx = fse.row_sparse(optax.adam(0.1), "catch_up", mask={"embedding": False, "kernel": False})
    with pytest.raises(ValueError, match=r"the state has no history of its rows.*`mask`"):
        tx.update(gradients(0), tx.init(params_of()), params_of())
    params = params_of() | {"pos_embedding": jnp.ones((V, D))}
    tx = fse.row_sparse(optax.adam(0.1), "catch_up")
    grads = gradients(0) | {"pos_embedding": jnp.ones((V, D))}
    with pytest.raises(ValueError, match=r"'pos_embedding' is a table by.*but this step has no row gradient"):
        tx.update(grads, tx.init(params), params)


# --- cost and sharding ---


def compiled_step(num_rows, tokens, features, tx):
    embed = fse.linen.Embed(num_rows, features, sparse=True)

    def step(params, state, ids):
        def loss(params):
            return jnp.sum(jnp.tanh(embed.apply({"params": params}, ids)) ** 2)

        value, grads = fse.row_value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = {"embedding": jax.ShapeDtypeStruct((num_rows, features), jnp.float32)}
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, ids).compile()


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("tokens", "features"), [(4096, 1024), (256, 512), (100, 64)])
def test_temporary_memory_grows_with_the_tokens_and_not_with_the_table(tokens, features):
    small, large = (
        compiled_step(n, tokens, features, fse.row_sparse(optax.adam(1e-3))).memory_analysis().temp_size_in_bytes
        for n in (50_304, 503_040)
    )
    assert small == large < 4 * tokens * features * 4 + 1e6


def test_the_loop_over_chunks_keeps_no_arrays_of_other_parameters():
    """The loop sees zeros in the place of other parameters, so that the compiler removes their computation."""
    params = {"embedding": jnp.zeros((5000, 64)), "kernel": jnp.zeros((2048, 2048))}
    tx = fse.row_sparse(optax.adam(1e-3))
    grads = {
        "embedding": fse.SparseRows.of_lookups(jnp.arange(4096), jnp.ones((4096, 64)), 5000),
        "kernel": params["kernel"],
    }

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), grads)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4e6 and memory.alias_size_in_bytes > 0.99 * (3 * 4 * (5000 * 64 + 2048 * 2048))


@pytest.mark.one_in(10, start=1)
@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x"), PartitionSpec("x", "y")], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_table_makes_the_same_step_and_keeps_its_sharding(kind, spec):
    tx = fse.row_sparse(optax.adam(0.01), "catch_up" if kind == AxisType.Auto else "lazy")
    params, grads = {"embedding": params_of()["embedding"]}, {"embedding": gradients(0)["embedding"]}

    def update(params, state, grads):
        return tx.update(grads, state, params)

    want, _ = jax.jit(update)(params, tx.init(params), grads)
    want = optax.apply_updates(params, want)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        state = tx.init(placed)
        updates, state = jax.jit(update)(placed, state, grads)
        new = jax.jit(optax.apply_updates)(placed, updates)
    np.testing.assert_allclose(new["embedding"], want["embedding"], rtol=1e-6, atol=1e-7)
    if kind == AxisType.Explicit:
        assert new["embedding"].sharding.spec == spec
        assert state[0].mu["embedding"].sharding.spec == spec


def test_describe_reports_the_wrapped_optimizer():
    report = fse.describe(fse.row_sparse(fse.adamw8bit(1e-3)), params_of())
    assert {row.path: row.bits for row in report.rows} == {"embedding": 32, "kernel": 8}


def test_a_step_with_row_gradients_is_compiled_once():
    tx, params = fse.row_sparse(optax.adam(0.1)), params_of()
    traces = []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(3):
        params, state = step(params, state, gradients(i))
    assert len(traces) == 1


def test_hyperparameters_can_be_injected_around_row_sparse():
    def make(learning_rate):
        return fse.row_sparse(optax.adam(learning_rate))

    tx, params = optax.inject_hyperparams(make)(0.1), params_of()
    updates, _ = jax.jit(tx.update)(gradients(0), tx.init(params), params)
    want, _ = fse.row_sparse(optax.adam(0.1)).update(gradients(0), optax.adam(0.1).init(params), params)
    assert_close(dense(updates), dense(want))


@pytest.mark.parametrize("semantics", ["lazy", "catch_up"])
@pytest.mark.parametrize("bits", [32, "bf16", "rowwise"])
def test_a_state_of_another_number_of_rows_is_named(semantics, bits):
    rows = lambda n: {"embedding": fse.SparseRows.of_lookups(jnp.array([1, n - 1]), jnp.ones((2, 8)), n)}  # noqa: E731
    table, grown = ({"embedding": jnp.ones((n, 8))} for n in (100, 104))
    tx = fse.row_sparse(fse.adamw8bit(1e-2, rules=(("embedding", bits),)), semantics)
    _, state = tx.update(rows(100), tx.init(table), table)
    with pytest.raises(ValueError, match="The state of 'embedding' has 100 rows, but the table has 104"):
        tx.update(rows(104), state, grown)


@pytest.mark.parametrize("norm", [optax.tree.norm, lambda g: optax.clip_by_global_norm(1.0).update(g, None)])
def test_norms_of_optax_name_ours_under_jit(norm):
    grads = {"embedding": fse.SparseRows.of_lookups(jnp.array([1, 2]), jnp.ones((2, 8)), 100)}
    with pytest.raises(TypeError, match=r"fse\.global_norm and fse\.clip_by_global_norm"):
        jax.jit(norm)(grads)
