"""Tests every optimizer of `interop.bitsandbytes`: defaults, contracts, and cases that bitsandbytes does not test."""

import inspect

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from flax_stable_embed.optim.engine.options import Options
from tests.interop.bitsandbytes.tools import BLOCKS, fused, normal
from tests.tools import REPRESENTATIVE, UNUSUAL_OPTIONS
from tests.tools import options_of_engines as options_of_engines

OPTIMIZERS = {
    "adam8bit": {},
    "adamw8bit": {},
    "sgd8bit": {"learning_rate": 1e-2, "momentum": 0.9},
    "rmsprop8bit": {},
    "adagrad8bit": {},
    "lion8bit": {},
    "lamb8bit": {},
    "lars8bit": {"learning_rate": 1e-2, "momentum": 0.9},
    "ademamix8bit": {"t_alpha": 8, "t_beta3": 12},
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# For tests that do not depend on the formula. `make test-all` adds the others.
every_kind_of_optimizer = pytest.mark.parametrize(
    "name",
    [n if n in REPRESENTATIVE else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS],
)


def make(name, **options):
    return getattr(bitsandbytes, name)(**OPTIMIZERS[name], **options)


def without_decay(name):
    factory = getattr(bitsandbytes, name)
    assert "weight_decay" in inspect.signature(factory).parameters
    return factory(**OPTIMIZERS[name], weight_decay=0.0, state_format=BLOCKS)


# --- signatures ------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_bitsandbytes():
    expected = {
        "adam8bit": (1e-3, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0}),
        "adamw8bit": (1e-3, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}),
        "lamb8bit": (1e-3, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0, "max_unorm": 1.0}),
        "ademamix8bit": (
            1e-3,
            {"b1": 0.9, "b2": 0.999, "b3": 0.9999, "alpha": 5.0, "t_alpha": None, "t_beta3": None, "eps": 1e-8}
            | {"weight_decay": 1e-2},
        ),
        "lion8bit": (1e-4, {"b1": 0.9, "b2": 0.99, "weight_decay": 0}),
        "sgd8bit": (inspect.Parameter.empty, {"momentum": inspect.Parameter.empty, "weight_decay": 0}),
        "lars8bit": (
            inspect.Parameter.empty,
            {"momentum": inspect.Parameter.empty, "weight_decay": 0, "max_unorm": 0.02},
        ),
        "rmsprop8bit": (1e-2, {"decay": 0.99, "eps": 1e-8, "weight_decay": 0}),
        "adagrad8bit": (1e-2, {"eps": 1e-10, "weight_decay": 0}),
    }
    for name, (rate, rest) in expected.items():
        parameters = inspect.signature(getattr(bitsandbytes, name)).parameters
        found = {key: p.default for key, p in parameters.items() if p.kind is not p.KEYWORD_ONLY}
        assert found == {"learning_rate": rate} | rest
        options = {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert options.pop("state_format") == fse.StateFormat("dynamic", "nearest", block_size=256, block_axis=-1)
        assert options == {"rules": (), "implementation": None, "partition_specs": None, "skip_nonfinite": False}


def test_every_optimizer_of_the_module_is_swept():
    assert {name for name in dir(bitsandbytes) if name.endswith("8bit")} == set(OPTIMIZERS)


# --- contracts -------------------------------------------------------------------------------------------------------


@every_kind_of_optimizer
def test_hyperparameters_can_be_injected_and_nothing_compiles_twice(name):
    params = {"kernel": normal(0, (8, 512), 0.1), "bias": normal(1, (8,), 0.1)}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    plain = make(name)
    injected = optax.inject_hyperparams(getattr(bitsandbytes, name))(**OPTIMIZERS[name])
    state, expected_state = injected.init(params), plain.init(params)
    step, expected_step = jax.jit(lambda *args: injected.update(*args)), jax.jit(lambda *args: plain.update(*args))
    for _ in range(3):
        updates, state = step(grads, state, params)
        expected, expected_state = expected_step(grads, expected_state, params)
    assert max(step._cache_size(), expected_step._cache_size()) <= 1
    for found, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)):
        # A traced rate is a float32, which gives 1 - b2 a relative error of up to 3e-5, and 1 - b3 one of 3e-4.
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * scale)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    updates, state = step(grads, state, params)
    assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))


@every_kind_of_optimizer
@pytest.mark.one_in(4)
def test_the_fused_step_equals_applied_updates(name):
    params = {"kernel": normal(0, (8, 512), 0.1), "bias": normal(1, (8,), 0.1)}
    tx, both = make(name), []
    update = jax.jit(tx.update)
    for path in ("fused", "applied"):
        new, state = params, tx.init(params)
        for step in range(3):
            grads = jax.tree.map(lambda p, step=step: normal(step, p.shape, 0.1), params)
            if path == "fused":
                new, state = fused(tx)(grads, state, new)
            else:
                updates, state = update(grads, state, new)
                new = optax.apply_updates(new, updates)
        both.append((new, state))
    for a, b in zip(jax.tree.leaves(both[0]), jax.tree.leaves(both[1])):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)


