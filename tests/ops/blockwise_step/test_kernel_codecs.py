"""Tests that kernels give the codes of the reference, except a few ulps from the boundary between two codes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.blockwise import codecs
from flax_stable_embed.ops.blockwise_step.kernel_codecs import by_logarithm, by_square_roots, kernel_codec
from flax_stable_embed.ops.blockwise_step.step import Moment

quantize = importlib.import_module("flax_stable_embed.ops.blockwise.quantize")

CODES_APART = 1e-4  # of all codes may differ, by one


@pytest.mark.parametrize("fourth_root", [by_logarithm, by_square_roots])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
def test_kernel_codecs_agree_with_the_reference_on_all_codes_and_a_million_numbers(codec, signed, fourth_root):
    moment = Moment(signed, codec)
    kernel, code = kernel_codec(moment, fourth_root), moment.code
    every = np.arange(256).astype(np.uint8).view(code.dtype)
    decoded, want = (
        jax.jit(lambda c: kernel.dequantize(c, jnp.ones(256)))(every),
        codecs.decode(jnp.asarray(every), code),
    )
    np.testing.assert_allclose(decoded, want, rtol=8e-7)  # 6.2e-7 without fused multiply-adds
    np.testing.assert_array_equal(np.asarray(decoded) == 0, np.asarray(want) == 0)

    @jax.jit
    def codes_of(x):
        return kernel.quantize(x, kernel.factor(jnp.ones_like(x)), None)

    usual = (np.abs(np.asarray(want)) <= 1) & (np.asarray(want) >= (-1 if signed else 0))
    if (codec == "root" and signed) or (codec == "linear" and signed):
        usual &= every != -128
    np.testing.assert_array_equal(np.asarray(codes_of(want))[usual], every[usual])
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-1, 1, 500_000), rng.choice([-1, 1], 500_000) * np.exp(rng.uniform(-25, 0, 500_000))]
    )
    x = jnp.asarray(x if signed else np.abs(x), jnp.float32)
    apart = np.asarray(codes_of(x), np.int32) - np.asarray(quantize.codes_of(x, jnp.ones_like(x), code), np.int32)
    assert np.abs(apart).max() <= 1
    assert (apart != 0).mean() < CODES_APART
