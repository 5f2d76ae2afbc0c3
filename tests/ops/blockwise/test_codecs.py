"""Compares codecs with brute force over all 256 codes, and the dynamic map with the bits of bitsandbytes."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.blockwise import codecs
from flax_stable_embed.ops.blockwise.codecs import CODECS, TINY, decode, table
from flax_stable_embed.ops.counter_random import DITHERED_STEP, uniform

GOLDEN = Path(__file__).parents[2] / "golden"
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
ALL = pytest.mark.parametrize("codec", list(CODECS))


def encode(x, code, numbers=None):
    return codecs.encode(abs(x), x < 0, code, numbers)


def values_and_codes(codec, signed):
    """Returns all numbers that a codec can store and their codes, ascending. int8 codecs never write -128."""
    values = table(codec, signed)
    codes = np.arange(256) if CODECS[codec](signed).dtype == np.uint8 else np.arange(-128, 128)
    order = [i for i in np.argsort(values, stable=True) if codes[i] != -128]
    return values[order], codes[order]


def probes(values, signed):
    """Returns two million numbers: every value and midpoint, their neighbors one ulp away, and all magnitudes."""
    rng = np.random.default_rng(0)
    middles = (values[1:] + values[:-1]) * np.float32(0.5)
    special = np.concatenate([values, middles])
    special = np.concatenate([special, *(np.nextafter(special, np.float32(to)) for to in (-2, 2))])
    even = rng.uniform(-1, 1, 1_000_000).astype(np.float32)
    wide = (10 ** rng.uniform(-38, 0, 1_000_000) * rng.choice([-1, 1], 1_000_000)).astype(np.float32)
    x = np.clip(np.concatenate([special, even, wide]), -1 if signed else 0, 1)
    return np.where(np.abs(x) < TINY, np.float32(0), x)


def test_dynamic_map_has_the_bits_of_bitsandbytes():
    for name, bits in json.loads((GOLDEN / "dynamic_map.json").read_text()).items():
        expected = np.array([int(b, 16) for b in bits], np.uint32)
        ours = np.roll(table("dynamic", name == "signed"), 127 if name == "signed" else 0)
        np.testing.assert_array_equal(ours.view(np.uint32), expected)


@ALL
@SIGNS
def test_values_are_distinct_and_include_zero_and_one(codec, signed):
    values, codes = values_and_codes(codec, signed)
    assert np.all(np.diff(values) > 0)
    assert values[codes == 0] == 0.0
    assert values[-1] == 1.0


@pytest.mark.parametrize("codec", ["dynamic", "linear"])
@SIGNS
def test_nearest_rounding_equals_brute_force_over_all_midpoints(codec, signed):
    values, codes = values_and_codes(codec, signed)
    x = probes(values, signed)
    midpoints = (values[1:] + values[:-1]) * np.float32(0.5)
    expected = codes[np.searchsorted(midpoints, x, side="left")]  # a tie goes to the lower code
    got = np.asarray(jax.jit(partial(encode, code=CODECS[codec](signed)))(x))
    np.testing.assert_array_equal(got, expected)


@SIGNS
def test_root_rounds_in_the_root_domain_half_to_even(signed):
    values, _ = values_and_codes("root", signed)
    x = probes(values, signed)
    root = np.sqrt(np.abs(x)) * np.float32(127) if signed else np.sqrt(np.sqrt(x)) * np.float32(255)
    expected = np.sign(x) * np.rint(root)
    if not signed:
        expected = np.where(x > 0, np.maximum(expected, 1), 0)
    got = np.asarray(jax.jit(partial(encode, code=CODECS["root"](signed)))(x))
    np.testing.assert_array_equal(got, expected)


@SIGNS
def test_root_is_within_one_code_of_the_closest_value(signed):
    values, codes = values_and_codes("root", signed)
    x = np.random.default_rng(1).uniform(-1 if signed else 0, 1, 20_000).astype(np.float32)
    closest = codes[np.abs(x[:, None] - values[None, :]).argmin(axis=1)]
    got = np.asarray(encode(jnp.asarray(x), CODECS["root"](signed))).astype(int)
    assert np.abs(got - closest).max() <= 1


def test_unsigned_root_uses_code_zero_for_zero_only():
    x = np.float32([0.0, TINY, 1e-30, 1e-12, 1.0])
    np.testing.assert_array_equal(encode(jnp.asarray(x), CODECS["root"](False)), [0, 1, 1, 1, 255])


@ALL
@SIGNS
@pytest.mark.one_in(4)
def test_encoding_a_decoded_number_gives_its_code_again(codec, signed):
    values, codes = values_and_codes(codec, signed)
    code = CODECS[codec](signed)
    np.testing.assert_array_equal(encode(jnp.asarray(values), code), codes)
    ones = jnp.full(len(values), 1 - 2.0**-24)
    np.testing.assert_array_equal(encode(jnp.asarray(values), code, 0 * ones), codes)
    np.testing.assert_array_equal(encode(jnp.asarray(values), code, ones), codes)


@ALL
@SIGNS
@pytest.mark.one_in(4)
def test_stochastic_rounding_picks_a_neighbor_and_is_unbiased(codec, signed):
    code, n = CODECS[codec](signed), 1 << 17
    values, _ = values_and_codes(codec, signed)
    smallest = values[values > 0][0]
    for x in (float(smallest) * 1.3, 1e-3, 0.0412, 0.5, 0.777, 0.999):
        if x < smallest:
            continue  # below it unsigned root gives its smallest code, by design
        numbers = uniform("stochastic", jnp.arange(n, dtype=jnp.uint32), jnp.uint32(7))
        stored = np.asarray(decode(encode(jnp.full(n, x, jnp.float32), code, numbers), code), np.float64)
        lower, upper = values[values <= np.float32(x)][-1], values[values > np.float32(x)][0]
        assert set(np.unique(stored)) <= {float(lower), float(upper)}
        assert abs(stored.mean() - np.float32(x)) < 4 * (upper - lower) * 0.5 / np.sqrt(n)
        if signed and x < 0.99:  # the dynamic map has no -1
            mirrored = decode(encode(jnp.full(n, -x, jnp.float32), code, numbers), code)
            np.testing.assert_array_equal(-mirrored, stored.astype(np.float32))


@ALL
@SIGNS
@pytest.mark.one_in(4)
def test_compiled_codecs_are_arithmetic_only(codec, signed):
    code = CODECS[codec](signed)
    x, uniform = jnp.zeros(4096), jnp.zeros(4096)
    codes = jnp.zeros(4096, code.dtype)
    for function, args in [(encode, (x,)), (partial(encode, numbers=uniform), (x,)), (decode, (codes,))]:
        text = jax.jit(partial(function, code=code)).lower(*args).compile().as_text()
        found = re.findall(r"\b(gather|sort|while|scatter|dynamic-slice|conditional)\(", text)
        assert not found, found


@ALL
@SIGNS
@pytest.mark.one_in(4)
def test_dithered_errors_of_an_element_cancel_within_a_few_steps(codec, signed):
    """After n steps the mean of what is stored is off by at most a few n-th parts of the distance of two codes."""
    code = CODECS[codec](signed)
    values, _ = values_and_codes(codec, signed)
    index = jnp.arange(4096, dtype=jnp.uint32)
    for x in (1e-3, 0.0412, 0.5, 0.777, 0.999):
        lower, upper = values[values <= np.float32(x)][-1], values[values > np.float32(x)][0]
        if lower == 0 and not signed:
            continue  # only zero itself is stored as zero
        stored = []
        for step in range(64):
            numbers = uniform("dither", index, jnp.uint32(step) * DITHERED_STEP)
            stored.append(np.asarray(decode(encode(jnp.full(4096, x, jnp.float32), code, numbers), code), np.float64))
        means = np.cumsum(stored, axis=0) / np.arange(1, 65)[:, None]
        for n, parts in ((4, 1.6), (16, 2.0), (64, 2.7)):
            assert np.abs(means[n - 1] - np.float32(x)).max() <= parts * (upper - lower) / n
        assert abs(means[0].mean() - np.float32(x)) < 2e-3 * (upper - lower)  # over the elements in one step


def test_dithered_numbers_are_spread_evenly_over_elements_and_steps():
    """Also along every power of two, as in columns of a matrix, and for neighbors in both."""
    n = 1 << 14
    for stride in (1, 2, 32, 64, 128, 256, 768, 1024, 4096, 11008, 50257):
        numbers = np.sort(
            np.asarray(uniform("dither", jnp.arange(n, dtype=jnp.uint32) * np.uint32(stride), jnp.uint32(0)))
        )
        assert np.abs(numbers - np.arange(n) / n).max() < 0.01, stride
    index, steps = jnp.arange(256, dtype=jnp.uint32), jnp.arange(256, dtype=jnp.uint32)
    both = np.asarray(uniform("dither", index[:, None], steps[None] * DITHERED_STEP))
    assert both.min() >= 0 and both.max() < 1
    assert np.abs(both.mean(axis=0) - 0.5).max() < 0.02 and np.abs(both.mean(axis=1) - 0.5).max() < 0.02


def test_hashed_uniforms_are_uniform_and_differ_between_keys():
    n = 1 << 18
    index = jnp.arange(n, dtype=jnp.uint32)
    first, second = (np.asarray(uniform("stochastic", index, jnp.uint32(key))) for key in (3, 4))
    assert first.min() >= 0 and first.max() < 1
    counts, _ = np.histogram(first, 64, (0, 1))
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 110  # chi-square with 63 degrees of freedom, p = 2e-4
    for a, b in ((first, second), (first[:-1], first[1:]), (first[: n // 2], first[n // 2 :])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))
