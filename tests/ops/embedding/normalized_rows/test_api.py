"""Compares the kernels of normalized rows with the reference, under every transformation of JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import flax_stable_embed as fse
from flax_stable_embed.ops.embedding.normalized_rows import pallas_gpu, pallas_tpu
from flax_stable_embed.ops.embedding.normalized_rows.api import normalized_rows
from flax_stable_embed.ops.embedding.normalized_rows.capabilities import LEAST_FEATURES, MOST_FEATURES
from flax_stable_embed.ops.embedding.normalized_rows.reference import Options, reference

RUN = pallas_gpu.RUN
FLOAT32 = np.dtype(np.float32)


def case(rows=9, features=12, tokens=40, dtype=jnp.float32, out=jnp.float32, padding_idx=None, outside=False):
    """Returns options, parameters, row numbers and a gradient of the output. Lower rows have more tokens."""
    keys = jax.random.split(jax.random.key(rows * features + tokens), 5)
    table = jax.random.normal(keys[0], (rows, features)).astype(dtype)
    scale, bias = jax.random.normal(keys[1], (2, features))
    row_numbers = (jax.random.uniform(keys[2], (tokens,)) ** 3 * rows).astype(jnp.int32)
    if outside:
        row_numbers = row_numbers.at[::7].set(rows)
    dy = jax.random.normal(keys[3], (tokens, features)).astype(out)
    return Options(1e-5, padding_idx, False, np.dtype(out)), (table, scale, bias), row_numbers, dy


CASES = {
    "a run and a bit": {},
    "one run": {"tokens": RUN},
    "one token": {"tokens": 1},
    "one row for many runs": {"rows": 2, "tokens": 5 * RUN},
    "runs that end with a row": {"rows": 3, "tokens": 4 * RUN},
    "more rows than tokens": {"rows": 200, "tokens": 7},
    "features of a power of two": {"features": 64, "tokens": 100},
    "ragged features": {"features": 33, "tokens": 100},
    "padding": {"padding_idx": 0, "tokens": 100},
    "ids outside": {"outside": True, "tokens": 100},
    "ids outside and padding": {"outside": True, "padding_idx": 8, "tokens": 70},
    "bfloat16": {"dtype": jnp.bfloat16, "out": jnp.bfloat16},
    "float16 table": {"dtype": jnp.float16},
    "bfloat16 output": {"out": jnp.bfloat16},
}


LANES, ROWS = pallas_tpu.LANES, pallas_tpu.ROWS
CASES_ON_TPU = {
    "a chunk and a bit": {"tokens": 13},
    "one token": {"tokens": 1},
    "one row for many chunks": {"rows": 2, "tokens": 300},
    "a tile full of tokens": {"rows": ROWS, "tokens": 2 * ROWS},
    "tiles of rows, the last one partly outside": {"rows": 3 * ROWS + 5, "tokens": 100},
    "tiles without tokens": {"rows": 9 * ROWS, "tokens": 7},
    "more tokens than a tile": {"tokens": pallas_tpu.MOST_TOKENS + 9},
    "features that fill registers": {"features": 8 * LANES},
    "padding": {"padding_idx": 0, "tokens": 100},
    "ids outside": {"outside": True, "tokens": 100},
    "ids outside, and a last tile that is full": {"rows": ROWS, "outside": True, "tokens": 100},
    "ids outside and padding": {"outside": True, "padding_idx": 8, "tokens": 70},
    "bfloat16 output": {"out": jnp.bfloat16},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(22, start=3)
def test_the_kernels_for_gpu_equal_the_reference(name):
    assert_equals_the_reference(pallas_gpu, **CASES[name])


@pytest.mark.parametrize("name", CASES_ON_TPU)
@pytest.mark.one_in(20, start=11)
def test_the_kernels_for_tpu_equal_the_reference(name):
    assert_equals_the_reference(pallas_tpu, **{"features": 2 * LANES} | CASES_ON_TPU[name])


@pytest.mark.slow
def test_the_kernels_for_tpu_wait_for_the_copies_they_read():
    """Unwritten memory is NaN, and copies arrive as late as they can."""
    late = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    assert_equals_the_reference(pallas_tpu, late, rows=3 * ROWS + 5, features=2 * LANES, tokens=300, outside=True)


def assert_equals_the_reference(kernels, interpret: Any = True, **of_case):
    options, (table, scale, bias), row_numbers, dy = case(**of_case)
    y = kernels.forward(options, table, scale, bias, row_numbers, interpret=interpret)
    expected, pullback = jax.vjp(lambda *args: reference(options, *args, row_numbers), table, scale, bias)
    gradients = kernels.gradient(options, dy, table, scale, row_numbers, interpret=interpret)
    eps = {2: 2**-7, 4: 3e-6}
    for ours, theirs in zip((y, *gradients), (expected, *pullback(dy))):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        largest = np.abs(theirs).max(initial=0.0, where=~np.isnan(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=eps[y.dtype.itemsize] * largest + 1e-12)
    assert np.isnan(np.asarray(y, np.float32)).any() == of_case.get("outside", False)


def test_rows_split_into_runs_of_tokens_sum_up():
    """By hand: with scale 1, y = (x - mean) r. The gradient of a row that all tokens share is that of their sum."""
    options, tokens = Options(1.0, None, False, FLOAT32), 2 * RUN + 3
    table, ones = jnp.array([[3.0, 5.0], [0.0, 0.0]]), jnp.ones(2)
    dy = jnp.tile(jnp.array([[1.0, 0.0]]), (tokens, 1))
    d_table, d_scale, d_bias = pallas_gpu.gradient(
        options, dy, table, ones, jnp.zeros(tokens, jnp.int32), interpret=True
    )
    # x - mean = (-1, 1), r = (1 + 1)^-1/2, u = (-r, r): d x = r (h - mean(h) - u mean(h u)), h = (tokens, 0)
    r = 2**-0.5
    along = -tokens * r / 2
    by_hand = [r * (tokens / 2 + r * along), r * (-tokens / 2 - r * along)]
    np.testing.assert_allclose(d_table, [by_hand, [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(d_scale, [-tokens * r, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(d_bias, [tokens, 0.0])


def test_nan_in_one_row_does_not_reach_other_rows_on_tpu():
    """Rows without tokens are never read, and neighboring rows keep their gradients."""
    options, (table, scale, bias), _, _ = case(rows=5, features=LANES)
    table, row_numbers = table.at[jnp.array([1, 3])].set(jnp.nan), jnp.array([0, 1, 2, 0], jnp.int32)
    dy = jnp.ones((4, LANES)).at[1, 0].set(jnp.inf)
    y = pallas_tpu.forward(options, table, scale, bias, row_numbers, interpret=True)
    np.testing.assert_array_equal(np.isnan(y).any(axis=1), [False, True, False, False])
    d_table, *_ = pallas_tpu.gradient(options, dy, table, scale, row_numbers, interpret=True)
    np.testing.assert_array_equal(np.isnan(d_table).any(axis=1), [False, True, False, False, False])
    np.testing.assert_array_equal(d_table[3:], 0.0)


def primitives_of(f, *args):
    return {equation.primitive.name for equation in jax.make_jaxpr(f)(*args).eqns}


@pytest.fixture
def one_gpu(monkeypatch):
    one_device_of(monkeypatch, "gpu")


@pytest.fixture
def one_tpu(monkeypatch):
    one_device_of(monkeypatch, "tpu")


def one_device_of(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


# --- the primitives --------------------------------------------------------------------------------------------------


def both():
    """Returns the operation and its reference, as functions from parameters to a number."""
    options, parameters, row_numbers, _ = case(padding_idx=2)

    def loss(f):
        return lambda *args: jnp.sum(jnp.sin(f(options, *args, row_numbers)))

    return loss(normalized_rows), loss(reference), parameters


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


TRANSFORMED = {
    "value": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(f, (0, 1, 2)),
    "grad of a jit": lambda f: jax.grad(jax.jit(f), (0, 1, 2)),
    "gradient of the scale alone": lambda f: jax.grad(f, 1),
    "gradient of the table alone": lambda f: jax.grad(f, 0),
    "jvp": lambda f: lambda *args: jax.jvp(f, args, args),
    "linearize": lambda f: lambda *args: jax.linearize(f, *args)[1](*args),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1, 2)),
    "reverse over reverse": lambda f: jax.grad(lambda *args: jnp.sum(jax.grad(f)(*args) ** 2), (0, 1, 2)),
    "forward over reverse": lambda f: lambda *args: jax.jvp(jax.grad(f, (0, 1)), args, args)[1],
    "second derivatives under jit": lambda f: jax.jit(jax.hessian(f, 1)),
    "grad of the grad of a checkpoint": lambda f: jax.grad(lambda *a: jnp.sum(jax.grad(jax.checkpoint(f))(*a) ** 2)),
    "vmap over scales": lambda f: lambda t, s, b: jax.vmap(f, (None, 0, None))(t, jnp.stack([s, 2 * s]), b),
    "vmap of a gradient": lambda f: lambda t, s, b: jax.vmap(jax.grad(f), (0, None, None))(jnp.stack([t, -t]), s, b),
    "scan": lambda f: lambda *args: jax.lax.scan(lambda c, _: (c + f(*args), None), 0.0, None, length=3)[0],
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.one_in(5)
def test_every_transformation_equals_that_of_the_reference(name):
    ours, theirs, parameters = both()
    close(TRANSFORMED[name](ours)(*parameters), TRANSFORMED[name](theirs)(*parameters))


def test_vmap_over_examples_is_one_longer_lookup():
    """In the backward pass too, so kernels stay."""
    options, parameters, row_numbers, dy = case()
    examples, dy = row_numbers.reshape(8, 5).T, dy.reshape(8, 5, -1)

    def gradients(f):
        def loss(*parameters):
            return jnp.sum(jax.vmap(lambda ids: f(options, *parameters, ids), in_axes=1)(examples) * dy)

        return jax.grad(loss, (0, 1, 2))

    close(gradients(normalized_rows)(*parameters), gradients(reference)(*parameters))
    found = primitives_of(gradients(normalized_rows), *parameters)
    assert {"normalized_rows", "normalized_rows_gradient"} <= found


def test_scale_and_bias_may_have_dtypes_of_their_own():
    options, (table, scale, bias), row_numbers, _ = case()
    args = (table, scale.astype(jnp.bfloat16), bias)
    found, want = (
        jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(options, *a, row_numbers))), (0, 1, 2))(*args)
        for f in (normalized_rows, reference)
    )
    assert [x.dtype for x in found] == [x.dtype for x in args]
    for a, b in zip(found, want):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("one_gpu")
def test_the_operation_runs_without_jit_and_under_debug_nans():
    embed = fse.linen.StableEmbed(11, LEAST_FEATURES)
    params = embed.init(jax.random.key(0), jnp.array([0]))
    with jax.disable_jit():
        assert embed.apply(params, jnp.arange(3)).shape == (3, LEAST_FEATURES)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        embed.apply(params, jnp.array([99]))


@pytest.mark.usefixtures("one_gpu")
def test_a_batch_of_symbolic_size_uses_no_kernel():
    embed = fse.linen.StableEmbed(11, LEAST_FEATURES)
    params = embed.init(jax.random.key(0), jnp.array([0]))
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(embed.apply))(params, jax.ShapeDtypeStruct((batch,), jnp.int32))
    assert exported.out_avals[0].shape == (batch, LEAST_FEATURES)


def test_negative_row_numbers_touch_no_row_even_if_the_caller_promised_none():
    options, (table, scale, _), _, _ = case(rows=5)
    row_numbers = jnp.array([-2, -1, -2, 1], jnp.int32)
    dy = jnp.ones((4, table.shape[1]))
    d_table, *_ = pallas_gpu.gradient(options, dy, table, scale, row_numbers, interpret=True)
    np.testing.assert_array_equal(np.flatnonzero(np.any(np.asarray(d_table), axis=1)), [1])


# --- when it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"padding_idx": 3, "dtype": jnp.bfloat16, "mode": "clip"}, True),
        ({"param_dtype": jnp.bfloat16}, True),
        ({"max_norm": 1.0}, False),
        ({"scale_grad_by_freq": True}, False),
        ({"sparse": True}, False),
        ({"lookup": "one_hot"}, False),
        ({"features": LEAST_FEATURES - 1}, False),
        ({"features": MOST_FEATURES + 1}, False),
        ({"num_embeddings": 1}, False),
        ({"dtype": jnp.float8_e4m3fn}, False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_gpu")
def test_on_one_gpu_a_stable_embedding_is_one_operation(options, expected):
    options = {"num_embeddings": 11, "features": LEAST_FEATURES} | options
    embed, ids = fse.linen.StableEmbed(**options), jnp.arange(6).reshape(2, 3)
    params = embed.init(jax.random.key(0), ids)
    assert ("normalized_rows" in primitives_of(embed.apply, params, ids)) is expected
    in_nnx = fse.nnx.StableEmbed(**options, rngs=fse.nnx.nnx.Rngs(0))
    assert ("normalized_rows" in primitives_of(lambda ids: in_nnx(ids), ids)) is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"padding_idx": 3, "dtype": jnp.bfloat16, "mode": "clip"}, True),
        ({"param_dtype": jnp.bfloat16}, False),
        ({"dtype": jnp.float16}, False),
        ({"features": LEAST_FEATURES + 1}, False),
        ({"max_norm": 1.0}, False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_tpu")
def test_on_one_tpu_a_stable_embedding_is_one_operation(options, expected):
    embed, ids = (
        fse.linen.StableEmbed(**{"num_embeddings": 11, "features": LEAST_FEATURES} | options),
        jnp.arange(6),
    )
    params = embed.init(jax.random.key(0), ids)
    assert ("normalized_rows" in primitives_of(embed.apply, params, ids)) is expected


def test_several_devices_use_a_lookup_and_a_norm():
    embed, ids = fse.linen.StableEmbed(11, LEAST_FEATURES), jnp.arange(6)
    params = embed.init(jax.random.key(0), ids)
    assert "normalized_rows" not in primitives_of(embed.apply, params, ids)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_the_operation_equals_a_lookup_and_a_norm(one_gpu, monkeypatch, mode):
    options = {"padding_idx": 0, "mode": mode, "dtype": jnp.bfloat16}
    embed, ids = fse.linen.StableEmbed(11, LEAST_FEATURES, **options), jnp.array([[0, 1, -1], [11, 5, 5]])
    params = embed.init(jax.random.key(0), ids)

    def loss(params):
        return jnp.nansum(embed.apply(params, ids).astype(jnp.float32) ** 2)

    found = embed.apply(params, ids), jax.grad(loss)(params)
    monkeypatch.undo()
    expected = embed.apply(params, ids), jax.grad(loss)(params)
    assert found[0].dtype == jnp.bfloat16
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("one_gpu")
def test_no_ids_give_no_rows():
    embed = fse.linen.StableEmbed(11, LEAST_FEATURES)
    params = embed.init(jax.random.key(0), jnp.array([0]))
    assert embed.apply(params, jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, LEAST_FEATURES)
