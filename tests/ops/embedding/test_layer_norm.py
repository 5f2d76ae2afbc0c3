"""Compares LayerNorm in float32, in one pass and in two, with NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_stable_embed.ops.embedding import layer_norm
from flax_stable_embed.ops.embedding.layer_norm import normalize


def expected(x, scale, bias, epsilon):
    x = np.asarray(x).astype(np.float64)
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


@pytest.fixture(params=["", "cuda"], ids=["two passes", "one pass, as on GPU and TPU"])
def passes(request, monkeypatch):
    """Runs the two passes of CPU, then the one pass of GPU and TPU; returns the platform that is simulated."""
    if request.param:
        by_platform = lambda *args, default, **others: others[request.param](*args)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", by_platform)
    return request.param


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_normalize_equals_layer_norm_in_float64(dtype):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(3, 5, 32)) * 0.01, dtype)
    scale, bias = rng.normal(size=(2, 32)).astype(np.float32)
    found = normalize(x, jnp.asarray(scale), jnp.asarray(bias))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(x, scale, bias, 1e-5), atol=2e-6)


def test_normalize_keeps_the_digits_of_rows_far_from_zero(passes):
    x = (10 + 0.006 * np.random.default_rng(3).normal(size=(50, 64))).astype(np.float32)
    found = normalize(jnp.asarray(x), jnp.ones(64), jnp.zeros(64))
    # The mean rounds at 10 * 2^-24 = 6e-7 of a deviation of 0.006, in one pass up to 64 times, by chance up and down:
    # 8 times as much. E[x^2] - E[x]^2 would be wrong by 1.
    np.testing.assert_allclose(found, expected(x, 1, 0, 1e-5), atol=8e-4 if passes else 5e-4)


@pytest.mark.parametrize("far", [10.0, 1e2, 1e4])
def test_one_pass_keeps_the_digits_next_to_features_far_from_the_others(far):
    x = np.random.default_rng(5).normal(size=(20, 512)).astype(np.float32)
    for place in (0, 256):
        x[:, place] = far
        mean, variance = layer_norm._in_one_pass(jnp.asarray(x))
        found = (x - mean) / np.sqrt(variance + 1e-5)
        np.testing.assert_allclose(found, expected(x, 1, 0, 1e-5), rtol=4e-6, atol=4e-6)


def test_one_pass_gives_zero_variance_for_equal_features():
    mean, variance = layer_norm._in_one_pass(jnp.full((2, 7), 3e4))
    np.testing.assert_array_equal(mean, np.full((2, 1), 3e4))
    np.testing.assert_array_equal(variance, np.zeros((2, 1)))


@pytest.mark.usefixtures("passes")
def test_normalize_of_zero_rows_is_the_bias_with_a_finite_gradient():
    bias = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(normalize(jnp.zeros((2, 3)), jnp.ones(3), bias)[0], bias)
    gradients = jax.grad(lambda *a: jnp.sum(normalize(*a) ** 2), argnums=(0, 1, 2))(jnp.zeros((2, 3)), bias, bias)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_normalize_computes_float64_in_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(4).normal(size=(2, 8))
        found = normalize(jnp.asarray(x), jnp.ones(8), jnp.zeros(8))
        np.testing.assert_allclose(found, expected(x, 1, 0, 1e-5), rtol=1e-13)


@pytest.mark.parametrize("kinds", [(AxisType.Explicit, AxisType.Explicit), (AxisType.Auto, AxisType.Explicit)])
def test_normalize_works_with_features_sharded_over_an_explicit_axis(kinds):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    x = np.random.default_rng(5).normal(size=(16, 64)).astype(np.float32)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P(None, "b")))
        ones = jax.device_put(jnp.ones(64), NamedSharding(mesh, P("b")))
        found = jax.jit(normalize)(rows, ones, ones)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(normalize(x, ones, ones) ** 2)))(rows)
    np.testing.assert_allclose(found, expected(x, 1, 1, 1e-5), atol=2e-6)
    assert found.sharding.spec[-1] == gradient.sharding.spec[-1] == "b"


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_normalize_of_numbers_that_are_not_real_floats_raises(dtype):
    with pytest.raises(TypeError, match=f"real floating point rows, got {dtype}"):
        normalize(jnp.ones((2, 3), dtype), jnp.ones(3), jnp.ones(3))


@pytest.mark.usefixtures("passes")
def test_second_derivatives_under_jit_equal_those_of_the_formula():
    def by_formula(x, scale, bias):
        centered = x - x.mean(axis=-1, keepdims=True)
        return centered / jnp.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-5) * scale + bias

    x, scale, bias = np.random.default_rng(6).normal(size=(3, 5)).astype(np.float32)
    for k in range(2):
        found, want = (
            jax.jit(jax.hessian(lambda *args, f=f: jnp.sum(f(*args) ** 3), k))(x, scale, bias)
            for f in (normalize, by_formula)
        )
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)


def test_one_pass_and_two_passes_agree_on_numbers_whose_squares_overflow():
    x = jnp.full((1, 8), 2e19)
    for f in (layer_norm._in_one_pass, layer_norm._in_two_passes):
        mean, variance = f(x)
        assert np.isfinite(mean).all() and not np.any(variance)
