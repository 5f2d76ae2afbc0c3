"""Runs bitsandbytes' own optimizer tests (0.50.2, tests/test_optim.py), under their names and at least as strict."""

import jax.numpy as jnp
import numpy as np
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from tests.golden.make_optimizers import Case
from tests.golden.test_optimizers_formulas import RULES, rule_step
from tests.interop.bitsandbytes.tools import ALL_FP32, BLOCKS, family, fused, normal, our_fields, our_optimizer, twin

# bitsandbytes' cases, with the options that differ from the defaults.
CASES = [
    Case("adam", "Adam8bit", {"lr": 1e-3}),
    Case("adamw", "AdamW8bit", {"lr": 1e-3, "weight_decay": 0.1}),
    Case("lion", "Lion8bit", {"lr": 1e-4}),
    Case("lion_decay", "Lion8bit", {"lr": 1e-4, "weight_decay": 0.1}),
    Case("momentum", "SGD8bit", {"lr": 0.01, "momentum": 0.9}),
    Case("momentum_decay", "SGD8bit", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    Case("rmsprop", "RMSprop8bit", {"lr": 0.01, "alpha": 0.9}),
    Case("rmsprop_decay", "RMSprop8bit", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1}),
    Case("adagrad", "Adagrad8bit", {"lr": 0.01}),
    Case("ademamix", "AdEMAMix8bit", {"lr": 1e-3}),
    Case("ademamix_scheduled", "AdEMAMix8bit", {"lr": 1e-3, "t_alpha": 100, "t_beta3": 100}),
    Case("lars", "LARS8bit", {"lr": 0.01, "momentum": 0.9}),
    Case("lamb", "LAMB8bit", {"lr": 1e-3}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# Mean |error| and mean |error / parameter| of one step. bitsandbytes allows 6e-5 and 6e-4, and in bfloat16 the same as
# here.
ALLOWED = {"float32": (3e-8, 1e-5), "float16": (6e-5, 6e-4), "bfloat16": (1.7e-4, 1.6e-3)}


@every_case
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1024, 32), "float32"),
        ((61, 129), "float32"),
        ((1024, 32), "bfloat16"),
        pytest.param((1024, 32), "float16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.one_in(14)
def test_optimizer8bit(case, shape, dtype):
    one_step_errors(case, shape, dtype, steps=50)


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 4097)])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_optimizer8bit_of_full_size(case, shape, dtype):
    one_step_errors(case, shape, dtype, steps=50 if shape[1] == 1024 and dtype == "float32" else 5)


def one_step_errors(case, shape, dtype, steps):
    """Checks every step against the formula in float64, from the parameter and moments stored by the step before."""
    tx, p = our_optimizer(case, state_format=BLOCKS), normal(0, shape, 0.1, dtype)
    params, take = {"kernel": p}, fused(tx)
    state = tx.init(params)
    stored = [None, None]
    for name in our_fields(case, state):
        if name.startswith("state"):
            codes = our_fields(case, state)[name]
            stored[int(name[-1]) - 1] = np.zeros(codes.shape)
    for step in range(1, steps + 1):
        grad = normal(step, shape, 0.01, dtype)
        expected_p, expected, _ = rule_step(
            case, step, np.asarray(params["kernel"], np.float64), np.asarray(grad, np.float64), stored, False
        )
        params, state = take({"kernel": grad}, state, params)
        stored = decoded(case, state, shape)
        for ours, theirs in zip(stored, expected):
            if theirs is not None:
                assert (~np.isclose(ours, theirs, rtol=1e-3, atol=3e-3)).sum() < max(1, 20 * min(1, p.size / 2**15))
        error = np.abs(np.asarray(params["kernel"], np.float64) - expected_p)
        mean, relative = ALLOWED[dtype]
        assert error.mean() < mean and (error / (np.abs(expected_p) + 1e-9)).mean() < relative


def decoded(case, state, shape):
    """[state1, state2] as in bitsandbytes, in float64."""

    def values(name):
        return fse.ops.dequantize(
            getattr(state[0], name)["kernel"],
            getattr(state[0], f"{name}_absmax")["kernel"],
            signed=name != twin(case).state2,
            codec="dynamic",
            block_size=min(256, shape[-1]),
        )

    first = [np.asarray(values(name), np.float64) for name in twin(case).state1]
    second = twin(case).state2 and np.asarray(values(twin(case).state2), np.float64)
    return [first[0] if len(first) == 1 else np.stack(first), second]


