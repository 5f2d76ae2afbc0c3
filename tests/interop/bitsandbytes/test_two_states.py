"""Tests the schedules of AdEMAMix's rates."""

import jax
import jax.numpy as jnp
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop.bitsandbytes import two_states


@pytest.mark.parametrize("name", ["b1", "b3"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_rates_of_0_or_1_that_should_grow_are_refused(name, rate):
    with pytest.raises(ValueError, match=f"`{name}` must be between 0 and 1 if `t_beta3` lets b3 grow"):
        fse.interop.bitsandbytes.ademamix8bit(t_beta3=10, **{name: rate})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t_beta3": -5}, ValueError, "`t_beta3` must be a number of steps that is at least 0, or None, got -5"),
        ({"t_alpha": "soon"}, TypeError, "`t_alpha` must be a number, got 'soon'"),
        ({"t_beta3": 5, "b3": lambda count: 0.9}, TypeError, "`b3` must be a number"),
    ],
)
def test_invalid_schedules_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        fse.interop.bitsandbytes.ademamix8bit(**arguments)


def test_b3_is_constant_if_b1_is_larger():
    """The schedule is min(b3, ...), as in bitsandbytes."""
    growing = two_states._growing_b3(0.5, 10)
    for count in (0, 5, 20):
        rate, rest = growing(jnp.int32(count), 0.9)
        assert (float(rate), float(rest)) == (0.5, 0.5)


def test_schedules_work_with_strict_dtype_promotion():
    tx = fse.interop.bitsandbytes.ademamix8bit(t_alpha=10, t_beta3=10)
    params = {"kernel": jnp.ones((64, 64))}
    with jax.numpy_dtype_promotion("strict"):
        _, state = tx.update(params, tx.init(params), params)
    assert state[0].m2["kernel"].dtype == jnp.uint8
