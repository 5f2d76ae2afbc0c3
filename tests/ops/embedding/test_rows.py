"""Tests rows of a table: distinct numbers, sums over equal ids, and the arithmetic of dense arrays."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_stable_embed.ops.embedding.rows import SparseRows, distinct, find_rows, set_rows


def rows(ids, num_rows=9, features=3, seed=0, dtype=jnp.float32):
    terms = np.random.default_rng(seed).standard_normal((*np.shape(ids), features))
    return SparseRows.of_lookups(jnp.asarray(ids, jnp.int32), jnp.asarray(terms, dtype), num_rows)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 1000])
@pytest.mark.one_in(4)
def test_distinct_equals_numpys_unique(size, num_rows):
    for seed in range(5):
        numbers = np.random.default_rng([seed, size]).integers(0, num_rows + 1, size)  # num_rows: outside
        found = np.asarray(distinct(jnp.asarray(numbers, jnp.int32), num_rows))
        want = np.unique(numbers[numbers < num_rows])
        assert found.size == min(size, num_rows)
        np.testing.assert_array_equal(found[: len(want)], want)
        assert (np.diff(found) > 0).all() and (found[len(want) :] >= num_rows).all()


def test_find_rows_gives_the_place_of_a_number_and_past_the_end_for_missing_ones():
    indices = distinct(jnp.array([4, 2, 4, 9]), 7)  # 2, 4 and two of padding
    assert find_rows(indices, jnp.array([[2, 4, 3], [0, 7, 8]]), 7).tolist() == [[0, 1, 4], [4, 4, 4]]
    assert find_rows(jnp.zeros(0, jnp.int32), jnp.array([2]), 7).tolist() == [0]


@pytest.mark.parametrize("ids", [[3, 1, 3, -1, 9, -10, 8], [[2, 2], [2, 2]], [], 5], ids=str)
@pytest.mark.one_in(4)
def test_terms_are_summed_over_equal_ids(ids):
    terms = np.random.default_rng(0).standard_normal((*np.shape(ids), 4)).astype(np.float32)
    dense = np.zeros((9, 4), np.float32)
    for i, term in zip(np.ravel(ids).astype(int), terms.reshape(-1, 4)):
        if -9 <= i < 9:
            dense[i] += term
    found = SparseRows.of_lookups(np.asarray(ids, np.int32), terms, 9)
    np.testing.assert_allclose(found.to_dense(), dense, rtol=1e-6)
    assert found.shape == (9, 4) and found.values.shape == (min(np.size(ids), 9), 4)
    padding = found.indices >= 9
    assert not found.values[padding].any()


def test_terms_in_half_precision_are_summed_in_float32():
    found = SparseRows.of_lookups(jnp.zeros(4096, jnp.int32), jnp.ones((4096, 1), jnp.bfloat16), 2)
    assert found.dtype == jnp.bfloat16 and found.to_dense()[0, 0] == 4096


def test_arithmetic_equals_that_of_dense_arrays():
    a, b = rows([1, 5, 5, 2], seed=1), rows([8, 2, 2], seed=2)
    table = jnp.asarray(np.random.default_rng(3).standard_normal((9, 3)), jnp.float32)
    dense_a, dense_b = a.to_dense(), b.to_dense()
    for found, want in [
        ((a + b).to_dense(), dense_a + dense_b),
        ((a - b).to_dense(), dense_a - dense_b),
        ((-a).to_dense(), -dense_a),
        ((2 * a * jnp.float32(3)).to_dense(), 6 * dense_a),
        ((a / 4).to_dense(), dense_a / 4),
        (table + a, table + dense_a),
        (a + table, table + dense_a),
        (table - a, table - dense_a),
        (np.asarray(table) + a, table + dense_a),
    ]:
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
    assert (a + b).values.shape == (7, 3)


def test_adding_rows_rounds_a_half_precision_table_once():
    table = jnp.full((9, 3), 256, jnp.bfloat16)  # of spacing 2: the sum in bfloat16 would forget 1.5
    update = SparseRows.of_lookups(jnp.array([4]), jnp.full((1, 3), 1.5), 9)
    assert (table + update).dtype == jnp.bfloat16
    assert (table + update)[4, 0] == jnp.asarray(257.5, jnp.bfloat16) and (table + update)[3, 0] == 256


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: jnp.zeros((8, 3)) + x, r"\(9, 3\) cannot be added to an array of \(8, 3\)"),
        (lambda x: x + rows([1], num_rows=8), r"shapes \(9, 3\) and \(8, 3\) cannot be added"),
        (lambda x: x * jnp.ones(3), r"multiplied by numbers, got an array of shape \(3,\)"),
        (lambda x: SparseRows.of_lookups(jnp.ones(2), jnp.ones((2, 3)), 9), "`ids` must be integers, got float32"),
        (
            lambda x: SparseRows.of_lookups(jnp.arange(2), jnp.ones((3, 3)), 9),
            r"shape of `ids`, \(2,\), and an axis of features",
        ),
    ],
)
def test_operands_that_do_not_fit_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(rows([1, 2]))


UNAWARE = {
    "scale": optax.scale(0.5),
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "lion": optax.lion(0.1),
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
    "clip_by_block_rms": optax.clip_by_block_rms(0.1),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "add_noise": optax.add_noise(0.1, 0.5, 0),
    "scale_by_sign": optax.scale_by_sign(),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 2),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "ema": optax.ema(0.9),
    "trust_ratio": optax.scale_by_trust_ratio(),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", UNAWARE)
def test_optax_transforms_raise_instead_of_computing_with_row_numbers(name, jitted):
    tx, params = UNAWARE[name], {"embedding": jnp.ones((9, 3)), "kernel": jnp.ones(2)}
    state, grads = tx.init(params), {"embedding": rows([1, 2]), "kernel": jnp.ones(2)}
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises((TypeError, ValueError, NotImplementedError, AttributeError)):
        update(grads, state, params)


@pytest.mark.parametrize(
    "sum_up",
    [
        optax.tree.norm,
        lambda t: jax.tree.map(jnp.add, t, t),
        lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t),
    ],
    ids=["norm", "add", "astype"],
)
def test_arithmetic_on_the_leaves_of_sparse_rows_raises(sum_up):
    with pytest.raises((TypeError, NotImplementedError)):
        sum_up({"embedding": rows([1, 2])})


def test_errors_of_jax_name_the_functions_that_support_row_gradients():
    with pytest.raises(TypeError, match=r"fse\.SparseRows, for fse\.row_sparse"):
        jax.tree.map(lambda x: 0.5 * x, rows([1, 2]))


def test_row_numbers_that_were_cast_raise():
    rows = SparseRows.of_lookups(jnp.array([1, 2]), jnp.ones((2, 3)), 5)
    bad = optax.tree.zeros_like(rows, dtype=jnp.float32)
    with pytest.raises(TypeError, match="The row numbers of a SparseRows were cast to float32"):
        bad.to_dense()


def test_sparse_rows_work_in_jit_scan_cond_and_vmap():
    x = rows([1, 5, 5])
    twice = jax.jit(lambda x: x * 2)(x)
    np.testing.assert_array_equal(twice.to_dense(), 2 * x.to_dense())
    stacked = jax.lax.scan(lambda _, k: (None, x * k), None, jnp.arange(3.0))[1]
    np.testing.assert_array_equal(stacked.summed_over_first_axis().to_dense(), 3 * x.to_dense())
    chosen = jax.lax.cond(True, lambda: x, lambda: x * 0)
    np.testing.assert_array_equal(chosen.indices, x.indices)
    many = jax.vmap(lambda k: jnp.zeros((9, 3)) + x * k)(jnp.arange(2.0))
    np.testing.assert_array_equal(many[1], x.to_dense())
    assert "9 rows" in repr(x) and jax.tree.structure(x) == jax.tree.structure(twice)


def through_orbax(zeros, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "zeros", zeros)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "zeros", zeros)


ZEROS = {
    "eager": lambda zeros, rows, folder: zeros,
    "jit": lambda zeros, rows, folder: jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x))(rows),
    "donated": lambda zeros, rows, folder: jax.jit(lambda x: x, donate_argnums=0)(jax.tree.map(jnp.copy, zeros)),
    "where": lambda zeros, rows, folder: jax.tree.map(lambda x, z: jnp.where(False, x, z), rows, zeros),
    "cond": lambda zeros, rows, folder: jax.lax.cond(jnp.array(False), lambda: rows, lambda: zeros),
    "scan": lambda zeros, rows, folder: jax.lax.scan(lambda c, _: (c, None), zeros, None, length=2)[0],
    "pickle": lambda zeros, rows, folder: pickle.loads(pickle.dumps(zeros)),
    "orbax": lambda zeros, rows, folder: through_orbax(zeros, folder),
    "a product": lambda zeros, rows, folder: zeros * 2.0,
    "a sum": lambda zeros, rows, folder: zeros + zeros,
}


@pytest.mark.parametrize("how", ZEROS)
def test_zeros_of_rows_are_no_rows(how, tmp_path):
    some = rows([0, 3, 3, 7])
    zeros = ZEROS[how](jax.tree.map(jnp.zeros_like, some), some, tmp_path)
    assert (np.diff(zeros.indices) > 0).all() and (np.asarray(zeros.indices) >= 9).all()
    table = jnp.ones((9, 3))
    np.testing.assert_array_equal(table + zeros, table)
    np.testing.assert_array_equal((zeros + some).to_dense(), some.to_dense())
    np.testing.assert_array_equal(set_rows(table, zeros.indices, zeros.values), table)


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x"), PartitionSpec("x", "y")], ids=str)
@pytest.mark.one_in(5)
def test_adding_rows_to_a_table_on_an_explicit_mesh_keeps_its_sharding(spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        table = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, spec))
        x = SparseRows.of_lookups(jnp.array([1, 7, 1]), jnp.ones((3, 4)), 8)
        new = jax.jit(lambda table, x: table + x)(table, x)
        assert new.sharding.spec == spec
        np.testing.assert_array_equal(new, np.ones((8, 4)) + np.asarray(x.to_dense()))
