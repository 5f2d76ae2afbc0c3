"""Tests means over microbatches against one large batch and against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.microbatching import AccumulationType, microbatch

import flax_stable_embed as fse

K, SIZE = 8, 4


def loss_fn(params, batch):
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["kernel"]) + params["bias"][None]))


def params_of(dtype):
    kernel = jax.random.normal(jax.random.key(0), (32, 32)) / 4
    return {"kernel": kernel.astype(dtype), "bias": jnp.linspace(-1, 1, 32, dtype=dtype)}


def batch_of(dtype):
    return jax.random.normal(jax.random.key(1), (K * SIZE, 32)).astype(dtype)


def means(accumulator, params, batch):
    of_microbatches = microbatch(jax.value_and_grad(loss_fn), argnums=1, microbatch_size=SIZE, accumulator=accumulator)
    return of_microbatches(params, batch)


@pytest.mark.parametrize("is_jitted", [True, False])
def test_the_mean_is_that_of_one_large_batch(is_jitted):
    params, batch = params_of(jnp.float32), batch_of(jnp.float32)
    want = jax.value_and_grad(loss_fn)(params, batch)
    run = functools.partial(means, fse.microbatch_mean())
    found = (jax.jit(run) if is_jitted else run)(params, batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, want)


def test_the_sum_of_bfloat16_gradients_is_in_float32():
    params, batch = params_of(jnp.bfloat16), batch_of(jnp.bfloat16)
    parts = [jax.grad(loss_fn)(params, part)["kernel"] for part in batch.reshape(SIZE, K, 32).swapaxes(0, 1)]
    want = np.mean(np.asarray(parts).astype(np.float64), axis=0)
    _, grads = means(fse.microbatch_mean(), params, batch)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(grads["kernel"], want, rtol=1e-6, atol=1e-9)


def of_values(accumulator, values):
    """The mean of given arrays, by the functions that `microbatch` calls."""

    @jax.jit
    def run(values):
        carry = accumulator.init(jax.eval_shape(lambda: values[0]))
        return accumulator.finalize(
            jax.lax.fori_loop(0, len(values), lambda i, c: accumulator.update(c, values[i], i), carry)
        )

    return run(values)


def test_small_gradients_are_kept_on_average_in_bfloat16():
    """1 and then 255 gradients of 1/1024: added and rounded to nearest, all of them would be lost."""
    values = jnp.full((256, 64, 64), 2.0**-10).at[0].set(1.0).astype(jnp.bfloat16)
    want = 1 + 255 / 1024
    found = [
        256 * of_values(fse.microbatch_mean(jnp.bfloat16, step=step), values).astype(jnp.float32) for step in range(8)
    ]
    assert found[0].mean() == pytest.approx(want, rel=2e-3)
    each = np.std([np.asarray(x) for x in found])
    assert 0 < each < 0.05
    assert np.abs(np.mean(found, axis=0) - want).max() < 0.1  # no element is off at all steps
    assert not np.array_equal(found[0], found[1])


def test_only_arrays_with_two_axes_are_bfloat16():
    params, batch = params_of(jnp.bfloat16), batch_of(jnp.bfloat16)
    loss, grads = means(fse.microbatch_mean(jnp.bfloat16, step=jnp.int32(3)), params, batch)
    assert (loss.dtype, grads["bias"].dtype, grads["kernel"].dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        values = jnp.full((3, 4, 4), 0.1, jnp.float64)
        for accumulator in (fse.microbatch_mean(), fse.microbatch_mean(jnp.bfloat16, step=1)):
            np.testing.assert_allclose(of_values(accumulator, values), np.full((4, 4), 0.1), rtol=1e-15)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("accumulator", [fse.microbatch_mean(), fse.microbatch_mean(jnp.bfloat16, step=1)])
def test_bits_do_not_depend_on_the_mesh(kind, accumulator):
    values = jax.random.normal(jax.random.key(0), (4, 8, 32)).astype(jnp.bfloat16)
    want = of_values(accumulator, values)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        found = of_values(accumulator, jax.device_put(values, NamedSharding(mesh, P(None, "a", "b"))))
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("a", "b")), 2)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(want))


def test_an_optimizer_takes_the_mean():
    tx = fse.in_place(fse.split_weights(fse.adamw8bit(1e-2)))

    @jax.jit
    def step(params, state, batch):
        loss, grads = means(fse.microbatch_mean(jnp.bfloat16, step=state.count), params, batch)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    params, batch = params_of(jnp.bfloat16), batch_of(jnp.bfloat16)
    state, losses = tx.init(params), []
    for _ in range(20):
        loss, params, state = step(params, state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_sums_of_per_example_values_go_through_optax_too():
    """`microbatch` takes a tuple of accumulators, one per result."""
    run = microbatch(
        lambda x: (x.sum(), (x > 0).sum()),
        argnums=0,
        microbatch_size=2,
        accumulator=(fse.microbatch_mean(), AccumulationType.SUM),
    )
    mean, positive = run(jnp.array([1.0, -1.0, 2.0, 2.0]))
    assert (float(mean), int(positive)) == (2.0, 3)


def test_wrong_arguments_and_values_are_refused():
    with pytest.raises(TypeError, match="float16"):
        fse.microbatch_mean(jnp.float16)
    with pytest.raises(ValueError, match="step"):
        fse.microbatch_mean(jnp.bfloat16)
    with pytest.raises(TypeError, match="integer"):
        fse.microbatch_mean(jnp.bfloat16, step=1.5)
    with pytest.raises(TypeError, match=r"AccumulationType\.SUM"):
        of_values(fse.microbatch_mean(), jnp.ones((2, 3, 3), jnp.int32))
    rows = fse.SparseRows.of_lookups(jnp.array([1, 2]), jnp.ones((2, 4)), 8)
    with pytest.raises(TypeError, match="sum_microbatches"):
        fse.microbatch_mean().init({"embedding": rows})


@pytest.mark.parametrize("k", [2, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("value", [0.1, 0.007])
def test_the_mean_in_bfloat16_is_not_biased(k, value):
    values = jnp.full((k, 256, 256), value, jnp.float32)
    found = [of_values(fse.microbatch_mean(jnp.bfloat16, step=i), values).astype(jnp.float32) for i in range(8)]
    means = [float(x.mean()) / value for x in found]
    assert np.mean(means) == pytest.approx(1, abs=3e-4)
    assert np.abs(np.mean(found, axis=0) / value - 1).max() < 0.02  # of one element


def test_a_derivative_through_bfloat16_sums_is_straight_through():
    def product(params, batch):
        return (batch.T @ batch) @ params

    def total(params):
        mean = fse.microbatch_mean(jnp.bfloat16, step=1)
        run = microbatch(product, argnums=1, microbatch_size=SIZE, accumulator=mean)
        return run(params, jnp.ones((3 * SIZE, 8))).astype(jnp.float32).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.ones((8, 8))), 8 * SIZE, rtol=5e-3)


def test_per_example_values_are_checked_too():
    run = optax.microbatching.micro_vmap(lambda x: jnp.int32(3), accumulator=fse.microbatch_mean())
    with pytest.raises(TypeError, match=r"AccumulationType\.SUM"):
        run(jnp.ones((4, 2)))
    with pytest.raises(TypeError, match="float8"):
        of_values(fse.microbatch_mean(), jnp.ones((2, 3, 3), jnp.float8_e4m3fn))


def test_strict_promotion_and_python_numbers_are_fine():
    with jax.numpy_dtype_promotion("strict"):
        values = jnp.ones((2, 4, 4), jnp.bfloat16)
        for accumulator in (fse.microbatch_mean(), fse.microbatch_mean(jnp.bfloat16, step=1)):
            np.testing.assert_array_equal(np.asarray(of_values(accumulator, values), np.float32), 1)
    run = microbatch(lambda x: (x.sum(), 2.5), argnums=0, microbatch_size=2, accumulator=fse.microbatch_mean())
    assert float(run(jnp.ones(4))[1]) == 2.5
