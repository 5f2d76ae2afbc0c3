"""Compares the kernels of normalized rows with the reference, under every transformation of JAX."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed.ops.embedding.normalized_rows import capabilities, lowering, pallas_gpu, pallas_tpu
from flax_stable_embed.ops.embedding.normalized_rows.api import normalized_rows
from flax_stable_embed.ops.embedding.normalized_rows.capabilities import LEAST_FEATURES, MOST_FEATURES
from flax_stable_embed.ops.embedding.normalized_rows.reference import Options, reference
from flax_stable_embed.ops.lowering import kernel_or_reference, on_one_device, rule

RUN = pallas_gpu.RUN
FLOAT32 = np.dtype(np.float32)


def case(
    rows=9, features=12, tokens=40, dtype=jnp.float32, out=jnp.float32, padding_idx=None, outside=False, elsewhere=False
):
    """Returns options, parameters, row numbers and a gradient of the output. Lower rows have more tokens."""
    keys = jax.random.split(jax.random.key(rows * features + tokens), 5)
    table = jax.random.normal(keys[0], (rows, features)).astype(dtype)
    scale, bias = jax.random.normal(keys[1], (2, features))
    row_numbers = (jax.random.uniform(keys[2], (tokens,)) ** 3 * rows).astype(jnp.int32)
    if outside:
        row_numbers = row_numbers.at[::7].set(rows)
    if elsewhere:
        row_numbers = jnp.where(jnp.arange(tokens) % 4, rows + 1, row_numbers)
    dy = jax.random.normal(keys[3], (tokens, features)).astype(out)
    return Options(1e-5, padding_idx, False, np.dtype(out), is_part=elsewhere), (table, scale, bias), row_numbers, dy


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
    "rows of other devices": {"elsewhere": True, "tokens": 300},
    "rows of other devices, and ids outside": {"elsewhere": True, "outside": True, "out": jnp.bfloat16},
    "rows of other devices alone": {"elsewhere": True, "tokens": pallas_tpu.MOST_TOKENS + 9, "rows": 3 * ROWS + 5},
    "bfloat16 output, features that cannot be halved": {"out": jnp.bfloat16, "features": 3 * LANES},
    "bfloat16 output, halves that do not fill registers": {"out": jnp.bfloat16, "features": 18 * LANES},
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
    sizes = {"rows": 3 * ROWS + 5, "features": 2 * LANES, "tokens": 300}
    assert_equals_the_reference(pallas_tpu, late, outside=True, **sizes)
    assert_equals_the_reference(pallas_tpu, late, outside=True, elsewhere=True, **sizes)


def assert_equals_the_reference(kernels, interpret: Any = True, **of_case):
    options, (table, scale, bias), row_numbers, dy = case(**of_case)
    y = kernels.forward(options, table, scale, bias, row_numbers, interpret=interpret)
    expected, pullback = jax.vjp(lambda *args: reference(options, *args, row_numbers), table, scale, bias)
    gradients = kernels.gradient(options, dy, table, scale, row_numbers, interpret=interpret)
    eps = {2: 2**-7, 4: 3e-6}
    np.testing.assert_array_equal(np.signbit(y[row_numbers > len(table)]), True)
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


def test_the_operation_runs_without_jit_and_under_debug_nans():
    embed = fse.linen.StableEmbed(11, LEAST_FEATURES)
    params = embed.init(jax.random.key(0), jnp.array([0]))
    with jax.disable_jit():
        assert embed.apply(params, jnp.arange(3)).shape == (3, LEAST_FEATURES)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        embed.apply(params, jnp.array([99]))


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
def test_a_stable_embedding_is_one_operation_if_a_kernel_can_take_it(options, expected):
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
def test_a_program_for_one_tpu_has_the_kernels_on_any_host(options, expected):
    embed = fse.linen.StableEmbed(**{"num_embeddings": 11, "features": LEAST_FEATURES} | options)
    ids = jnp.arange(6)
    params = embed.init(jax.random.key(0), ids)
    assert kernels_for_tpu(step_of(embed), params, ids) == (2 if expected else 0)


def step_of(embed):
    """Returns a function of parameters and ids that computes outputs and gradients."""

    def step(params, ids):
        y, pullback = jax.vjp(lambda params: embed.apply(params, ids), params)
        return y, pullback(jnp.cos(y))[0]

    return step


def kernels_for_tpu(step, *args):
    return jax.jit(step).trace(*args).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")


MESH_AXES = {"x": 4, "y": 2}
ON_MESHES = {  # how ids and the table are sharded, and whether the kernels run
    "data parallel": (P("x"), P(), True),
    "over both axes": (P(("x", "y")), P(), True),
    "a batch of two axes": (P("x", "y"), P(), True),
    "replicated ids": (P(), P(), False),
    "a table sharded over features": (P("x"), P(None, "y"), False),
    "a table sharded over rows": (P("x"), P("x"), True),
    "a table sharded over rows by another axis": (P("x"), P("y"), True),
    "a table sharded over rows by one of two axes": (P(("x", "y")), P("y"), True),
    "a table sharded over rows by two axes": (P("x"), P(("y", "x")), True),
    "a table sharded over rows, replicated ids": (P(), P("x"), True),
    "a table sharded over rows, a batch of two axes": (P("x", "y"), P("x"), False),
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh(tuple(MESH_AXES.values()), tuple(MESH_AXES), axis_types=(kind,) * 2)


@pytest.fixture
def interpreted(monkeypatch):
    """Lets programs for CPU use the kernels for TPU, interpreted."""
    for name in ("forward", "gradient"):
        monkeypatch.setattr(pallas_tpu, name, partial(getattr(pallas_tpu, name), interpret=True))
    rules = {
        lowering._forward_here: (lowering._forward_reference, partial(lowering._forward_kernel, "pallas_tpu")),
        lowering._gradient_here: (lowering._gradient_reference, partial(lowering._gradient_kernel, "pallas_tpu")),
    }
    for one, (plain, kernel) in rules.items():
        may_run = kernel_or_reference(plain, kernel, lambda program, options: program.one_device)
        mlir.register_lowering(one, rule(may_run, "cpu"), platform="cpu")
    monkeypatch.setattr(capabilities, "PLATFORMS", ("cuda", "tpu", "cpu"))
    yield
    for one, (plain, _) in rules.items():
        mlir.register_lowering(one, rule(kernel_or_reference(plain, None, on_one_device)), platform="cpu")


@pytest.mark.parametrize("name", ON_MESHES)
@pytest.mark.parametrize("sliced", [False, True], ids=["ids", "ids without the last"])
def test_a_program_for_tpus_has_the_kernels_where_tokens_are_sharded(name, sliced):
    spec, of_table, expected = ON_MESHES[name]
    embed = fse.linen.StableEmbed(16, LEAST_FEATURES, padding_idx=3)
    params = embed.init(jax.random.key(0), jnp.array([0]))
    params, ids = placed(mesh_of(), params, of_table, jnp.zeros((8, 6), jnp.int32), spec)
    step = step_of(embed)
    shorter = (lambda params, ids: step(params, ids[:, :-1])) if sliced else step
    divides = not (sliced and len(spec) > 1)  # 5 ids are not sharded over 2 devices
    assert kernels_for_tpu(shorter, params, ids) == (2 if expected and divides else 0)


def placed(mesh, params, of_table, ids, of_ids):
    def place(x):
        return jax.device_put(x, NamedSharding(mesh, of_table if x.ndim == 2 else P()))

    return jax.tree.map(place, params), jax.device_put(ids, NamedSharding(mesh, of_ids))


@pytest.mark.parametrize("name", [name for name, (*_, expected) in ON_MESHES.items() if expected])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("padding_idx", [3, 13, None])
@pytest.mark.one_in(7)
def test_the_kernels_on_a_mesh_equal_the_reference_on_one_device(name, dtype, padding_idx, interpreted):
    del interpreted
    embed = fse.linen.StableEmbed(16, LEAST_FEATURES, padding_idx=padding_idx, dtype=dtype)
    ids = jax.random.randint(jax.random.key(1), (8, 4), -2, 18)
    params = embed.init(jax.random.key(0), ids)

    dy = jax.random.normal(jax.random.key(2), (*ids.shape, LEAST_FEATURES)).astype(dtype)

    def step(params, ids, dy):
        y, pullback = jax.vjp(lambda params: embed.apply(params, ids), params)
        return y, pullback(dy)[0]

    want = jax.jit(step)(params, ids, dy)
    spec, of_table, _ = ON_MESHES[name]
    args = *placed(mesh_of(), params, of_table, ids, spec), jax.device_put(dy, NamedSharding(mesh_of(), spec))
    compiled = jax.jit(step).lower(*args).compile()
    found = compiled(*args)
    kinds = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", compiled.as_text())
    assert set(kinds) == {"all-reduce"} or len(of_table)  # of the gradients
    assert found[1]["params"]["embedding"].sharding.spec == of_table or not len(of_table)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-2, atol=2e-5)


def test_a_table_that_is_sharded_over_rows_gives_the_numbers_of_one_device(interpreted):
    """In the forward pass, with NaN in the rows of one device. A sum across devices may lose the sign of -0.0."""
    del interpreted
    embed = fse.linen.StableEmbed(16, LEAST_FEATURES)
    ids = jax.random.permutation(jax.random.key(1), jnp.arange(32) % 16).reshape(8, 4)
    params = embed.init(jax.random.key(0), ids)["params"]
    params["embedding"] = params["embedding"].at[5].set(jnp.nan).at[6].set(-0.0)
    params["norm"] = {"scale": jnp.ones(LEAST_FEATURES), "bias": jnp.full(LEAST_FEATURES, -0.0)}
    want = jax.jit(embed.apply)({"params": params}, ids)
    assert (np.signbit(want) & (want == 0)).any() and np.isnan(want).any()
    for of_table in (P("x"), P(("y", "x"))):
        args = placed(mesh_of(), {"params": params}, of_table, ids, P("x"))
        found = jax.jit(embed.apply)(*args)
        np.testing.assert_array_equal(found, want)


def test_types_of_an_explicit_mesh_and_shards_of_the_user_take_a_lookup_and_a_norm():
    embed = fse.linen.StableEmbed(16, LEAST_FEATURES)
    params = embed.init(jax.random.key(0), jnp.array([0]))
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        args = placed(mesh, params, P(), jnp.zeros((8, 4), jnp.int32), P("x"))
        assert "normalized_rows" not in primitives_of(embed.apply, *args)
    mesh = mesh_of()
    sharded = jax.shard_map(embed.apply, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))
    found = jax.jit(sharded)(*placed(mesh, params, P(), jnp.zeros((8, 4), jnp.int32), P("x")))
    np.testing.assert_allclose(found, embed.apply(params, jnp.zeros((8, 4), jnp.int32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_the_operation_equals_a_lookup_and_a_norm(monkeypatch, mode):
    options = {"padding_idx": 0, "mode": mode, "dtype": jnp.bfloat16}
    embed, ids = fse.linen.StableEmbed(11, LEAST_FEATURES, **options), jnp.array([[0, 1, -1], [11, 5, 5]])
    params = embed.init(jax.random.key(0), ids)

    def loss(params):
        return jnp.nansum(embed.apply(params, ids).astype(jnp.float32) ** 2)

    found = embed.apply(params, ids), jax.grad(loss)(params)
    monkeypatch.setattr(capabilities, "LEAST_FEATURES", LEAST_FEATURES + 1)
    assert "normalized_rows" not in primitives_of(embed.apply, params, ids)
    expected = embed.apply(params, ids), jax.grad(loss)(params)
    assert found[0].dtype == jnp.bfloat16
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-2, atol=1e-3)


def test_no_ids_give_no_rows():
    embed = fse.linen.StableEmbed(11, LEAST_FEATURES)
    params = embed.init(jax.random.key(0), jnp.array([0]))
    assert embed.apply(params, jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, LEAST_FEATURES)