# Absolute and relative tolerance, as in bitsandbytes' tests.
WITHIN_32BIT = {"float32": (1e-6, 1e-5), "float16": (1e-4, 1e-3), "bfloat16": (1e-3, 1e-2)}


@every_case
@pytest.mark.parametrize(
    "shape", [(1024, 1), *(pytest.param((1024, n), marks=pytest.mark.slow) for n in (32, 1024, 4097))]
)
@pytest.mark.parametrize("dtype", WITHIN_32BIT)
@pytest.mark.one_in(10)
def test_optimizer32bit(case, shape, dtype):
    """Takes 20 steps and checks each one; this includes test_lion32bit_weight_decay.

    In float32 the formula runs on its own. In other dtypes it starts each step from our parameter, as in bitsandbytes'
    tests. LAMB and LARS do not clip here, because the formula does not.
    """
    limit = {"max_unorm": 0.0} if family(case) in ("LAMB", "LARS") else {}
    atol, rtol = WITHIN_32BIT[dtype]
    tx, p = our_optimizer(case, rules=ALL_FP32, **limit), np.asarray(normal(0, shape, 0.1, dtype))
    params, take = {"kernel": jnp.asarray(p)}, fused(tx)
    state, expected_p, expected = tx.init(params), p.astype(np.float64), None
    zero = np.zeros(shape)
    expected = [np.zeros((2, *shape)) if family(case) == "AdEMAMix" else zero, zero]
    for step in range(1, 21):
        grad = normal(step, shape, 0.01, dtype)
        if dtype != "float32":
            expected_p = np.asarray(params["kernel"], np.float64)
        expected_p, expected, _ = rule_step(case, step, expected_p, np.asarray(grad, np.float64), expected, False)
        params, state = take({"kernel": grad}, state, params)
        for i, theirs in enumerate(expected, 1):
            if theirs is not None:
                np.testing.assert_allclose(our_fields(case, state)[f"state{i}"], theirs, rtol=rtol, atol=atol)
        wrong = ~np.isclose(np.asarray(params["kernel"], np.float64), expected_p, rtol=rtol, atol=atol)
        # bitsandbytes allows 15 of any size, compared with float32. Here the formula is in float64.
        assert wrong.sum() <= 15 * max(min(1, p.size / 2**15), p.size / 2**20)


def test_override_config():
    """A rule for one parameter, to 8 and to 32 bits. It changes no other parameter and no other optimizer."""
    params = {name: jnp.zeros((64, 64)) for name in ("p1", "p2", "p3")}
    state = bitsandbytes.adam8bit(1e-3, rules=(("p3", 8), (".*", 32))).init(params)[0]
    assert [str(state.mu[name].dtype) for name in params] == ["float32", "float32", "uint8"]
    assert [str(state.nu[name].dtype) for name in params] == ["float32", "float32", "uint8"]
    state = bitsandbytes.adam8bit(1e-3, rules=(("p1", 32),)).init(params)[0]
    assert [str(state.mu[name].dtype) for name in params] == ["float32", "uint8", "uint8"]
    assert bitsandbytes.adam8bit().init(params)[0].mu["p1"].dtype == jnp.uint8


def test_lamb_max_unorm_changes_the_update():
    params, grads = {"p": normal(0, (32, 32), 0.1)}, {"p": normal(1, (32, 32), 0.01)}
    short, long = (fused(bitsandbytes.lamb8bit(max_unorm=m)) for m in (1e-4, 10.0))
    state = bitsandbytes.lamb8bit().init(params)
    a, b = (take(grads, state, params)[0]["p"] for take in (short, long))
    assert not np.allclose(a, b)
    same = fused(bitsandbytes.lamb8bit(max_unorm=None))(grads, state, params)[0]["p"]
    np.testing.assert_array_equal(fused(bitsandbytes.lamb8bit(max_unorm=0.0))(grads, state, params)[0]["p"], same)


def test_unsupported_arguments_are_refused():
    with pytest.raises(TypeError, match="amsgrad"):
        bitsandbytes.adam8bit(amsgrad=True)
    with pytest.raises(TypeError, match="optim_bits"):
        bitsandbytes.adagrad8bit(optim_bits=32)
    with pytest.raises(TypeError, match="momentum"):
        bitsandbytes.sgd8bit(0.1)


def test_formulas_of_all_families_are_tested():
    assert {family(case) for case in CASES} == set(RULES)
