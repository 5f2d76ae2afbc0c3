"""Tests state dicts with other maps and other blocks than ours."""

import jax.numpy as jnp
import numpy as np

from flax_stable_embed.interop import bitsandbytes
from tests.golden.test_optimizers_formulas import code_values, decode
from tests.interop.bitsandbytes.state_dicts import GROUP, assert_same, load_vector, one_vector
from tests.interop.bitsandbytes.tools import BLOCKS, their_bytes


def test_codes_are_kept_if_the_map_differs_by_one_ulp():
    qmap = np.nextafter(code_values(True), np.float32(2))
    state, row = load_vector(one_vector(qmap1=qmap))
    assert row.how == "exact" and 0 < row.error <= 2**-23
    np.testing.assert_array_equal(their_bytes(np.asarray(state.mu["kernel"])), one_vector()["state"][0]["state1"])


def test_a_state_with_another_map_is_decoded_with_that_map():
    linear = np.linspace(-1, 1, 256, dtype=np.float32)
    saved = one_vector(qmap1=linear)
    state, row = load_vector(saved)
    assert row.how == "encoded" and 0 < row.error < 0.008
    values = linear[saved["state"][0]["state1"]] * np.repeat(saved["state"][0]["absmax1"], 256)
    ours = decode(their_bytes(np.asarray(state.mu["kernel"])), np.asarray(state.mu_absmax["kernel"]), code_values(True))
    np.testing.assert_allclose(ours, values, rtol=0, atol=0.008 * 4)


def test_blocks_of_2048_elements_of_old_versions_are_read():
    codes = (np.arange(5000) % 256).astype(np.uint8)
    absmax = np.array([1, 2, 4], np.float32)
    state, row = load_vector(one_vector(5000, state1=codes, absmax1=absmax), 5000)
    assert row.how == "encoded"
    values = code_values(True)[codes] * np.repeat(absmax, 2048)[:5000]
    ours = decode(their_bytes(np.asarray(state.mu["kernel"])), np.asarray(state.mu_absmax["kernel"]), code_values(True))
    np.testing.assert_allclose(ours, values, rtol=0, atol=0.008 * 4)


def test_a_fresh_state_of_bitsandbytes_is_loaded_as_zeros():
    """Its codes are 0, which the signed map decodes to -0.993, but its scales are 0."""
    saved = one_vector(state1=np.zeros(1024, np.uint8), absmax1=np.zeros(4, np.float32))
    state, row = load_vector(saved)
    assert row.how == "exact" and not state.mu_absmax["kernel"].any()
    tx, params = bitsandbytes.lion8bit(1.0, state_format=BLOCKS), {"kernel": jnp.ones(1024)}
    whole, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    updates, _ = tx.update({"kernel": jnp.zeros(1024)}, whole, params)
    assert not updates["kernel"].any()


def test_codes_are_kept_if_every_row_is_a_multiple_of_256():
    n = 8 * 512
    saved = one_vector(n)
    saved["state"][0]["state1"] = saved["state"][0]["state1"].reshape(8, 512)
    tx, params = bitsandbytes.lion8bit(), {"kernel": jnp.zeros((8, 512))}
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    assert report.rows[0].how == "exact" and state[0].mu_absmax["kernel"].shape == (8, 2)
    dumped, _ = bitsandbytes.dump_optimizer_state(
        tx, params, state, order=["kernel"], param_groups=saved["param_groups"][0] | GROUP, nested=False
    )
    assert_same(dumped["state"], saved["state"])