@every_optimizer
@pytest.mark.one_in(7)
def test_elements_without_gradient_do_not_move(name):
    """This holds in a block that also has elements with a gradient, and in a short block."""
    params = {"kernel": normal(0, (300,), 0.1), "embedding": normal(1, (64, 16), 0.1)}
    tx, new = without_decay(name), params
    state, step = tx.init(params), fused(tx)
    rows = np.broadcast_to((np.arange(64) % 3 == 0)[:, None], (64, 16))
    touched = {"kernel": np.arange(300) % 3 == 0, "embedding": rows}
    for i in range(29):  # an odd number, after which Lion cannot be back at its start
        grads = jax.tree.map(lambda p, mask, i=i: normal(i, p.shape, 0.1) * mask, params, touched)
        new, state = step(grads, state, new)
    for path, mask in touched.items():
        before, after = np.asarray(params[path]), np.asarray(new[path])
        np.testing.assert_array_equal(after[~mask], before[~mask])
        assert (after[mask] != before[mask]).all()


@every_optimizer
@pytest.mark.one_in(4, start=1)
def test_zero_gradients_from_the_first_step_move_nothing(name):
    params = {"kernel": normal(0, (8, 512), 0.1), "bias": normal(1, (8,), 0.1)}
    tx, new = without_decay(name), params
    state, step = tx.init(params), fused(tx)
    for _ in range(3):
        new, state = step(jax.tree.map(jnp.zeros_like, params), state, new)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


@every_optimizer
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.one_in(28)
def test_a_nonfinite_gradient_affects_only_its_own_element(name, bad):
    params, tail = {"kernel": normal(0, (300,), 0.1)}, 290  # in the short last block
    clean = {"kernel": normal(1, (300,), 0.1)}
    dirty = {"kernel": clean["kernel"].at[tail].set(bad)}
    others = np.arange(300) != tail
    for skip in (False, True):
        tx = make(name, state_format=BLOCKS, skip_nonfinite=skip)
        step, new, state = fused(tx), params, tx.init(params)
        expected, expected_state = params, tx.init(params)
        for grads in (dirty, clean):
            new, state = step(grads, state, new)
            quiet = {"kernel": grads["kernel"].at[tail].set(0.0)}
            expected, expected_state = step(quiet, expected_state, expected)
            if skip and grads is dirty:
                assert new["kernel"][tail] == params["kernel"][tail]
        np.testing.assert_allclose(np.asarray(new["kernel"])[others], np.asarray(expected["kernel"])[others], rtol=1e-6)
        assert skip <= bool(jnp.isfinite(new["kernel"]).all())


@pytest.mark.parametrize("name", ["lamb8bit", "lars8bit"])
def test_skipped_elements_do_not_decay_if_steps_are_clipped(name):
    options = OPTIMIZERS[name] | {"learning_rate": 0.1, "weight_decay": 0.5, "max_unorm": 0.01}
    tx = getattr(bitsandbytes, name)(**options, rules=((".*", 32),), skip_nonfinite=True)
    params = {"kernel": normal(0, (300,), 0.1)}
    new, _ = fused(tx)({"kernel": normal(1, (300,), 0.1).at[7].set(np.nan)}, tx.init(params), params)
    moved = np.asarray(new["kernel"]) != np.asarray(params["kernel"])
    assert not moved[7] and moved.sum() == 299


# --- cases that bitsandbytes does not test ---------------------------------------------------------------------------


@every_kind_of_optimizer
def test_parameters_of_at_least_4096_elements_are_in_8_bits(name):
    params = {"large": jnp.zeros(4096), "small": jnp.zeros(4095)}
    rows = {row.path: row.bits for row in fse.describe(make(name), params).rows}
    assert rows == {"large": 8, "small": 32}


@every_kind_of_optimizer
def test_a_stable_embedding_trains_with_every_optimizer(name):
    """The embedding keeps fp32 moments, the head has 8-bit moments, and rows of tokens that never appear stay."""

    class Model(flax.nnx.Module):
        def __init__(self, rngs):
            self.embed = fse.nnx.StableEmbed(64, 128, rngs=rngs)
            self.head = flax.nnx.Linear(128, 64, rngs=rngs)

        def __call__(self, ids):
            return self.head(self.embed(ids))

    model = Model(flax.nnx.Rngs(0))
    options = OPTIMIZERS[name] | {"learning_rate": 1e-3, "weight_decay": 0.0}
    optimizer = flax.nnx.Optimizer(model, getattr(bitsandbytes, name)(**options), wrt=flax.nnx.Param)
    ids = jnp.arange(256) % 32
    before = model.embed.embedding[...]

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(ids), ids).mean()

    @flax.nnx.jit
    def step(model, optimizer):
        value, grads = flax.nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    after = model.embed.embedding[...]
    np.testing.assert_array_equal(after[32:], before[32:])
    assert not np.array_equal(after[:32], before[:32])
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(x.dtype)
        for path, x in jax.tree_util.tree_leaves_with_path(flax.nnx.state(optimizer).opt_state)
    }
    heads = [dtype for path, dtype in dtypes.items() if "kernel" in path and "absmax" not in path]
    tables = [dtype for path, dtype in dtypes.items() if "embedding" in path]
    assert heads and set(heads) == {"uint8"} and tables and set(tables) == {"float32"}


@every_optimizer
def test_every_option_reaches_the_engine(name, options_of_engines):
    """An option that a factory accepts but does not pass on would be ignored silently."""
    make(name, **UNUSUAL_OPTIONS)
    assert options_of_engines == [Options(**UNUSUAL_OPTIONS)]
