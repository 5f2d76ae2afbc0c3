"""Tests `order` and `transpose`: which parameter of torch is which of ours, and the order of its axes."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.interop import bitsandbytes
from tests.interop.bitsandbytes.state_dicts import ADAM, GROUP, assert_same, ours_as_saved, saved_of
from tests.interop.bitsandbytes.state_dicts import frozen as frozen


def linear_and_square():
    """The fp32 states of torch's Linear(6, 4) and Linear(5, 5), and our parameters."""
    rng = np.random.default_rng(0)
    states = {i: {"step": 2, "state1": rng.normal(size=s).astype(np.float32)} for i, s in ((0, (4, 6)), (1, (5, 5)))}
    params = {"head": {"kernel": jnp.zeros((6, 4))}, "square": {"kernel": jnp.zeros((5, 5))}}
    return {"state": states, "param_groups": [{"params": [0, 1]}]}, params


def test_transpose_swaps_the_axes_of_the_weights_of_linear_layers():
    saved, params = linear_and_square()
    tx, order = bitsandbytes.lion8bit(), ["head/kernel", "square/kernel"]
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=order, transpose={"kernel$": (1, 0)})
    assert report.exact
    np.testing.assert_array_equal(state[0].mu["head"]["kernel"], saved["state"][0]["state1"].T)
    np.testing.assert_array_equal(state[0].mu["square"]["kernel"], saved["state"][1]["state1"].T)
    back, _ = bitsandbytes.dump_optimizer_state(
        tx, params, state, order=order, transpose={"kernel$": (1, 0)}, param_groups=GROUP, nested=False
    )
    assert_same(back["state"], saved["state"])

    as_it_is = {"square": (0, 1), "kernel$": (1, 0)}
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=order, transpose=as_it_is)
    np.testing.assert_array_equal(state[0].mu["square"]["kernel"], saved["state"][1]["state1"])


def test_a_tensor_that_may_be_transposed_is_refused_unless_transpose_says_so():
    saved, params = linear_and_square()
    tx, order = bitsandbytes.lion8bit(), ["head/kernel", "square/kernel"]
    load = bitsandbytes.load_optimizer_state
    with pytest.raises(ValueError, match=r"'square/kernel' of shape \(5, 5\) fits both as stored and transposed"):
        load(saved, tx, params, order=order, transpose={"head": (1, 0)})
    with pytest.raises(ValueError, match=r"transpose=\{'head/kernel': \(1, 0\)\}"):
        load(saved, tx, params, order=order)
    with pytest.raises(ValueError, match="must be a permutation of"):
        load(saved, tx, params, order=order, transpose={"kernel": (0, 0)})
    with pytest.raises(ValueError, match="matches none of the paths head/kernel"):
        load(saved, tx, params, order=order, transpose={"kernel": (1, 0), "embed": (1, 0)})


def test_transpose_reorders_the_four_axes_of_a_convolution():
    """A convolution: torch has (out, in, height, width), Flax (height, width, in, out)."""
    theirs = np.random.default_rng(0).normal(size=(4, 3, 5, 6)).astype(np.float32)
    saved = {"state": {0: {"step": 1, "state1": theirs}}, "param_groups": [{"params": [0]}]}
    params = {"conv": {"kernel": jnp.zeros((5, 6, 3, 4))}}
    options = {"order": ["conv/kernel"], "transpose": {"conv": (2, 3, 1, 0)}}
    tx = bitsandbytes.lion8bit()
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, **options)
    np.testing.assert_array_equal(state[0].mu["conv"]["kernel"], theirs.transpose(2, 3, 1, 0))
    back, _ = bitsandbytes.dump_optimizer_state(tx, params, state, param_groups=GROUP, nested=False, **options)
    np.testing.assert_array_equal(back["state"][0]["state1"], theirs)


def test_order_may_be_a_mapping_and_leave_parameters_out(frozen):
    saved, params = saved_of(ADAM, frozen)
    tx = ours_as_saved(ADAM)
    by_list, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["weight", "bias"])
    by_index, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order={1: "bias", 0: "weight"})
    assert_same(by_list, by_index)
    names = {0: "model.weight", 1: "model.bias"}
    named = {
        "state": {names[key]: state for key, state in saved["state"].items()},
        "param_groups": [saved["param_groups"][0] | {"params": list(names.values())}],
    }
    by_name, _ = bitsandbytes.load_optimizer_state(
        named, tx, params, order={"model.weight": "weight", "model.bias": "bias"}
    )
    assert_same(by_list, by_name)
    only, report = bitsandbytes.load_optimizer_state(saved, tx, {"bias": params["bias"]}, order=[None, "bias"])
    assert_same(only[0].mu["bias"], by_list[0].mu["bias"])
    assert [row.key for row in report.rows] == [1, 1]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["weight", "gain"], "`params` has no paths 'gain'. Its paths are: "),
        (["weight"], "it lacks torch's parameters 1. Map a parameter to None to drop it."),
        (["weight", "weight"], "it repeats 'weight'"),
        (["weight", "bias", "more"], "torch has no parameters with the keys 2"),
        (["weight", None], "it lacks our parameters 'bias'"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(order, message, frozen):
    saved, params = saved_of(ADAM, frozen)
    with pytest.raises(ValueError, match=message):
        bitsandbytes.load_optimizer_state(saved, ours_as_saved(ADAM), params, order=order)
