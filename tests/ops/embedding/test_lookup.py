"""Compares lookups and their gradients with NumPy and with sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_stable_embed.ops.embedding import gather as _gather
from flax_stable_embed.ops.embedding.lookup import lookup, normalized_lookup, renorm

TABLE = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
IDS = np.array([[1, 4, 4], [0, 4, 1]], np.int32)
COTANGENT = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)


def table_gradient(table, ids, cotangent, **options):
    @jax.jit
    def gradient(table, cotangent):
        rows, pullback = jax.vjp(lambda table: lookup(table, ids, **options), table)
        return pullback(cotangent.astype(rows.dtype))[0]

    return gradient(table, np.asarray(cotangent, np.float32))


# --- the rows of ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_ids_of_every_integer_type_find_their_rows(dtype):
    table = np.arange(300, dtype=np.float32)[:, None]
    limits = np.iinfo(dtype)
    ids = np.array([0, 1, 100, 127, limits.min, limits.max, 299 if limits.max > 299 else 5], dtype)
    wanted = [int(i) + 300 if -300 <= i < 0 else int(i) if 0 <= i < 300 else np.nan for i in ids]
    np.testing.assert_array_equal(lookup(table, ids)[:, 0], np.array(wanted, np.float32))
    if ids.itemsize < 8:
        np.testing.assert_array_equal(lookup(table, jnp.asarray(ids))[:, 0], np.array(wanted, np.float32))


def test_64_bit_ids_do_not_wrap_into_the_table():
    table = jnp.arange(300.0)[:, None]
    ids = [2**32, 2**32 + 5, -(2**32), 2**31, 7, -1]
    wanted = [np.nan, np.nan, np.nan, np.nan, 7, 299]
    np.testing.assert_array_equal(lookup(table, np.array(ids, np.int64))[:, 0], wanted)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(lookup(table, jnp.array(ids, jnp.int64))[:, 0], wanted)


def test_ids_outside_the_table_give_nan_and_no_gradient():
    ids = np.array([-6, -7, 5, 6, 2**31 - 1, -(2**31)])
    rows = lookup(TABLE, ids)
    np.testing.assert_array_equal(np.isnan(rows).all(axis=1), [False, True, False, True, True, True])
    np.testing.assert_array_equal(rows[jnp.array([0, 2])], TABLE[[0, 5]])
    for options in ({}, {"padding_idx": 1}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}):
        gradient = table_gradient(TABLE, ids, np.ones((6, 4)), **options)
        np.testing.assert_array_equal(gradient, np.isin(np.arange(6), [0, 5])[:, None] * np.ones((6, 4)))


def test_any_shape_of_ids_and_any_size_of_table_works():
    for shape in ((), (0,), (3, 0, 2), (2, 1, 3)):
        ids = np.zeros(shape, np.int32)
        np.testing.assert_array_equal(lookup(TABLE, ids), TABLE[ids])
        for options in ({"padding_idx": 5}, {"max_norm": 1.0, "scale_grad_by_freq": True}):
            assert table_gradient(TABLE, ids, np.ones((*shape, 4)), **options).shape == (6, 4)
    for options in ({}, {"scale_grad_by_freq": True}):
        empty = np.zeros((0, 4), np.float32)
        assert np.isnan(lookup(empty, np.arange(3), **options)).all()
        assert table_gradient(empty, np.arange(3), np.ones((3, 4)), **options).shape == (0, 4)
    assert lookup(np.zeros((3, 0), np.float32), IDS, max_norm=1.0).shape == (2, 3, 0)


def test_a_table_of_one_row_ignores_ids_only_without_options():
    one, ids = jnp.ones((1, 2)), np.array([0, 5, -9])
    np.testing.assert_array_equal(lookup(one, ids), np.ones((3, 2)))
    np.testing.assert_array_equal(table_gradient(one, ids, np.ones((3, 2))), [[3, 3]])
    for options in ({"padding_idx": 0}, {"max_norm": 9.0}, {"scale_grad_by_freq": True}):
        np.testing.assert_array_equal(np.isnan(lookup(one, ids, **options))[:, 0], [False, True, True])


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), jnp.array([0.5], jnp.bfloat16)], ids=str)
def test_ids_that_are_not_integers_raise_flax_error_and_name_the_dtype(ids):
    with pytest.raises(ValueError, match=rf"^Input type must be an integer or unsigned integer\. Got {ids.dtype}"):
        lookup(TABLE, ids)


@pytest.mark.parametrize("ids", [[1, 2], 3, (0,), None])
def test_ids_that_are_not_an_array_raise_a_clear_error(ids):
    with pytest.raises(TypeError, match=r"`inputs` must be an array of integer ids, got .*jnp\.asarray"):
        lookup(TABLE, ids)


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_gradient_equals_the_sum_in_the_docstring(padding_idx, by_frequency, max_norm):
    expected = np.zeros_like(TABLE)
    for id, cotangent in zip(IDS.ravel(), COTANGENT.reshape(-1, 4), strict=True):
        if id != padding_idx:
            expected[id] += cotangent / (np.sum(id == IDS) if by_frequency else 1)
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": by_frequency, "max_norm": max_norm}
    found = table_gradient(TABLE, IDS, COTANGENT, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [256, 257, 65536])
def test_a_repeated_token_gets_its_exact_count(count):
    ids = np.zeros(count, np.int32)
    to_bfloat16 = jax.jit(jax.grad(lambda table: lookup(table, ids).astype(jnp.bfloat16).astype(jnp.float32).sum()))
    assert to_bfloat16(jnp.ones((2, 1)))[0, 0] == count
    from_bfloat16 = jax.jit(jax.grad(lambda table: lookup(table, ids).astype(jnp.float32).sum()))
    assert from_bfloat16(jnp.ones((2, 1), jnp.bfloat16))[0, 0] == jnp.bfloat16(count)  # rounded once


def test_asking_for_float32_rows_of_a_bfloat16_table_keeps_the_terms_unrounded():
    term = 1 + 2**-9  # bfloat16 rounds it to 1, but not the sum of 256 of them
    table, ids, cotangent = jnp.ones((2, 1), jnp.bfloat16), np.zeros(256, np.int32), np.full((256, 1), term)
    assert table_gradient(table, ids, cotangent)[0, 0] == 256
    assert lookup(table, ids, dtype=jnp.float32).dtype == jnp.float32
    assert table_gradient(table, ids, np.full((256, 1), 1 + 2**-7 + 2**-9), dtype=jnp.float32)[0, 0] == 258
    assert table_gradient(table, ids, cotangent, dtype=jnp.float32).dtype == jnp.bfloat16


def test_the_padding_row_has_no_gradient_whatever_its_cotangent():
    cotangent = np.array([[np.inf, np.nan], [1, 2]])
    found = table_gradient(jnp.ones((2, 2)), np.array([0, 1]), cotangent, padding_idx=0)
    np.testing.assert_array_equal(found, [[0, 0], [1, 2]])


def test_infinite_weights_are_returned_unchanged():
    table = jnp.array([[jnp.inf, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(lookup(table, np.array([0, 1]), padding_idx=1, scale_grad_by_freq=True), table)


def test_forward_mode_and_second_derivatives_agree_with_the_gradient():
    def objective(table):
        return jnp.sum(lookup(table, IDS, padding_idx=4, scale_grad_by_freq=True) ** 2)

    tangent = jnp.ones_like(TABLE)
    gradient = jax.grad(objective)(TABLE)
    np.testing.assert_allclose(jax.jvp(objective, (TABLE,), (tangent,))[1], gradient.sum(), rtol=1e-6)
    _, hessian_product = jax.jvp(jax.grad(objective), (jnp.asarray(TABLE),), (tangent,))
    # Row 1 appears twice: its gradient is (2 y + 2 y) / 2, and there the rule moves each y by half the tangent.
    np.testing.assert_array_equal(hessian_product[:, 0], [2, 1, 0, 0, 0, 0])


def test_frequency_is_counted_per_example_under_vmap():
    ids = np.array([[1, 1], [1, 2]])

    def total(table):
        return jax.vmap(lambda row: lookup(table, row, scale_grad_by_freq=True))(ids).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones((3, 1)))[:, 0], [0, 2, 1])


def test_inference_does_not_count_tokens():
    options = {"padding_idx": 1, "scale_grad_by_freq": True, "max_norm": 1.0}
    text = jax.jit(lambda table, ids: lookup(table, ids, **options)).lower(TABLE, IDS).as_text()
    assert "scatter" not in text


def test_the_lookup_of_a_16_bit_table_makes_no_float32_copy():
    table = jnp.zeros((4096, 64), jnp.bfloat16)
    compiled = jax.jit(lambda table, ids: lookup(table, ids, dtype=jnp.float32)).lower(table, IDS).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 64


# --- under a mesh ----------------------------------------------------------------------------------------------------


def test_out_sharding_places_the_rows_under_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    table = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("a", "b")))
    ids = np.arange(8)
    assert jax.typeof(lookup(table, ids)).sharding.spec == P(None, "b")  # also without a mesh in context
    with jax.set_mesh(mesh):
        for wanted in (P("b"), P(("a", "b"), None), P("a", "b")):
            for out_sharding in (wanted, NamedSharding(mesh, wanted)):
                options = {"out_sharding": out_sharding, "scale_grad_by_freq": True, "padding_idx": 1}

                def rows_twice(table, options=options):
                    rows = lookup(table, ids, **options)
                    return rows.sum(), rows

                gradient, rows = jax.jit(jax.grad(rows_twice, has_aux=True))(table)
                assert jax.typeof(rows).sharding.spec == P(*wanted, *[None] * (2 - len(wanted)))
                assert jax.typeof(gradient).sharding.spec == P("a", "b")
                np.testing.assert_array_equal(np.asarray(gradient)[:, 0], [1, 0, 1, 1, 1, 1, 1, 1])


def test_out_sharding_is_ignored_where_no_axis_is_explicit():
    np.testing.assert_array_equal(lookup(TABLE, IDS, out_sharding=P("a")), TABLE[IDS])
    with jax.set_mesh(jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))):
        np.testing.assert_array_equal(lookup(TABLE, IDS, out_sharding=P("a")), TABLE[IDS])


def test_lookup_works_inside_shard_map():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def local(table, ids):
        return lookup(table, ids, padding_idx=1, scale_grad_by_freq=True)

    everywhere = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("a")), out_specs=P("a"))
    ids = np.arange(16) % 4
    np.testing.assert_array_equal(jax.jit(everywhere)(TABLE, ids), TABLE[ids])
    gradient = jax.jit(jax.grad(lambda table: everywhere(table, ids).sum()))(TABLE)
    np.testing.assert_array_equal(gradient[:, 0], [4, 0, 4, 4, 0, 0])


# --- renorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0, 0.5, 1, 1.5, 2, 3, np.inf])
def test_long_rows_get_the_largest_norm_and_short_ones_stay(p):
    rows = TABLE * np.array([4, 2, 1, 0.1, 0.01, 0])[:, None].astype(np.float32)
    norms = np.linalg.norm(rows.astype(np.float64), ord=p, axis=1)
    limit = float(np.median(norms))
    long = norms > limit
    found = np.asarray(renorm(jnp.asarray(rows), limit, p))
    np.testing.assert_allclose(found[long], rows[long] * (limit / norms[long])[:, None], rtol=1e-6)
    np.testing.assert_array_equal(found[~long], rows[~long])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_of_half_precision_rows_are_taken_in_float32(dtype):
    rows = jnp.full((1, 4096), 10.0, dtype)  # the sum of squares, 409600, is infinite in float16
    found = renorm(rows, 64.0)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), np.ones((1, 4096)))


def test_renorm_keeps_zero_rows_nan_rows_and_empty_ones():
    rows = jnp.array([[0.0, 0.0], [jnp.nan, 9.0]])
    np.testing.assert_array_equal(renorm(rows, 1.0), rows)
    assert renorm(jnp.zeros((0, 3)), 1.0, np.inf).shape == (0, 3)


def test_renorm_of_integers_raises():
    with pytest.raises(TypeError, match="`max_norm` needs a floating point table, got int32"):
        renorm(jnp.ones((2, 2), jnp.int32), 1.0)


# --- how rows are looked up -------------------------------------------------------------------------------------------


def value_and_gradient(table, ids, **options):
    """The rows, and the gradient of their product with fixed numbers."""
    rows, pullback = jax.vjp(lambda table: lookup(table, ids, **options), table)
    cotangent = np.random.default_rng(1).standard_normal(rows.shape)
    return rows, pullback(jnp.asarray(cotangent, rows.dtype))[0]


ALL_IDS = jnp.array([[1, 4, 4, 3], [49, -1, 1, 60]])
OPTIONS = [{}, {"padding_idx": 4}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}, {"dtype": jnp.bfloat16}]


@pytest.mark.one_in(10)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_a_one_hot_product_gives_the_rows_of_a_gather_and_their_gradient(options, dtype, mode):
    table = jnp.asarray(np.random.default_rng(0).standard_normal((50, 8)), dtype)
    found, want = (value_and_gradient(table, ALL_IDS, method=m, mode=mode, **options) for m in ("one_hot", "take"))
    np.testing.assert_array_equal(*(x[0].astype(jnp.float32) for x in (found, want)))
    assert found[1].dtype == want[1].dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(*(x[1].astype(jnp.float32) for x in (found, want)), rtol=tolerance, atol=tolerance)


def test_a_one_hot_product_sums_the_gradient_in_float32():
    table, ids = jnp.zeros((3, 1), jnp.bfloat16), jnp.ones(4096, jnp.int32)
    gradient = jax.grad(lambda t: lookup(t, ids, method="one_hot").astype(jnp.float32).sum())(table)
    assert gradient[1, 0] == 4096


def test_a_one_hot_product_has_neither_gather_nor_scatter():
    text = jax.jit(lambda t: value_and_gradient(t, ALL_IDS, method="one_hot")).lower(jnp.ones((50, 8))).as_text()
    assert "gather" not in text and "scatter" not in text and "dot_general" in text


def test_clip_takes_the_nearest_row():
    table = jnp.arange(5.0)[:, None]
    for ids in (jnp.array([-7, -1, 0, 4, 5, 99]), np.array([-(2**40), -1, 0, 4, 5, 2**40])):
        rows, gradient = value_and_gradient(table, ids, mode="clip")
        assert rows[:, 0].tolist() == [0, 0, 0, 4, 4, 4]
        terms = np.random.default_rng(1).standard_normal((6, 1)).astype(np.float32)
        np.testing.assert_allclose(gradient[0], terms[:3].sum(0), rtol=1e-6)
        np.testing.assert_allclose(gradient[4], terms[3:].sum(0), rtol=1e-6)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modes_give_the_same_bits_for_ids_inside_the_table(options):
    table = jnp.asarray(np.random.default_rng(0).standard_normal((50, 8)), jnp.float32)
    ids = jnp.array([[1, 4, 4, 3], [49, 0, 1, 7]], jnp.uint8)
    for mode in ("promise_in_bounds", "clip"):
        found, want = (value_and_gradient(table, ids, mode=m, **options) for m in (mode, "fill"))
        jax.tree.map(np.testing.assert_array_equal, found, want)


def test_promise_in_bounds_has_no_mask_over_the_rows():
    def select_ops(mode):
        lowered = jax.jit(lambda t, ids: lookup(t, ids, mode=mode)).lower(jnp.ones((50, 8)), jnp.arange(16))
        return sum("select" in line and "16x8" in line for line in lowered.as_text().splitlines())

    assert (select_ops("fill"), select_ops("clip"), select_ops("promise_in_bounds")) == (1, 0, 0)


@pytest.mark.one_in(4, start=1)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sorting_the_terms_gives_the_same_gradient(options, monkeypatch):
    table = jnp.asarray(np.random.default_rng(0).standard_normal((50, 8)), jnp.float32)
    want = value_and_gradient(table, ALL_IDS, **options)
    monkeypatch.setattr(_gather, "_sorts", lambda options, table: True)
    found = value_and_gradient(table, ALL_IDS, **options)
    np.testing.assert_array_equal(*(x[0].astype(jnp.float32) for x in (found, want)))
    np.testing.assert_allclose(found[1], want[1], rtol=1e-6, atol=1e-6)
    _, tangent = jax.jvp(lambda t: lookup(t, ALL_IDS, **options), (table,), (jnp.ones_like(table),))
    assert jnp.isfinite(tangent).all()


@pytest.mark.recent_compiler
def test_stable_embed_forward_writes_only_the_rows_and_the_result():
    """Mean, variance, scale and bias need no arrays of that size (on CPU, for arrays large enough to be fused)."""

    def forward(table, scale, bias, ids):
        return normalized_lookup(table, ids, scale, bias)

    shapes = [(5000, 512), (512,), (512,)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes] + [jax.ShapeDtypeStruct((4096,), jnp.int32)]
    text = jax.jit(forward).lower(*args).compile().as_text()
    entry = text[text.index("ENTRY") :].splitlines()
    written = [
        line for line in entry if "fusion(" in line and ("= f32[4096,512]" in line or "= f32[4096,1,512]" in line)
    ]
    assert len(written) == 2
