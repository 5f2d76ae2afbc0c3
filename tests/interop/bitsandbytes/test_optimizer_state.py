"""Tests loading and dumping of bitsandbytes' state dicts: frozen ones of every optimizer, other formats, live ones."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from flax_stable_embed.interop.bitsandbytes.optimizer_state import NESTED
from tests.golden.make_optimizers import (
    CONTINUED,
    SAVED,
    STATE_DICTS,
    WEIGHT,
    exact_quantizer,
    gradient,
    new_optimizer,
    parameter,
)
from tests.interop.bitsandbytes.state_dicts import (
    ADAM,
    GROUP,
    arrays_of,
    as_before_050,
    assert_same,
    flattened,
    is_8bit,
    ours_as_saved,
    saved_of,
    their_values,
)
from tests.interop.bitsandbytes.state_dicts import frozen as frozen
from tests.interop.bitsandbytes.tools import (
    BLOCKS,
    assert_parameters,
    fused,
    normal,
    our_fields,
    our_optimizer,
    twin,
)
from tests.interop.bitsandbytes.tools import live as live

every_case = pytest.mark.parametrize("case", STATE_DICTS, ids=lambda case: case.name)

# --- the frozen state dicts ------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.one_in(25)
def test_codes_are_loaded_bit_for_bit_and_training_continues(case, layout, frozen):
    saved, params = saved_of(case, frozen)
    given = flattened(saved) if layout == "nested" else as_before_050(flattened(saved))
    params["weight"] = params["weight"].reshape(-1)
    tx = ours_as_saved(case)
    state, report = bitsandbytes.load_optimizer_state(given, tx, params, order=["weight", "bias"])
    assert report.exact and {row.how for row in report.rows} == {"exact"} and report.largest_error == 0.0
    members = getattr(state, "inner_state", state)
    assert members[0].count == SAVED
    for i, path in enumerate(("weight", "bias")):
        for name, found in our_fields(case, members, path).items():
            theirs = saved["state"][i][NESTED].get(name)
            if theirs is not None:
                assert found.dtype == theirs.dtype
                np.testing.assert_array_equal(found.reshape(theirs.shape), theirs)
    for step in range(SAVED + 1, CONTINUED + 1):
        grads = {name: jnp.asarray(gradient(arr, step)) for name, arr in (("weight", WEIGHT), ("bias", (31,)))}
        grads["weight"] = grads["weight"].reshape(-1)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name, p in params.items():
        expected = arrays_of(case, frozen)[f"{CONTINUED}/{name}"]
        assert_parameters(case, np.asarray(p).reshape(expected.shape), expected, CONTINUED - SAVED)


@every_case
def test_a_dumped_state_dict_is_the_loaded_one_bit_for_bit(case, frozen):
    saved, params = saved_of(case, frozen)
    saved, params["weight"] = flattened(saved), params["weight"].reshape(-1)
    tx, order = ours_as_saved(case), ["weight", "bias"]
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=order)
    for nested in (True, False):
        dumped, report = bitsandbytes.dump_optimizer_state(
            tx, params, state, order=order, param_groups=saved["param_groups"], nested=nested
        )
        expected = copy.deepcopy(saved) if nested else as_before_050(saved)
        for one in expected["state"].values():  # every step overwrites it, and we do not store it
            tensors = one[NESTED] if nested else one
            if "unorm_vec" in tensors:
                tensors["unorm_vec"][:] = 0
        assert report.exact
        assert dumped["param_groups"] == saved["param_groups"]
        assert_same(dumped, expected)


@every_case
def test_moments_whose_blocks_cross_rows_are_decoded(case, frozen):
    """The weight is (20, 31). fp32 moments are exactly the decoded codes, 8-bit moments are rounded again."""
    saved, params = saved_of(case, frozen)
    tensors = saved["state"][0][NESTED]
    tx = our_optimizer(case, rules=((".*", 32),))
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["weight", "bias"])
    assert report.exact and report.largest_error == 0.0
    assert {row.how for row in report.rows if row.key == 0} == {"decoded" if is_8bit(case) else "exact"}
    for i in (1, 2):
        if f"state{i}" in tensors:
            values = our_fields(case, state, "weight")[f"state{i}"]
            np.testing.assert_array_equal(values, their_values(tensors, i).astype(np.float32))

    tx = our_optimizer(case, state_format=BLOCKS)
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["weight", "bias"])
    assert not report.exact and {row.how for row in report.rows if row.path == "weight"} == {"encoded"}
    assert report.largest_error < 0.5 / 64 * 0.9 + 1e-6  # half the widest gap of the signed map
    for name in twin(case).state1:
        values = getattr(state[0], name)["weight"]
        assert values.dtype == jnp.uint8 and values.shape == WEIGHT


@pytest.mark.parametrize("codec", ["root", "linear", "dynamic"])
def test_moments_are_loaded_into_other_optimizers_and_formats(codec, frozen):
    saved, params = saved_of(ADAM, frozen)
    tx = fse.adamw8bit(1e-3, state_format=fse.StateFormat(codec, rounding="stochastic", min_size=0))
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["weight", "bias"])
    assert {row.how for row in report.rows if row.path == "weight"} == {"encoded"}
    rows = {row.moment: row.error for row in report.rows if row.path == "weight"}
    assert 0 < max(rows.values()) < {"root": 0.01, "linear": 0.004, "dynamic": 0.008}[codec]
    back, again = bitsandbytes.dump_optimizer_state(
        tx, params, state, order=["weight", "bias"], param_groups=saved["param_groups"]
    )
    assert not again.exact
    for i in (1, 2):
        ours, theirs = (their_values(s["state"][0][NESTED], i) for s in (back, saved))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


@pytest.mark.parametrize("bits", ["bf16", "rowwise"])
def test_moments_are_loaded_into_bf16_and_rowwise_storage(bits, frozen):
    saved, params = saved_of(ADAM, frozen)
    tx = fse.adamw8bit(1e-3, rules=(("weight", bits),))
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["weight", "bias"])
    how = {(row.path, row.moment): row.how for row in report.rows}
    assert how["weight", "nu"] == "encoded" and how["bias", "nu"] == "exact"
    exact = their_values(saved["state"][0][NESTED], 2)
    if bits == "rowwise":
        np.testing.assert_allclose(state[0].nu["weight"][:, 0], exact.mean(-1), rtol=1e-6)
    else:
        np.testing.assert_allclose(state[0].nu["weight"].astype(np.float32), exact, rtol=2**-8)
    dumped, _ = bitsandbytes.dump_optimizer_state(tx, params, state, order=["weight", "bias"], param_groups=GROUP)
    assert dumped["state"][0][NESTED]["state2"].shape == WEIGHT


# --- as in bitsandbytes' own tests: save and load during training ----------------------------------------------------


QUICK = ("adamw8bit", "lamb8bit", "ademamix8bit_schedules", "sgd32bit")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in QUICK else pytest.mark.slow, id=c.name) for c in STATE_DICTS],
)
@pytest.mark.one_in(7)
def test_saving_and_loading_during_training_changes_nothing(case):
    """As test_optimizer8bit and test_ademamix_state_dict_no_nan there: every ten steps, codes and maps are the same."""
    tx, params = our_optimizer(case, state_format=BLOCKS), {"kernel": normal(0, (9, 512), 0.1)}
    take, state = fused(tx), tx.init(params)
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "alpha": 5.0}
    for step in range(30):
        params, state = take({"kernel": normal(step, (9, 512), 0.01)}, state, params)
        if step % 10 == 9:
            options = {"order": ["kernel"]}
            saved, report = bitsandbytes.dump_optimizer_state(tx, params, state, param_groups=group, **options)
            assert report.exact
            loaded, report = bitsandbytes.load_optimizer_state(saved, tx, params, **options)
            assert report.exact
            assert_same(loaded, state)
            state = loaded
    assert np.isfinite(params["kernel"]).all()


# --- live ------------------------------------------------------------------------------------------------------------


@every_case
def test_live_bitsandbytes_continues_from_a_dumped_state(case, frozen, live):
    """Loads torch's own tensors and dumps them again. The installed bitsandbytes then takes the frozen steps."""
    import torch

    saved, params = saved_of(case, frozen)
    saved, params["weight"] = flattened(saved), params["weight"].reshape(-1)
    for one in saved["state"].values():
        one[NESTED] = {name: torch.from_numpy(x) for name, x in one[NESTED].items()}
    tx, order = ours_as_saved(case), ["weight", "bias"]
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=order)
    dumped, _ = bitsandbytes.dump_optimizer_state(
        tx, params, state, order=order, param_groups=saved["param_groups"], tensor=torch.from_numpy
    )
    tensors = [torch.nn.Parameter(torch.from_numpy(np.array(params[name]))) for name in order]
    optimizer = new_optimizer(case, *tensors)
    optimizer.load_state_dict(dumped)
    with exact_quantizer():
        for step in range(SAVED + 1, CONTINUED + 1):
            for p, shape in zip(tensors, (WEIGHT, (31,))):
                p.grad = torch.from_numpy(gradient(shape, step).reshape(-1))
            optimizer.step()
    for name, p in zip(order, tensors):
        expected = arrays_of(case, frozen)[f"{CONTINUED}/{name}"].reshape(-1)
        assert_parameters(case, p.detach().numpy(), expected, CONTINUED - SAVED)


