"""Tests that a model in place of its parameters, or an `nnx.Optimizer` in place of its transform, is a clear error."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import build


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


MODEL = Model(nnx.Rngs(0))
TX = {case.name: lambda case=case: build(case) for case in OPTIMIZERS} | {
    "quantize_state": lambda: fse.quantize_state(optax.adam(1e-3)),
    "row_sparse": lambda: fse.row_sparse(fse.adamw8bit(1e-3)),
    "split_weights": lambda: fse.split_weights(fse.adamw8bit(1e-3)),
    "stochastic_round_updates": lambda: fse.stochastic_round_updates(fse.adamw8bit(1e-3)),
}
CALLS = {
    "init": lambda tx, params: tx.init(params),
    "describe": fse.describe,
    "abstract_state": fse.abstract_state,
    "convert_state": lambda tx, params: fse.convert_state(tx, tx, params, ()),
}


@pytest.mark.parametrize("name", TX)
@pytest.mark.parametrize("call", CALLS)
def test_a_model_with_dropout_is_not_parameters(name, call):
    for model in (MODEL, nnx.state(MODEL)):
        with pytest.raises(TypeError, match=r"RngCount at 'dropout/.*nnx\.state\(model, nnx\.Param\)"):
            CALLS[call](TX[name](), model)
    keys = {"dropout": jax.random.key(0), "kernel": jnp.ones((64, 64))}
    with pytest.raises(TypeError, match=r"a random key at 'dropout'.*nnx\.state\(model, nnx\.Param\)"):
        CALLS[call](TX[name](), keys)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", TX)
@pytest.mark.one_in(5)
def test_variables_that_are_not_trained_are_not_parameters(name, call):
    normalized = nnx.BatchNorm(64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(normalized, optax.adam(1e-3), wrt=nnx.Param)
    for wrong, kind in ((normalized, "BatchStat"), (nnx.state(normalized), "BatchStat"), (optimizer, "Opt")):
        with pytest.raises(TypeError, match=rf"have an nnx\.{kind}\w* at .*nnx\.state\(model, nnx\.Param\)"):
            CALLS[call](TX[name](), wrong)
    CALLS["describe"](TX[name](), nnx.state(normalized, nnx.Param))


@pytest.mark.parametrize("call", ["describe", "abstract_state", "convert_state"])
def test_an_nnx_optimizer_is_not_a_transform(call):
    params = nnx.state(MODEL, nnx.Param)
    optimizer = nnx.Optimizer(MODEL, fse.adamw8bit(1e-3), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"got an nnx\.Optimizer.*optimizer\.tx"):
        CALLS[call](optimizer, params)
    CALLS["describe"](optimizer.tx, params)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_gradients_of_some_variables_next_to_a_model_say_what_to_pass(case):
    tx, params = build(case), nnx.state(MODEL, nnx.Param)
    state = tx.init(params)
    grads = nnx.state(MODEL, nnx.Param)
    with pytest.raises(ValueError, match=r"nnx\.state\(model, nnx\.Param\)"):
        tx.update(grads, state, nnx.state(MODEL))
