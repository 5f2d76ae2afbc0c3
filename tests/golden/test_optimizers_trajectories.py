"""Tests that our optimizers take bitsandbytes' steps: all frozen steps in a row, and live steps one by one.

Measured over the frozen 8-bit cases: none of 138,040 codes differs, scales differ by at most 2 ulps, and parameters by
at most 1.5e-5 learning rates per step and one rounding. A step can be as long as 1,150 learning rates, where a small
second moment is stored as zero. The bound does not grow with that.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_stable_embed.interop import bitsandbytes
from tests.golden.make_optimizers import CASES, CLIPPED, FROZEN, gradient, kept_steps, one_step, parameter
from tests.golden.test_optimizers_formulas import code_values, decode, rule_step
from tests.interop.bitsandbytes.tools import (
    ALL_FP32,
    BLOCKS,
    PER_STEP,
    assert_parameters,
    clips_as_on_cpu,
    fused,
    our_fields,
    our_optimizer,
    ulps,
    with_fields,
)
from tests.interop.bitsandbytes.tools import live as live

every_8bit_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
WRONG_CODES = 1e-4  # the allowed share, and only where a value is within NEAR ulps of a midpoint
NEAR = 4


@pytest.fixture(scope="module")
def frozen():
    with np.load(FROZEN) as file:
        return dict(file)


def run(case, tx):
    """Yields (step, parameter, state, arrays before the step) after every step of a case."""
    params = {"kernel": jnp.asarray(parameter(case.shape))}
    state, take = tx.init(params), fused(tx)
    for step in range(1, case.steps + 1):
        before = np.asarray(params["kernel"]), our_fields(case, state)
        params, state = take({"kernel": jnp.asarray(gradient(case.shape, step))}, state, params)
        yield step, np.asarray(params["kernel"]), state, before


def near_midpoints(case, step, p, fields, scales):
    """Returns, by field, where moments are within NEAR ulps of a midpoint, by the formula in float64."""
    states = [None, None]
    for i in (1, 2):
        if f"state{i}" in fields:
            states[i - 1] = decode(fields[f"state{i}"], fields[f"absmax{i}"], code_values(i == 1))
    _, states, _ = rule_step(case, step, p.astype(np.float64), gradient(case.shape, step).astype(float), states, False)
    near = {}
    for i, moment in enumerate(states, 1):
        if moment is not None:
            values = code_values(i == 1)
            midpoints = (values[1:].astype(float) + values[:-1]) / 2
            ones = decode(np.full(moment.shape, len(values) - 1), scales[f"absmax{i}"], values)  # its last value is 1
            x = moment / np.where(ones > 0, ones, 1)
            at = midpoints[np.abs(x[..., None] - midpoints).argmin(-1)]
            near[f"state{i}"] = np.abs(x - at) <= NEAR * np.spacing(np.abs(at).astype(np.float32))
    return near


@every_8bit_case
@pytest.mark.one_in(4)
def test_twenty_steps_equal_those_of_bitsandbytes(case, frozen):
    kept, wrong, seen = kept_steps(case, frozen), 0, 0
    for step, p, state, before in run(case, our_optimizer(case, state_format=BLOCKS)):
        if step not in kept:
            continue
        near = near_midpoints(case, step, *before, kept[step])
        assert_parameters(case, p, kept[step]["p"], step)
        for name, ours in our_fields(case, state).items():
            theirs = kept[step][name]
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            if name.startswith("state"):
                off = np.abs(ours.astype(int) - theirs)
                assert off.max() <= 1 and not off[~near[name]].any()
                wrong, seen = wrong + off.sum(), seen + off.size
            else:
                assert ulps(ours, theirs).max() <= 2, name
    assert seen and wrong <= WRONG_CODES * seen


@pytest.mark.parametrize("case", CLIPPED, ids=lambda case: case.name)
def test_ten_clipped_steps_equal_those_of_bitsandbytes(case, frozen):
    """States are in 32 bits. For LAMB a schedule turns our limit, which is that of CUDA, into that of the CPU build."""
    kept, params = kept_steps(case, frozen), {"kernel": jnp.asarray(parameter(case.shape))}
    tx = clips_as_on_cpu(case, rules=ALL_FP32)
    state = tx.init(params)
    for step in range(1, case.steps + 1):
        updates, state = tx.update({"kernel": jnp.asarray(gradient(case.shape, step))}, state, params)
        params = optax.apply_updates(params, updates)
        if step in kept:
            assert_parameters(case, np.asarray(params["kernel"]), kept[step]["p"], step)
            for name, ours in our_fields(case, getattr(state, "inner_state", state)).items():
                if name.startswith("state"):
                    scale = np.abs(kept[step][name]).max()
                    np.testing.assert_allclose(ours, kept[step][name], rtol=1e-5, atol=1e-6 * scale)


def test_8bit_moments_are_not_clipped_and_32bit_ones_are():
    """On CPU, LAMB8bit and LARS8bit clip only parameters below the size limit, which have 32-bit moments."""
    params = {"large": jnp.ones(4096), "small": jnp.ones(4095)}
    for factory, options in ((bitsandbytes.lamb8bit, {}), (bitsandbytes.lars8bit, {"momentum": 0.9})):
        tx = factory(1.0, **options, max_unorm=0.25)
        updates, _ = tx.update(params, tx.init(params), params)
        np.testing.assert_allclose(updates["large"], -1.0, rtol=1e-6)
        np.testing.assert_allclose(updates["small"], -0.25, rtol=1e-6)


# --- live: one step at a time from bitsandbytes' own state, with its own quantizer -----------------------------------


@every_8bit_case
def test_one_step_equals_that_of_the_installed_bitsandbytes(case, live):
    """Each step starts from bitsandbytes' state. The tolerances are those of its test_optimizer8bit."""
    tx = our_optimizer(case, state_format=BLOCKS)
    take, p, theirs, step_size = fused(tx), parameter(case.shape), {}, case.options["lr"]
    for step in range(1, 11):
        state = with_fields(case, tx.init({"kernel": jnp.asarray(p)}), theirs, step - 1)
        params, state = take({"kernel": jnp.asarray(gradient(case.shape, step))}, state, {"kernel": jnp.asarray(p)})
        ours = {"p": np.asarray(params["kernel"]), **our_fields(case, state)}
        before, theirs = p, one_step(case, step, p, theirs)
        p = theirs.pop("p")
        for i in (1, 2):
            if f"state{i}" in theirs:
                code = code_values(i == 1)
                values = [decode(x[f"state{i}"], x[f"absmax{i}"], code) for x in (ours, theirs)]
                # At most 8 of 812 differ by a code, because its table is not exact. Its own test allows 20.
                assert (~np.isclose(*values, rtol=1e-3, atol=3e-3 * min(1, np.abs(values[1]).max()))).sum() < 10
                assert ulps(ours[f"absmax{i}"], theirs[f"absmax{i}"]).max() <= 2
        rounding = np.spacing(np.maximum(np.abs(p), np.abs(before)))
        assert (np.abs(ours["p"] - p) <= PER_STEP * step_size + rounding).all()