@every_case
def test_live_bitsandbytes_continues_after_our_training(case, live):
    """Our optimizer takes three steps, its state is dumped, then both take two more."""
    import torch

    p = jnp.asarray(parameter(WEIGHT)).reshape(-1)
    tx, params = ours_as_saved(case), {"kernel": p}
    take = jax.jit(lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    state = tx.init(params)
    grad = lambda step: {"kernel": jnp.asarray(gradient(WEIGHT, step)).reshape(-1)}  # noqa: E731
    for step in range(1, SAVED + 1):
        params, state = take(grad(step), state, params)
    tensor = torch.nn.Parameter(torch.from_numpy(np.array(params["kernel"])))
    optimizer = new_optimizer(case, tensor)
    groups = optimizer.state_dict()["param_groups"]
    dumped, report = bitsandbytes.dump_optimizer_state(
        tx, params, state, order=["kernel"], param_groups=groups, tensor=torch.from_numpy
    )
    assert report.exact
    optimizer.load_state_dict(dumped)
    with exact_quantizer():
        for step in range(SAVED + 1, CONTINUED + 1):
            params, state = take(grad(step), state, params)
            take_step_flat(optimizer, tensor, step)
    assert_parameters(case, tensor.detach().numpy(), np.asarray(params["kernel"]), CONTINUED - SAVED)


def take_step_flat(optimizer, tensor, step):
    import torch

    tensor.grad = torch.from_numpy(gradient(WEIGHT, step).reshape(-1))
    optimizer.step()
