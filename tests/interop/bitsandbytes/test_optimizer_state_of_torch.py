"""Tests state dicts of torch's own optimizers, with their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes

SHAPE = (6, 40)


def gradient(step):
    return np.random.default_rng(step).normal(size=SHAPE)


def adam(p, steps, b1=0.9, b2=0.999, lr=0.01, eps=1e-8, decay=0.1):
    """torch.optim.AdamW."""
    m = v = np.zeros(SHAPE)
    for t in range(1, steps + 1):
        g = gradient(t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - lr * decay * p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p, {"step": np.float32(steps), "exp_avg": m, "exp_avg_sq": v}


def sgd(p, steps, lr=0.01, momentum=0.9):
    """torch.optim.SGD, which does not count its steps."""
    buffer = np.zeros(SHAPE)
    for t in range(1, steps + 1):
        buffer = momentum * buffer + gradient(t)
        p = p - lr * buffer
    return p, {"momentum_buffer": buffer if steps else None}


def rmsprop(p, steps, lr=0.01, alpha=0.99, eps=1e-8):
    """torch.optim.RMSprop."""
    v = np.zeros(SHAPE)
    for t in range(1, steps + 1):
        v = alpha * v + (1 - alpha) * gradient(t) ** 2
        p = p - lr * gradient(t) / (np.sqrt(v) + eps)
    return p, {"step": np.float32(steps), "square_avg": v}


def adagrad(p, steps, lr=0.01, eps=1e-10):
    """torch.optim.Adagrad."""
    total = np.zeros(SHAPE)
    for t in range(1, steps + 1):
        total = total + gradient(t) ** 2
        p = p - lr * gradient(t) / (np.sqrt(total) + eps)
    return p, {"step": np.float32(steps), "sum": total}


FP32 = {"rules": ((".*", 32),)}
CASES = {
    "AdamW": (adam, lambda **options: fse.adamw8bit(0.01, weight_decay=0.1, **options)),
    "SGD": (sgd, lambda **options: fse.sgd8bit(0.01, momentum=0.9, **options)),
    "RMSprop": (
        rmsprop,
        lambda **options: fse.rmsprop8bit(0.01, decay=0.99, eps=1e-8, eps_in_sqrt=False, **options),
    ),
    "Adagrad": (adagrad, lambda **options: bitsandbytes.adagrad8bit(0.01, eps=1e-10, **options)),
}


def saved_by(name, steps):
    p, state = CASES[name][0](np.ones(SHAPE), steps)
    state = {key: x if x is None else np.asarray(x, np.float32) for key, x in state.items()}
    return p, {"state": {0: state}, "param_groups": [{"params": [0]}]}


@pytest.mark.parametrize("name", CASES)
def test_training_continues_as_in_torch(name):
    p, saved = saved_by(name, 5)
    want, _ = CASES[name][0](np.ones(SHAPE), 8)
    tx, params = CASES[name][1](**FP32), {"kernel": jnp.asarray(p, jnp.float32)}
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"], step=5)
    assert {row.how for row in report.rows} == {"exact"} or report.largest_error < 1e-6
    for t in (6, 7, 8):
        updates, state = jax.jit(tx.update)({"kernel": jnp.asarray(gradient(t), jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], want, rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_moments_are_encoded_where_the_optimizer_has_8_bits(name):
    _, saved = saved_by(name, 5)
    tx = CASES[name][1](state_format=fse.StateFormat(min_size=0))
    params = {"kernel": jnp.ones(SHAPE)}
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"], step=5)
    assert {row.how for row in report.rows} == {"encoded"} and 0 < report.largest_error < 0.02
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, tx.init(params))


def test_steps_are_read_where_torch_counts_them():
    for name in ("AdamW", "RMSprop", "Adagrad"):
        _, saved = saved_by(name, 5)
        state, _ = bitsandbytes.load_optimizer_state(
            saved, CASES[name][1](**FP32), {"kernel": jnp.ones(SHAPE)}, order=["kernel"]
        )
        assert int(state[0].count) == 5
    _, saved = saved_by("SGD", 5)
    with pytest.raises(ValueError, match=r"no 'step' for parameter 0\. Set `step`"):
        bitsandbytes.load_optimizer_state(saved, CASES["SGD"][1](), {"kernel": jnp.ones(SHAPE)}, order=["kernel"])


def test_sgd_before_its_first_step_has_no_moment():
    _, saved = saved_by("SGD", 0)
    state, report = bitsandbytes.load_optimizer_state(
        saved, CASES["SGD"][1](), {"kernel": jnp.ones(SHAPE)}, order=["kernel"], step=0
    )
    assert report.rows[0].how == "absent" and not np.any(state[0].trace["kernel"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"max_exp_avg_sq": np.ones(SHAPE)}, "amsgrad=True"),
        ({"grad_avg": np.ones(SHAPE)}, "centered=True"),
        ({"square_avg": np.ones(SHAPE), "momentum_buffer": np.ones(SHAPE)}, "RMSprop with momentum"),
    ],
)
def test_states_that_no_optimizer_of_ours_has_are_refused(extra, message):
    _, saved = saved_by("AdamW", 3)
    saved["state"][0] |= extra
    with pytest.raises(ValueError, match=message):
        bitsandbytes.load_optimizer_state(saved, CASES["AdamW"][1](), {"kernel": jnp.ones(SHAPE)}, order=["kernel"])


def test_another_optimizer_is_refused():
    _, saved = saved_by("AdamW", 3)
    with pytest.raises(ValueError, match=r"has 2 states for parameter 0 .*, but lion"):
        bitsandbytes.load_optimizer_state(saved, fse.lion8bit(1e-3), {"kernel": jnp.ones(SHAPE)}, order=["kernel"])
