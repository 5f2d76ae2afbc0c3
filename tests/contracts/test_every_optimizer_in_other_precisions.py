"""Tests the storage between fp32 and 8 bits: bfloat16 moments, and one second moment per row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import SMALL, assert_nearly, assert_same_bits, core, gradients, jitted, jitted_fused, parameters, types

every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
SECOND = [case for case in OPTIMIZERS if {"nu", "sum_of_squares"} & {*case.moments}]
with_second_moment = pytest.mark.parametrize("case", SECOND, ids=lambda case: case.name)


@functools.cache
def build(case, bits):
    return case.ours(**case.hyper, rules=(("wte|kernel", bits),), state_format=SMALL)


@every_optimizer
@pytest.mark.one_in(14)
def test_bfloat16_moments_are_computed_in_float32_and_rounded_once(case):
    tx, theirs = build(case, "bf16"), case.theirs(**case.hyper)
    params, grads = parameters(), gradients()
    state = tx.init(params)
    new, after, updates = jitted(tx)(grads, state, params)
    _, expected_state, expected = jitted(theirs)(grads, theirs.init(params), params)
    # The initial value of Adagrad is rounded too.
    assert_nearly(updates, expected, rtol=2**-8 if case.name == "adagrad8bit" else 2e-6)
    for name in case.moments:
        stored = getattr(core(case, after), name)["kernel"]
        assert stored.dtype == jnp.bfloat16
        (wide,) = [getattr(x, name) for x in expected_state if hasattr(x, name)]
        np.testing.assert_allclose(stored.astype(jnp.float32), wide["kernel"], rtol=2**-7 + 2**-13, atol=1e-30)
    assert types(after) == types(state)
    fused, fused_state = jitted_fused(tx)(grads, state, params)
    assert_same_bits(fused_state, after)
    assert_nearly(fused, new)
    (row,) = [row for row in fse.describe(tx, params).rows if row.path == "kernel"]
    assert (row.bits, row.bytes) == ("bf16", len(case.moments) * (2 * 64 * 64 + 4))


@with_second_moment
@pytest.mark.one_in(4)
def test_rowwise_second_moments_average_the_mean_square_of_the_row(case):
    """If all elements of a row have the same size, the result equals the fp32 optimizer."""
    tx, theirs = build(case, "rowwise"), case.theirs(**case.hyper)
    rng = np.random.default_rng(0)
    params = parameters()
    new, state, expected, expected_state = params, tx.init(params), params, theirs.init(params)
    for _ in range(3):
        sizes, signs = rng.uniform(0.1, 1.0, (64, 1)), rng.choice([-1.0, 1.0], (64, 64))
        grads = gradients() | {"kernel": jnp.asarray(sizes * signs, jnp.float32)}
        new, state, _ = jitted(tx)(grads, state, new)
        expected, expected_state, _ = jitted(theirs)(grads, expected_state, expected)
    found = core(case, state)
    for name in case.moments:
        shape = (64, 1) if name in ("nu", "sum_of_squares") else (64, 64)
        assert getattr(found, name)["kernel"].shape == shape
        assert getattr(found, name)["kernel"].dtype == jnp.float32
    assert_nearly(new["kernel"], expected["kernel"], rtol=1e-5)
    assert types(state) == types(tx.init(params))
    (row,) = [row for row in fse.describe(tx, params).rows if row.path == "kernel"]
    firsts = len(case.moments) - 1
    assert (row.bits, row.bytes) == ("rowwise", firsts * 4 * 64 * 64 + 4 * 64 + 4 * len(case.moments))


def test_rowwise_adam_equals_a_step_by_hand():
    """A row with gradients 3 and 4 has the mean square 12.5."""
    tx = fse.scale_by_adam8bit(eps=0.0, rules=((".*", "rowwise"),))
    params = {"table": jnp.zeros((2, 2))}
    grads = {"table": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
    updates, state = tx.update(grads, tx.init(params))
    np.testing.assert_allclose(state.nu["table"], [[0.001 * 12.5], [0.0]], rtol=1e-6)
    np.testing.assert_allclose(updates["table"][0], np.array([3.0, 4.0]) / 12.5**0.5, rtol=5e-5)


@with_second_moment
@pytest.mark.one_in(10)
def test_one_bad_element_of_a_row_does_not_change_the_others(case):
    """It counts as zero in the mean of the row. So does a gradient whose square overflows."""
    params = parameters()
    without = gradients() | {"kernel": gradients()["kernel"].at[3, 5].set(0.0)}
    hyper = case.hyper | ({"weight_decay": 0.0} if "weight_decay" in case.hyper else {})
    for bad in (jnp.nan, jnp.inf, 1e30):
        for skip in (False, True):
            tx = case.ours(**hyper, rules=(("kernel", "rowwise"),), state_format=SMALL, skip_nonfinite=skip)
            grads = without | {"kernel": without["kernel"].at[3, 5].set(bad)}
            new, state, _ = jitted(tx)(grads, tx.init(params), params)
            expected, expected_state, _ = jitted(tx)(without, tx.init(params), params)
            for name in case.moments:
                found, reference = (getattr(core(case, s), name)["kernel"] for s in (state, expected_state))
                if found.shape == (64, 1):
                    assert_same_bits(found, reference)
            others = np.ones((64, 64), bool)
            others[3, 5] = False
            if bad != 1e30 or not case.sums:
                assert_nearly(np.asarray(new["kernel"])[others], np.asarray(expected["kernel"])[others])
            assert np.isfinite(new["kernel"][3, 5]) == (skip or bad == 1e30)


def test_parameters_without_rows_keep_fp32():
    params = {"scalar": jnp.ones(()), "vector": jnp.ones(64), "complex": jnp.ones((4, 4), jnp.complex64)}
    params |= {"empty": jnp.ones((0, 4)), "column": jnp.ones((8, 1))}
    tx = fse.adamw8bit(1e-3, rules=((".*", "rowwise"),))
    rows = {row.path: (row.bits, row.reason) for row in fse.describe(tx, params).rows}
    assert rows["scalar"] == (32, "a scalar has no rows")
    assert rows["complex"] == (32, "complex")
    assert rows["empty"] == (32, "empty")
    assert rows["column"] == (32, "rows of one element")
    assert rows["vector"][0] == "rowwise"
    state = tx.init(params)
    assert state[0].nu["vector"].shape == (1,)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert types((updates, after)) == types((params, state))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["bf16", "rowwise"])
def test_bf16_and_rowwise_work_under_x64_and_vmap_and_for_half_precision(bits):
    tx = build(OPTIMIZERS[1], bits)
    for dtype in ("bfloat16", "float16", "float32"):
        params = parameters(dtype)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert types((updates, after)) == types((params, state))
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), parameters())
    states = jax.vmap(tx.init)(stacked)
    updates, after = jax.jit(jax.vmap(tx.update))(stacked, states, stacked)
    expected = jitted(tx)(parameters(), tx.init(parameters()), parameters())[2]
    assert_nearly(jax.tree.map(lambda x: x[0], updates), expected)
    with jax.enable_x64(True):
        params = parameters("float64")
        tx = fse.adamw8bit(1e-3, rules=(("kernel", bits),), state_format=SMALL)
        state = tx.init(params)
        assert state[0].nu["kernel"].dtype == (jnp.bfloat16 if bits == "bf16" else jnp.float64)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert types((updates, after)) == types((params, state))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bits", ["bf16", "rowwise"])
@pytest.mark.one_in(4)
def test_bf16_and_rowwise_moments_are_sharded_on_a_mesh(bits, kind):
    mesh, tx = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2), build(OPTIMIZERS[1], bits)
    expected = jitted(tx)(gradients(), tx.init(parameters()), parameters())
    with jax.set_mesh(mesh):
        rest = jax.tree.map(lambda _: NamedSharding(mesh, P()), parameters())
        put = functools.partial(jax.device_put, device=rest | {"kernel": NamedSharding(mesh, P("a", "b"))})
        params = put(parameters())
        state = tx.init(params)
        _, after, _ = found = jax.jit(lambda *args: jitted(tx)(*args))(put(gradients()), state, params)
        assert_nearly(found, expected)
        nu = after[0].nu["kernel"]
        assert nu.sharding.is_equivalent_to(state[0].nu["kernel"].sharding, 2)
        assert nu.sharding.shard_shape(nu.shape) == ((32, 1) if bits == "rowwise" else (32, 16))


@pytest.mark.parametrize("bits", ["bf16", "rowwise"])
@pytest.mark.one_in(4)
def test_bf16_and_rowwise_work_in_an_nnx_optimizer_with_named_axes(bits):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        metadata = {"out_sharding": ("a", "b"), "optim_bits": bits}
        model = nnx.Linear(64, 64, use_bias=False, kernel_metadata=metadata, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, fse.adamw8bit(1e-3), wrt=nnx.Param)
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(jnp.ones((4, 64))) ** 2))(model))
        nu = optimizer.opt_state[0].nu["kernel"]
        assert nu.get_metadata()["out_sharding"] == (("a", None) if bits == "rowwise" else ("a", "b"))
        assert nu.get_value().shape == ((64, 1) if bits == "rowwise" else (64, 64))


def test_a_state_stored_with_other_bits_is_refused():
    params = parameters()
    states = {bits: build(OPTIMIZERS[1], bits).init(params) for bits in (8, 32, "bf16", "rowwise")}
    for ours in states:
        for theirs, state in states.items():
            if ours != theirs:
                message = rf"'kernel' is stored with bits '?{theirs}'?.*'wte\|kernel', '?{ours}"
                with pytest.raises(ValueError, match=message):
                    build(OPTIMIZERS[1], ours).update(params, state, params)


def test_an_embedding_can_have_other_bits_than_8bit_matrices():
    """The totals of the report equal the bytes of the real state."""
    params = {"wte": {"embedding": jnp.ones((512, 64))}, "kernel": jnp.ones((64, 512)), "scale": jnp.ones(64)}
    for bits, size in (("rowwise", 4 * 512 * 64 + 4 * 512), ("bf16", 4 * 512 * 64), (32, 8 * 512 * 64)):
        tx = fse.adamw8bit(1e-3, rules=(("embedding", bits),))
        report = fse.describe(tx, params)
        assert report.total_bytes == sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
        (row,) = [row for row in report.rows if row.path == "wte/embedding"]
        assert row.bytes == size + 8
        assert f"{bits}{'-bit' if bits == 32 else ''}: " in str(report)


def test_rowwise_trains_an_embedding_as_fp32_does():
    """Bag-of-words regression on a table whose rows have widely differing frequencies."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.zipf(1.5, size=(200, 32, 4)) % 256)
    target = jnp.asarray(rng.normal(size=(256, 8)), jnp.float32)

    def train(tx):
        def step(carry, batch):
            table, state = carry
            loss, grads = jax.value_and_grad(lambda t: jnp.mean((t[batch].mean(1) - target[batch].mean(1)) ** 2))(table)
            updates, state = tx.update(grads, state, table)
            return (optax.apply_updates(table, updates), state), loss

        table = jnp.zeros((256, 8))
        return jax.jit(lambda: jax.lax.scan(step, (table, tx.init(table)), ids)[1])()

    fp32 = train(optax.adam(0.05))
    for bits in ("rowwise", "bf16"):
        losses = train(fse.adam8bit(0.05, rules=((".*", bits),)))
        assert fp32[-20:].mean() < 0.1 * fp32[0]
        np.testing.assert_allclose(losses[-20:].mean(), fp32[-20:].mean(), rtol=0, atol=0.01 * float(fp32[0]))


