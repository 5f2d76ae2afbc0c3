"""Tests how it is chosen to add the terms of a gradient. test_lookup.py tests the rows and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_stable_embed.ops.embedding import gather


def test_terms_are_sorted_only_on_one_tpu_and_for_large_tables(monkeypatch):
    options = gather.GatherOptions(None, False, None, np.dtype(np.float32))
    large, small = (jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (2**15 + 1, 2**15))
    assert not gather._sorts(options, large)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not gather._sorts(options, large)  # eight devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert gather._sorts(options, large) and not gather._sorts(options, small)
    assert not gather._sorts(options._replace(one_hot=True), large)
