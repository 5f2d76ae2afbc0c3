"""Tests of arrays that nothing can compute with by accident."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.sealed import is_sealed, seal, sealed_type, words_of

KIND = sealed_type("fse_test_words", words=2, tag="words of a test", error="These are not random keys.")
WORDS = jnp.arange(12, dtype=jnp.uint32).reshape(3, 2, 2)


def test_words_come_back_and_zeros_are_zeros():
    x = seal(WORDS, KIND)
    assert is_sealed(x) and x.shape == (3, 2) and not is_sealed(WORDS)
    np.testing.assert_array_equal(words_of(x), WORDS)
    assert not words_of(jnp.zeros_like(x)).any()
    kept = jax.jit(lambda x: jnp.where(jnp.arange(2) == 1, x, jnp.zeros_like(x)))(x)
    np.testing.assert_array_equal(words_of(kept), np.asarray(WORDS) * [[[0], [1]]])


def test_pickle_keeps_them():
    x = pickle.loads(pickle.dumps(seal(WORDS, KIND)))
    assert is_sealed(x)
    np.testing.assert_array_equal(words_of(x), WORDS)


@pytest.mark.parametrize("compute", [lambda x: x + x, lambda x: 2 * x, jnp.sum, jnp.sqrt, lambda x: x.astype(float)])
def test_nothing_computes_with_them(compute):
    x = seal(WORDS, KIND)
    for f in (compute, jax.jit(compute)):
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            f(x)


def test_an_error_says_what_the_array_holds():
    with pytest.raises(TypeError, match="words of a test"):
        jnp.zeros(3) * seal(WORDS, KIND)[:, 0]
    with pytest.raises(TypeError, match="These are not random keys"):
        jax.random.split(seal(WORDS, KIND)[0, 0])
