"""Compares stochastic rounding with the sorted list of all numbers of the dtype, and counts over all random bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.rounding import stochastic_round

HALF = [jnp.bfloat16, jnp.float16]
half_precision = pytest.mark.parametrize("dtype", HALF, ids=lambda d: np.dtype(d).name)
ONES = np.uint32(0xFFFFFFFF)

rounded = jax.jit(stochastic_round, static_argnums=1)


def every_number(dtype):
    """Returns all numbers of the dtype except NaN, with the infinities."""
    bits = np.arange(2**16, dtype=np.uint16)
    infinity = np.array(np.inf, dtype).view(np.uint16)
    return bits[(bits & 0x7FFF) <= infinity].view(dtype)


def neighbors(x, dtype):
    """Returns the next numbers of `dtype` below and above, as float64; both are `x` if `dtype` represents it."""
    grid = every_number(dtype).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    x = np.asarray(x, np.float64)
    above = np.searchsorted(grid, x)
    return grid[np.where(grid[above] == x, above, above - 1)], grid[above]


def wide_range(dtype, n, seed=0):
    """Returns float32 numbers of both signs and all magnitudes of `dtype`, also the subnormal ones."""
    rng = np.random.default_rng(seed)
    low = -126 if dtype == jnp.bfloat16 else -26  # another test has the subnormal numbers of float32
    high = 127 if dtype == jnp.bfloat16 else 15
    return (rng.choice([-1, 1], n) * rng.uniform(1, 2, n) * 2.0 ** rng.integers(low, high, n)).astype(np.float32)


@half_precision
@pytest.mark.parametrize("bits", [0, ONES, 0x5A5A5A5A])
def test_numbers_that_the_dtype_represents_are_kept(dtype, bits):
    x = every_number(dtype)
    found = np.asarray(rounded(jnp.asarray(x.astype(np.float32)), dtype, jnp.full(x.shape, bits, jnp.uint32)))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.view(np.uint16), x.view(np.uint16))


@half_precision
def test_the_result_is_one_of_the_two_neighbors(dtype):
    x = wide_range(dtype, 100_000)
    bits = np.random.default_rng(1).integers(0, 2**32, x.shape, np.uint32)
    found = np.asarray(rounded(x, dtype, bits)).astype(np.float64)
    below, above = neighbors(x, dtype)
    assert np.all((found == below) | (found == above))
    assert 0.45 < np.mean(found == above) < 0.55
    # The extremes of the bits give the extremes: towards zero, and away from it.
    normal = np.abs(x) >= 2.0**-24 if dtype == jnp.float16 else np.full(x.shape, True)
    for bits, expected in ((0, np.where(x > 0, below, above)), (ONES, np.where(x > 0, above, below))):
        found = np.asarray(rounded(x, dtype, np.full(x.shape, bits, np.uint32))).astype(np.float64)
        np.testing.assert_array_equal(found[normal], expected[normal])


def exact_probability(x, dtype):
    below, above = neighbors(x, dtype)
    return 0.0 if above == below else (np.float64(x) - below) / (above - below)


@half_precision
def test_over_all_random_bits_the_mean_is_the_number(dtype):
    """bfloat16 drops 16 bits and normal float16 drops 13, so these are all random bits that matter."""
    dropped = 16 if dtype == jnp.bfloat16 else 13
    bits = jnp.arange(2**dropped, dtype=jnp.uint32)
    x = wide_range(dtype, 400, seed=2)
    for value in x[np.abs(x) >= float(jnp.finfo(dtype).tiny)][:50]:
        found = np.asarray(rounded(jnp.full(bits.shape, value), dtype, bits)).astype(np.float64)
        assert np.mean(found == neighbors(value, dtype)[1]) == exact_probability(value, dtype)
        assert np.mean(found) == value


@pytest.mark.parametrize("value", [1.3 * 2**-15, -1.7 * 2**-18, 1.9 * 2**-21, -1.0001 * 2**-24, 1.9999 * 2**-24])
def test_the_mean_over_all_random_bits_is_the_number_for_subnormal_float16(value):
    value = np.float32(value)
    bits = jnp.arange(2**23, dtype=jnp.uint32)
    found = np.asarray(rounded(jnp.full(bits.shape, value), jnp.float16, bits))
    assert np.mean(found.astype(np.float64)) == value


@pytest.mark.parametrize("value", [2.0**-25, -1.25 * 2**-26, 2.0**-40, 1.5 * 2**-48])
@pytest.mark.one_in(7)
def test_below_the_smallest_float16_the_probability_is_rounded_up(value):
    bits = jnp.arange(2**24, dtype=jnp.uint32) << 8
    found = np.asarray(rounded(jnp.full(bits.shape, value, jnp.float32), jnp.float16, bits)).astype(np.float64)
    assert set(np.abs(found)) == {0.0, 2.0**-24}
    assert np.count_nonzero(found) == np.ceil(abs(value) * 2**48)
    assert np.all(np.signbit(found) == (value < 0))


def test_subnormal_numbers_of_bfloat16_are_rounded_by_their_bits():
    """Some backends would flush subnormal numbers to zero in arithmetic."""
    raw = np.arange(1, 2**23, 4099, dtype=np.uint32)
    bits = np.random.default_rng(0).integers(0, 2**32, raw.shape, np.uint32)
    found = np.asarray(rounded(raw.view(np.float32), jnp.bfloat16, bits)).view(np.uint16)
    np.testing.assert_array_equal(found, (raw + (bits & 0xFFFF)) >> 16)


@half_precision
@pytest.mark.parametrize("bits", [0, ONES])
def test_numbers_beyond_the_dtype_are_converted_as_by_astype(dtype, bits):
    largest = np.float32(jnp.finfo(dtype).max)
    beyond = largest * np.float32(1 + 2**-10), largest * np.float32(1 + 2**-9.0) if dtype == jnp.float16 else largest
    nans = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    x = np.array([np.inf, -np.inf, np.finfo(np.float32).max, *beyond, -beyond[0], largest, -largest, *nans], np.float32)
    found = np.asarray(rounded(x, dtype, np.full(x.shape, bits, np.uint32)))
    expected = np.asarray(jnp.asarray(x).astype(dtype))
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@half_precision
def test_just_below_the_largest_number_rounds_to_it_and_not_beyond(dtype):
    largest = np.float32(jnp.finfo(dtype).max)
    x = np.nextafter(np.array([largest, -largest]), np.float32(0))
    found = np.asarray(rounded(x, dtype, np.full(x.shape, ONES)))
    np.testing.assert_array_equal(found.astype(np.float32), [largest, -largest])


@half_precision
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 7)])
@pytest.mark.one_in(7)
def test_rounding_works_for_any_shape_eager_jitted_and_vmapped(dtype, shape):
    rng = np.random.default_rng(0)
    x, bits = jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.integers(0, 2**32, shape), jnp.uint32)
    found = stochastic_round(x, dtype, bits)
    assert found.shape == shape and found.dtype == dtype
    np.testing.assert_array_equal(found, rounded(x, dtype, bits))
    if shape and shape[0]:
        np.testing.assert_array_equal(found, jax.vmap(lambda x, b: stochastic_round(x, dtype, b))(x, bits))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(found, stochastic_round(x, dtype, bits))