def cases(*names):
    return pytest.mark.parametrize("case", [c for c in OPTIMIZERS if c.name in names], ids=lambda case: case.name)


@cases("adam8bit", "adagrad8bit")
def test_slow_means_in_bfloat16_follow_those_in_float32(case):
    """Each step changes them by less than half an ulp."""
    ours, theirs = build(case, "bf16"), case.theirs(**case.hyper)

    def last(tx):
        params = {"kernel": jnp.ones((64, 64))}

        def step(carry, size):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, size), params), state, params)
            return (params, state), updates["kernel"].mean()

        sizes = jnp.where(jnp.arange(3000) < 3, 100.0, 1.0)
        return jax.lax.scan(step, (params, tx.init(params)), sizes)[1][-1]

    np.testing.assert_allclose(last(ours), last(theirs), rtol=0.02)


@cases("adam8bit", "rmsprop8bit", "adagrad8bit", "ademamix8bit")
def test_rowwise_steps_stay_small_if_the_square_of_a_gradient_overflows(case):
    tx, params = build(case, "rowwise"), parameters()
    state, before = tx.init(params), params["kernel"][5, 7]
    for i in range(4):
        grads = gradients(i)
        if i == 2:
            grads = grads | {"kernel": grads["kernel"].at[5, 7].set(1e20)}
        params, state, _ = jitted(tx)(grads, state, params)
    assert abs(params["kernel"][5, 7] - before) < 1
