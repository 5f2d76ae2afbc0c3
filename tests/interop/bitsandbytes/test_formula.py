"""Tests the bias corrections of bitsandbytes' optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.interop.bitsandbytes.formula import correction


@pytest.mark.parametrize("b", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_bias_corrections_are_accurate_to_five_ulps(b):
    """The five ulps are those of `expm1`. 1 - b**t in float32 has a relative error of 5e-5 at b = 0.999."""
    steps = np.arange(1, 1000)
    found = jax.jit(lambda count: correction(b, count))(jnp.asarray(steps))
    np.testing.assert_allclose(found, 1 - np.float64(b) ** steps, rtol=6e-7)
