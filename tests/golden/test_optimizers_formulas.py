"""Tests our reading of bitsandbytes' formulas, rules and encoding, in float64 numpy against its frozen steps.

Every code is the same for 20 steps. Parameters, scales and 32-bit states agree within a few float32 roundings. Where
torch and bitsandbytes are installed, they take the frozen steps again.
"""

import json
import warnings
from functools import cache
from math import exp, log, sqrt

import numpy as np
import pytest

from tests.golden.make_optimizers import (
    BLOCK,
    CASES,
    CLIPPED,
    CONTINUED,
    FROZEN,
    FROZEN_STATE_DICTS,
    HERE,
    SAVED,
    SHAPES,
    STATE_DICTS,
    given_key,
    gradient,
    gradients_sha256,
    kept_steps,
    one_step,
    parameter,
    saved_and_continued,
    state_dict,
    torch_rounds_as_frozen,
    trajectory,
    without_gradient,
)

EPS = np.finfo(np.float32).eps
every_case = pytest.mark.parametrize("case", [*CASES, *CLIPPED], ids=lambda case: case.name)
every_state_dict = pytest.mark.parametrize("case", STATE_DICTS, ids=lambda case: case.name)


@cache
def frozen(path):
    with np.load(path) as file:
        return dict(file)


# --- the rules: (p, g, state1, state2, t) -> (u before the learning rate, state1, state2) -----------------------------


def adam(p, g, m, v, t, betas=(0.9, 0.999), eps=1e-8, **_):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    return m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps), m, v


def ademamix(p, g, m, v, t, betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=None, t_beta3=None, eps=1e-8, **_):
    b1, b2, b3 = betas
    if t_alpha:
        alpha = min(alpha * t / t_alpha, alpha)
    if t_beta3:
        b3 = min(exp(log(b1) * log(b3) / ((1 - t / t_beta3) * log(b3) + t / t_beta3 * log(b1))), b3)
    m = np.stack([b1 * m[0] + (1 - b1) * g, b3 * m[1] + (1 - b3) * g])
    v = b2 * v + (1 - b2) * g**2
    return (m[0] / (1 - b1**t) + alpha * m[1]) / (np.sqrt(v) / sqrt(1 - b2**t) + eps), m, v


def momentum(p, g, m, _v, t, momentum=0.9, **_):
    m = momentum * m + g  # the trace starts at zero, so the special case of the first step needs no line here
    return m, m, None


def lion(p, g, m, _v, t, betas=(0.9, 0.99), **_):
    return np.sign(betas[0] * m + (1 - betas[0]) * g), betas[1] * m + (1 - betas[1]) * g, None


def rmsprop(p, g, v, _v, t, alpha=0.99, eps=1e-8, **_):
    v = alpha * v + (1 - alpha) * g**2
    return g / (np.sqrt(v) + eps), v, None


def adagrad(p, g, v, _v, t, eps=1e-10, **_):
    return g / (np.sqrt(v + g**2) + eps), v + g**2, None


RULES = {
    "Adam": adam,
    "AdamW": adam,
    "LAMB": adam,
    "AdEMAMix": ademamix,
    "SGD": momentum,
    "LARS": momentum,
    "Lion": lion,
    "RMSprop": rmsprop,
    "Adagrad": adagrad,
}
COUPLED = (
    "SGD",
    "LARS",
    "RMSprop",
    "Adagrad",
)  # decay is added to the gradient; elsewhere p (1 - lr decay) comes first
DECAYS = {"AdamW": 0.01, "AdEMAMix": 0.01}
MAX_UNORM = {"LAMB": 1.0, "LARS": 0.02}


