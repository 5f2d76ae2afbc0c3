"""Tests the instructions of NVIDIA GPUs as they are interpreted, and functions that are made of them.

What the instructions themselves compute is known on a GPU only. Their twins in plain JAX are tested here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.blockwise.codecs import TINY
from flax_stable_embed.ops.blockwise_step import api
from flax_stable_embed.ops.blockwise_step.gpu_codecs import gpu_codec
from flax_stable_embed.ops.blockwise_step.gpu_instructions import Instructions, Product, contracted
from flax_stable_embed.ops.blockwise_step.kernel_codecs import by_square_roots, kernel_codec
from flax_stable_embed.ops.blockwise_step.step import Moment, apply_rule
from flax_stable_embed.ops.counter_random import as_fraction
from tests import cases
from tests.tools import build

DO = Instructions(interpret=True)
NUMBERS = jnp.asarray([0.0, -0.0, 1e-40, 1e-38, 0.25, 1.0, 3.5, -2.0, 1e38, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
ALL_BYTES = jnp.arange(256, dtype=jnp.uint8)


def test_numbers_below_the_smallest_normal_one_count_as_zero():
    np.testing.assert_array_equal(DO.sqrt(NUMBERS[:6]), [0, 0, 0, 0, 0.5, 1])
    np.testing.assert_array_equal(DO.rsqrt(NUMBERS[2:6]), [np.inf, np.inf, 2, 1])
    np.testing.assert_array_equal(DO.reciprocal(NUMBERS[2:6]), [np.inf, np.inf, 4, 1])


def test_a_clipped_product_has_no_nan():
    found = DO.clipped_product(NUMBERS, jnp.float32(2))
    np.testing.assert_array_equal(found, [0, 0, 0, 0, 0.5, 1, 1, 0, 1, 1, 0, 0])
    assert DO.clipped_product(jnp.float32(0), jnp.inf) == 0


def test_a_floor_comes_with_the_level_as_bits_and_whether_it_is_above_zero():
    floor, raised, one = DO.floor_of_product(jnp.asarray([0.0, 0.3, 0.5, 1.99]), 2.0)
    np.testing.assert_array_equal(floor, [0, 0, 1, 3])
    np.testing.assert_array_equal(DO.last_bytes(raised, jnp.uint8), [0, 0, 1, 3])
    np.testing.assert_array_equal(one, [0, 0, 1, 1])


def test_nan_does_not_count_as_the_largest():
    x = jnp.asarray([[1.0, jnp.nan], [jnp.nan, jnp.nan], [3.0, jnp.nan]])
    assert DO.largest(x, 0)[0] == 3.0 and not DO.largest(x, 0)[1] >= TINY
    np.testing.assert_array_equal(DO.larger(jnp.asarray([1.0, jnp.nan]), jnp.asarray([jnp.nan, 2.0])), [1, 2])


def test_one_moment_that_is_not_finite_makes_all_of_its_element_nan():
    a, b = DO.nan_if_any_overflows([jnp.asarray([1.0, jnp.inf, 2.0, 3e38]), jnp.asarray([4.0, 5.0, jnp.nan, 3e38])])
    np.testing.assert_array_equal(jnp.isnan(a), [False, True, True, False])
    np.testing.assert_array_equal(jnp.isnan(a), jnp.isnan(b))
    assert a[0] == 1.0 and b[0] == 4.0


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8], ids=lambda dtype: dtype.__name__)
def test_every_byte_is_a_level_and_back(dtype):
    codes = jax.lax.bitcast_convert_type(ALL_BYTES, dtype)
    levels = DO.levels(codes, 1 / 128)
    np.testing.assert_array_equal(levels * 128, np.asarray(codes, np.float32))
    np.testing.assert_array_equal(DO.last_bytes(levels * 128 + np.float32(1.5 * 2**23), dtype), codes)


def test_a_fraction_has_the_upper_bits():
    bits = jnp.asarray([0, 0xFFFF, 0x10000, 0x80000000, 0xFFFFFFFF], jnp.uint32)
    np.testing.assert_array_equal(DO.fraction(bits), [0, 0, 2.0**-16, 0.5, 1 - 2.0**-16])
    np.testing.assert_array_equal(DO.fraction(bits), as_fraction("dither", bits))


def test_products_are_merged_into_sums_and_an_unused_option_costs_nothing():
    given = []

    class Counting(Instructions):
        def multiply_add(self, a, b, c):
            given.append("multiply_add")
            return a * b + c

    def f(g, m):
        return 0.9 * m + 0.1 * g + 0.0, jnp.sqrt(g**2 + 1e-3) - 2.0 * m

    g, m = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, -4.0])
    found = contracted(Counting(True), f)(g, Product(m, jnp.float32(0.5)))
    for a, b in zip(found, f(g, m * 0.5)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert given == ["multiply_add"] * 3


@pytest.mark.parametrize("case", cases.OPTIMIZERS, ids=lambda case: case.name)
def test_every_rule_gives_nearly_the_same_numbers(case, monkeypatch):
    """The rules come from real steps, with the options that the optimizers give them."""
    steps, run = [], api.run_as_sharded

    def recorded(local, operands, *others):
        steps.append((local.step, operands.hyper))
        return run(local, operands, *others)

    monkeypatch.setattr(api, "run_as_sharded", recorded)
    tx, params = build(case), {"kernel": jnp.ones((64, 320))}
    jax.eval_shape(tx.update, params, tx.init(params), params)
    rng = np.random.default_rng(0)
    assert steps
    for step, hyper in steps:
        numbers = np.abs(rng.standard_normal((2 + len(step.moments), 8, 16)))
        g, p, *old = jnp.asarray(numbers, jnp.float32)
        hyper = {name: jnp.float32(0.1 + 0.01 * k) for k, name in enumerate(sorted(hyper))}
        rule = partial(apply_rule, step, hyper=hyper)
        found, want = contracted(DO, rule)(g, p, tuple(old)), rule(g, p, tuple(old))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7), found, want)


@pytest.mark.parametrize("rounding", ["nearest", "dither", "stochastic"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
def test_codecs_equal_those_of_the_other_kernels(codec, signed, rounding):
    moment = Moment(signed, codec, rounding)
    ours, theirs = gpu_codec(DO, moment), kernel_codec(moment, by_square_roots)
    scale = jnp.asarray([[2.5e-3, 1.0, 3e38, 1e-33]])
    codes = jax.lax.bitcast_convert_type(ALL_BYTES, moment.code.dtype)[:, None]
    decoded = [codec.dequantize(codes, scale) for codec in (ours, theirs)]
    decoded = [x.value if isinstance(x, Product) else x for x in decoded]
    np.testing.assert_allclose(*decoded, rtol=1e-6, atol=1e-37)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4096, 4)) * 10.0 ** rng.uniform(-6, 0, (4096, 4)), jnp.float32)
    x = jnp.clip(x if signed else jnp.abs(x), -1, 1) * scale
    bits = None if rounding == "nearest" else jnp.asarray(rng.integers(0, 2**32, x.shape), jnp.uint32)
    codes = [np.asarray(codec.quantize(x, codec.factor(scale), bits), int) for codec in (ours, theirs)]
    apart = np.abs(codes[0] - codes[1])
    assert apart.max() <= 1 and (apart > 0).mean() < 3e-4
    bad = jnp.asarray([[jnp.nan, 0.0, -0.0, 0.0]])
    np.testing.assert_array_equal(ours.quantize(bad, ours.factor(scale), None if bits is None else bits[:1]), 0)
    nothing = jnp.zeros((1, 4))
    zeros = ours.quantize(nothing, ours.factor(nothing), None if bits is None else bits[:1])
    np.testing.assert_array_equal(zeros, 0)
