"""Tests state dicts that are refused, or loaded only with help from the user."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from tests.interop.bitsandbytes.state_dicts import (
    ADAM,
    GROUP,
    assert_same,
    load_vector,
    one_vector,
    ours_as_saved,
    saved_of,
)
from tests.interop.bitsandbytes.state_dicts import frozen as frozen
from tests.interop.bitsandbytes.tools import BLOCKS, our_optimizer

# --- names, axes, steps ----------------------------------------------------------------------------------------------


def test_the_state_of_another_optimizer_is_refused(frozen):
    saved, params = saved_of(ADAM, frozen)
    load, order = bitsandbytes.load_optimizer_state, {"order": ["weight", "bias"]}
    with pytest.raises(ValueError, match=r"has 2 states .* but lion in `tx` has 1"):
        load(saved, bitsandbytes.lion8bit(), params, **order)
    with pytest.raises(ValueError, match=r"AdEMAMix stacks two moments in it, \(2, 20, 31\)"):
        load(saved, bitsandbytes.ademamix8bit(), params, **order)
    with pytest.raises(ValueError, match="got 0"):
        load(saved, optax.adamw(1e-3), params, **order)
    with pytest.raises(ValueError, match="has mu, nu, trace, unlike any optimizer of bitsandbytes"):
        load(saved, fse.rmsprop8bit(1e-3, centered=True, momentum=0.9), params, **order)
    with pytest.raises(ValueError, match="has no moments"):
        load(saved, fse.sgd8bit(1e-3), params, **order)
    with pytest.raises(TypeError, match=r"got PosixPath. Open a file with torch.load"):
        load(pathlib.Path("optimizer.pt"), bitsandbytes.adam8bit(), params, **order)
    with pytest.raises(ValueError, match="must have 'state' and 'param_groups', got 'weight', 'bias'"):
        load(params, bitsandbytes.adam8bit(), params, **order)
    with pytest.raises(TypeError, match="must be a sequence of paths"):
        load(saved, bitsandbytes.adam8bit(), params, order="weight")


def test_a_trace_that_sums_scaled_gradients_is_refused():
    """Our LARS scales gradients before it adds them to the trace; bitsandbytes clips steps after the trace."""
    kernel = {"kernel": jnp.ones((4, 256))}
    for tx in (fse.lars8bit(1e-3), optax.chain(fse.scale_by_lars8bit(), optax.scale(-1e-3))):
        with pytest.raises(ValueError, match=r"trace of lars .* sums gradients scaled by the trust ratio"):
            bitsandbytes.load_optimizer_state(one_vector(), tx, kernel, order=["kernel"])
        with pytest.raises(ValueError, match=r"Use fse.interop.bitsandbytes.lars8bit"):
            bitsandbytes.dump_optimizer_state(tx, kernel, tx.init(kernel), order=["kernel"], param_groups=GROUP)
    clipping = fse.lars8bit(1e-3, max_unorm=0.02, state_format=BLOCKS)
    state, _ = bitsandbytes.load_optimizer_state(one_vector(), clipping, {"kernel": jnp.ones(1024)}, order=["kernel"])
    assert int(state[-1].count) == 4


def test_the_moments_of_a_scalar_are_the_same_after_dump_and_load():
    params = {"logit_scale": jnp.ones(())}
    group = GROUP | {"alpha": 5.0}
    for tx in (bitsandbytes.adamw8bit(), bitsandbytes.ademamix8bit(), bitsandbytes.lion8bit()):
        _, state = tx.update(params, tx.init(params), params)
        saved, _ = bitsandbytes.dump_optimizer_state(tx, params, state, order=["logit_scale"], param_groups=group)
        loaded, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["logit_scale"])
        jax.tree.map(np.testing.assert_array_equal, loaded, state)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("codec", ["root", "dynamic"])
def test_a_negative_mean_of_squares_is_refused(bits, codec):
    state_format = fse.StateFormat(codec, block_size=256, min_size=0)  # with "dynamic", codes would be copied
    tx = fse.interop.bitsandbytes.rmsprop8bit(state_format=state_format, rules=((".*", bits),))
    params = {"kernel": jnp.ones(1024)}
    saved = one_vector()
    with pytest.raises(ValueError, match=r"`nu` cannot be negative, but the state to load into it has -3.97"):
        bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    saved["state"][0]["state1"] = np.maximum(saved["state"][0]["state1"], 127)  # code 127 is zero
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    assert not any(int(x.min()) < 0 for x in jax.tree.leaves(state[0].nu))


def test_damaged_states_are_refused():
    with pytest.raises(ValueError, match="but without its `absmax1` or `qmap1`"):
        saved = one_vector()
        del saved["state"][0]["qmap1"]
        load_vector(saved)
    with pytest.raises(ValueError, match="`qmap1` of parameter 0 must be 256 finite numbers"):
        load_vector(one_vector(qmap1=np.ones(100, np.float32)))
    for step in (-3, 2**40, 7.5, np.inf, np.array([3, 4]), "many"):
        with pytest.raises(ValueError, match="The step of parameter 0 must be an integer from 0"):
            load_vector(one_vector(step=step))
    saved = one_vector()
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match=r"has no 'step' for parameter 0. Set `step` to the steps taken"):
        load_vector(saved)
    with pytest.raises(ValueError, match="has None for the state of parameter 0"):
        load_vector({**saved, "state": {0: None}})
    with pytest.raises(ValueError, match="3 scales for 1024 elements"):
        load_vector(one_vector(absmax1=np.ones(3, np.float32)))
    with pytest.raises(ValueError, match=r"has the shape \(1024,\), but 'kernel' has \(1000,\)"):
        load_vector(one_vector(), 1000)


def test_step_is_required_if_parameters_have_different_counts(frozen):
    saved, params = saved_of(ADAM, frozen)
    saved["state"][1]["step"] = 2
    tx, order = ours_as_saved(ADAM), ["weight", "bias"]
    with pytest.raises(ValueError, match=r"\{0: 3, 1: 2\}.*step=3"):
        bitsandbytes.load_optimizer_state(saved, tx, params, order=order)
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=order, step=3)
    assert state[0].count == 3


def test_parameters_without_a_state_start_from_zeros(frozen):
    saved, params = saved_of(ADAM, frozen)
    del saved["state"][1]
    state, report = bitsandbytes.load_optimizer_state(saved, ours_as_saved(ADAM), params, order=["weight", "bias"])
    assert {row.how for row in report.rows if row.path == "bias"} == {"absent"} and not state[0].nu["bias"].any()
    saved["state"] = {}
    state, _ = bitsandbytes.load_optimizer_state(saved, ours_as_saved(ADAM), params, order=["weight", "bias"])
    assert_same(state, ours_as_saved(ADAM).init(params))
    dumped, _ = bitsandbytes.dump_optimizer_state(
        ours_as_saved(ADAM), params, state, order=["weight", "bias"], param_groups=GROUP
    )
    assert dumped["state"] == {}


def test_missing_hyperparameters_and_foreign_states_are_refused_in_a_dump(frozen):
    _, params = saved_of(ADAM, frozen)
    tx = our_optimizer(ADAM, state_format=BLOCKS)
    state, order = tx.init(params), ["weight", "bias"]
    with pytest.raises(ValueError, match="lacks betas, eps"):
        bitsandbytes.dump_optimizer_state(
            tx, params, state, order=order, param_groups={"lr": 1e-3, "weight_decay": 0.0}
        )
    other = our_optimizer(ADAM, rules=((".*", 32),))
    with pytest.raises(ValueError, match=r"`state` was not made by `tx`: .* Pass the optimizer that made the state"):
        bitsandbytes.dump_optimizer_state(other, params, state, order=order, param_groups=GROUP)


def test_codes_must_be_uint8():
    codes = one_vector()["state"][0]["state1"]
    for wrong, found in (
        (codes.astype(np.int64), "int64 with scales"),
        (codes.astype(np.float32), "float32 with scales"),
    ):
        with pytest.raises(ValueError, match=f"`state1` of parameter 0 is {found}"):
            load_vector(one_vector(state1=wrong))


def test_float64_scales_are_cast_to_float32():
    state, _ = load_vector(one_vector(absmax1=np.arange(1.0, 5.0)))
    np.testing.assert_array_equal(state.mu_absmax["kernel"], np.arange(1, 5, dtype=np.float32))