def rule_step(case, step, p, g, states, clipped):
    """Returns (parameter, states, norm of the update) in float64, from float64 states."""
    name = case.optimizer.removesuffix("8bit").removesuffix("32bit")
    lr, decay = case.options["lr"], case.options.get("weight_decay", DECAYS.get(name, 0.0))
    start = p
    if name in COUPLED:
        g = g + decay * p
    else:
        p = p * (1 - lr * decay)
    update, *states = RULES[name](p, g, *states, step, **case.options)
    unorm, scale = 0.0, 1.0
    if clipped and name in MAX_UNORM:
        b1, b2 = case.options.get("betas", (0.9, 0.999))
        # The CPU build takes the norm of LAMB's update without its bias corrections.
        unorm = np.linalg.norm(update) * ((1 - b1**step) / sqrt(1 - b2**step) if name == "LAMB" else 1.0)
        scale = min(1.0, case.options.get("max_unorm", MAX_UNORM[name]) * np.linalg.norm(start) / unorm)
    return p - lr * scale * update, states, unorm


# --- storage ----------------------------------------------------------------------------------------------------------


@cache
def code_values(signed):
    words = json.loads((HERE / "dynamic_map.json").read_text())["signed" if signed else "unsigned"]
    return np.array([int(word, 16) for word in words], np.uint32).view(np.float32)


def decode(codes, absmax, code):
    scales = np.repeat(absmax, BLOCK, axis=-1)[..., : codes[0].size if absmax.ndim == 2 else codes.size]
    return code[codes].astype(np.float64) * scales.reshape(codes.shape)


def encode(x, rows, signed):
    """Returns the nearest codes (a tie goes to the lower one) and the absmax of each block, row by row."""
    flat = x.astype(np.float32).reshape(rows, -1)
    absmax = np.maximum.reduceat(np.abs(flat), range(0, flat.shape[1], BLOCK), axis=1)
    scales = np.repeat(np.where(absmax > 0, absmax, 1), BLOCK, axis=1)[:, : flat.shape[1]]
    code = code_values(signed)
    codes = np.searchsorted((code[:-1] + code[1:]) * np.float32(0.5), flat / scales)
    return codes.astype(np.uint8).reshape(x.shape), absmax if rows == 2 else absmax[0]


def values(state):
    """Returns (state1, state2) of a kept step in float64."""
    return [
        None
        if f"state{i}" not in state
        else decode(state[f"state{i}"], state[f"absmax{i}"], state.get(f"qmap{i}", code_values(i == 1)))
        if f"absmax{i}" in state
        else state[f"state{i}"].astype(np.float64)
        for i in (1, 2)
    ]


def next_step(case, step, before):
    """Returns the kept step after `before`, in the same dtypes. For the first step, `before` is `start`."""
    p, states, unorm = rule_step(
        case,
        step,
        before["p"].astype(np.float64),
        gradient(before["p"].shape, step),
        values(before),
        "absmax1" not in before,
    )
    after = {"p": p.astype(np.float32)}
    for i, state in enumerate(states, 1):
        if f"absmax{i}" in before:
            after[f"state{i}"], after[f"absmax{i}"] = encode(state, before[f"absmax{i}"].ndim, i == 1)
        elif state is not None:
            after[f"state{i}"] = state.astype(np.float32)
    if "unorm_vec" in before and "absmax1" not in before:
        after["unorm_vec"] = np.float32([unorm])
    return {**before, **after}


def start(case, like):
    return {name: np.zeros_like(array) for name, array in like.items()} | {"p": parameter(case.shape)}


def assert_the_same(found, expected, before, roundings):
    """Checks that codes are equal, and all else within float32 roundings of the larger of before and now."""
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        if theirs.dtype == np.uint8:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            off = np.abs(ours - theirs) / np.maximum(np.maximum(np.abs(theirs), np.abs(before[name])), 1e-30) / EPS
            assert off.max() <= roundings, f"{name}: {off.max()} roundings"


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_gradients_are_those_of_the_frozen_steps(shape):
    assert np.array_equal(frozen(FROZEN)[f"{given_key(shape)}/p"], parameter(shape))
    assert frozen(FROZEN)[f"{given_key(shape)}/gradients_sha256"] == gradients_sha256(shape)


