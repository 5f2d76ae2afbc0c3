"""Tests that invalid options of the modules raise errors that name the option and its value."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.embedding.options import check_norm_options, check_options

DEFAULTS = {
    "num_embeddings": 4,
    "padding_idx": None,
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "sparse": False,
    "lookup": "take",
    "mode": "fill",
}


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"padding_idx": 4}, ValueError, r"`padding_idx` must be within -4 \.\. 3, got 4.*num_embeddings=5"),
        ({"padding_idx": -5}, ValueError, r"`padding_idx` must be within -4 \.\. 3, got -5"),
        ({"padding_idx": 1.0}, TypeError, r"`padding_idx` must be an integer or None, got 1\.0"),
        ({"padding_idx": True}, TypeError, r"`padding_idx` must be an integer or None, got True"),
        ({"max_norm": 0}, ValueError, r"`max_norm` must be positive, got 0\..*None"),
        ({"max_norm": -2.0}, ValueError, r"`max_norm` must be positive, got -2\.0"),
        ({"max_norm": float("nan")}, ValueError, r"`max_norm` must be positive, got nan"),
        ({"max_norm": "1"}, TypeError, r"`max_norm` must be a Python number, got '1'"),
        ({"max_norm": jnp.ones(())}, TypeError, r"`max_norm` must be a Python number, got Array"),
        ({"norm_type": -1}, ValueError, r"`norm_type`, the p of a p-norm, must be 0 or more, got -1\. Try 2\.0"),
        ({"norm_type": None}, TypeError, r"`norm_type` must be a Python number, got None"),
        (
            {"sparse": True, "scale_grad_by_freq": True},
            ValueError,
            r"`scale_grad_by_freq=True` does not work with.*sparse",
        ),
        ({"sparse": True, "lookup": "one_hot"}, ValueError, r"`lookup='one_hot'` has a dense gradient"),
        ({"lookup": "gather"}, ValueError, r"`lookup` must be 'take' or 'one_hot', got 'gather'"),
        ({"mode": "wrap"}, ValueError, r"`mode` must be 'fill', 'clip' or 'promise_in_bounds', got 'wrap'"),
    ],
    ids=str,
)
def test_options_outside_their_range_raise(option, error, message):
    with pytest.raises(error, match=message):
        check_options(**(DEFAULTS | option))


def test_negative_padding_is_counted_from_the_end():
    given = (-4, -1, 0, np.int64(3))
    assert [check_options(**(DEFAULTS | {"padding_idx": i})) for i in given] == [0, 3, 0, 3]


@pytest.mark.parametrize(
    ("norm_epsilon", "param_dtype", "dtype", "error", "message"),
    [
        (0.0, jnp.float32, None, ValueError, r"`norm_epsilon` must be positive and finite in float32, got 0\.0"),
        (1e-46, jnp.float32, None, ValueError, r"`norm_epsilon` must be positive and finite in float32, got 1e-46"),
        (
            float("inf"),
            jnp.float32,
            None,
            ValueError,
            r"`norm_epsilon` must be positive and finite in float32, got inf",
        ),
        ("1e-5", jnp.float32, None, TypeError, r"`norm_epsilon` must be a Python number"),
        (
            1e-5,
            jnp.int8,
            None,
            TypeError,
            r"`param_dtype` of a StableEmbed must be a real floating point dtype, got int8",
        ),
        (1e-5, jnp.float32, jnp.complex64, TypeError, r"`dtype` of a StableEmbed .* got complex64"),
    ],
)
def test_options_of_the_norm_outside_their_range_raise(norm_epsilon, param_dtype, dtype, error, message):
    with pytest.raises(error, match=message):
        check_norm_options(norm_epsilon, param_dtype, dtype)