@every_case
@pytest.mark.one_in(4)
def test_the_first_two_steps_follow_the_formula(case):
    kept = kept_steps(case, frozen(FROZEN))
    kept[0] = start(case, kept[1])
    for step in (1, 2):
        found = next_step(case, step, kept[step - 1])
        assert_the_same(found, kept[step], kept[step - 1], roundings=4)


@every_case
@pytest.mark.one_in(4, start=1)
def test_all_steps_follow_the_formula(case):
    kept = kept_steps(case, frozen(FROZEN))
    now = peak = start(case, kept[1])
    for step in range(1, case.steps + 1):
        now = next_step(case, step, now)
        peak = {name: np.maximum(np.abs(now[name]), np.abs(peak[name])) for name in now}
        if step in kept:
            assert_the_same(now, kept[step], peak, roundings=10)  # measured: 8.9


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_elements_without_gradient_move_only_if_they_decay(case):
    still = without_gradient(case.shape)
    moved = [
        not np.array_equal(kept["p"][still], parameter(case.shape)[still])
        for kept in kept_steps(case, frozen(FROZEN)).values()
    ]
    assert all(moved) if case.options.get("weight_decay") else not any(moved)


@every_state_dict
def test_training_continues_from_state_dicts_by_the_formula(case):
    arrays = {
        name.removeprefix(f"{case.name}/"): array
        for name, array in frozen(FROZEN_STATE_DICTS).items()
        if name.startswith(f"{case.name}/")
    }
    saved = state_dict(arrays["structure"], arrays)
    assert saved.keys() == {"state", "param_groups"} and saved["state"].keys() == {0, 1}
    assert saved["param_groups"][0]["params"] == [0, 1]
    assert isinstance(saved["param_groups"][0]["betas"], tuple)
    for i, name in enumerate(("weight", "bias")):
        state = saved["state"][i]
        assert state.keys() == {"step", "__bnb_optimizer_quant_state__"} and state["step"] == SAVED
        state = state["__bnb_optimizer_quant_state__"]
        assert ("absmax1" in state) == ("qmap1" in state) == (name == "weight" and "8bit" in case.optimizer)
        now = {"p": arrays[f"{SAVED}/{name}"], **state}
        for step in range(SAVED + 1, CONTINUED + 1):
            now = next_step(case, step, now)
        expected = {"p": arrays[f"{CONTINUED}/{name}"]}
        assert_the_same({"p": now["p"]}, expected, {"p": arrays[f"{SAVED}/{name}"]}, roundings=8)


@pytest.fixture
def live():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their warnings at import are not ours
        for name in ("torch", "bitsandbytes"):
            pytest.importorskip(name, reason="torch and bitsandbytes are not installed (dependency group `parity`)")
        if not torch_rounds_as_frozen():
            pytest.skip("torch has no fused multiply-adds on this CPU, so its codes have other last bits")
        yield


@every_case
def test_live_bitsandbytes_takes_the_frozen_steps(case, live):
    kept = kept_steps(case, frozen(FROZEN))
    for step, found in trajectory(case).items():
        assert_the_same(found, kept[step], kept[step], roundings=10)  # torch's square root depends on the CPU


@every_case
def test_the_replaced_quantizer_does_not_change_parameters(case, live):
    kept = kept_steps(case, frozen(FROZEN))
    found = one_step(case, 2, kept[1]["p"], kept[1])
    assert_the_same({"p": found["p"]}, {"p": kept[2]["p"]}, kept[2], roundings=2)
    if "absmax1" in found and not case.options.get("weight_decay"):
        zero = found["state1"][..., without_gradient(case.shape)]
        assert np.any(zero == 131), "bitsandbytes stores zero as zero now: drop our quantizer"


@every_state_dict
def test_live_bitsandbytes_gives_the_frozen_state_dicts(case, live):
    for name, found in saved_and_continued(case).items():
        expected = frozen(FROZEN_STATE_DICTS)[f"{case.name}/{name}"]
        if name == "structure":
            assert found == expected
        else:
            assert_the_same({name: found}, {name: expected}, {name: expected}, roundings=10)
