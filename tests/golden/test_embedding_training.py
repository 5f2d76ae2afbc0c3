"""Tests that tables train as in torch, with every form of `max_norm` and with sparse gradients.

The tables of all steps differ by less than 3e-6, at values of about 1.
"""

import importlib.util

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.golden.make_embedding_training import (
    CASES,
    FROZEN,
    MAX_NORM,
    PADDING_IDX,
    SHAPE,
    SPARSE,
    STEPS,
    inputs,
    torch_tables,
)

TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def frozen():
    with np.load(FROZEN) as file:
        return dict(file)


def optimizer(case):
    """The same formula in optax. torch's Adagrad adds its eps, 1e-10, outside the root, too small to matter."""
    hyper = dict(case.hyper)
    learning_rate = hyper.pop("lr")
    if case.optimizer == "Adagrad":
        hyper.setdefault("initial_accumulator_value", 0.0)
        return optax.adagrad(learning_rate, eps=1e-20, **hyper)
    make = {"SGD": optax.sgd, "Adam": optax.adam, "AdamW": optax.adamw, "SparseAdam": torchs_sparse_adam}[
        case.optimizer
    ]
    return make(learning_rate, **hyper)


def torchs_sparse_adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Adam with `eps` added before the bias correction, as torch.optim.SparseAdam has it."""

    def update(grads, state, params=None):
        t = state.count + 1
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g**2, grads, state.nu)
        rate = learning_rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)
        updates = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(t, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def options(case, **changes):
    return {"padding_idx": PADDING_IDX, **case.options, **changes}


def loss_of(hidden_rows, attend, given, step, tied):
    hidden = jnp.tanh(hidden_rows @ given["layer"])
    loss = ((hidden - given["targets"][step]) ** 2).mean()
    if tied:
        loss += optax.softmax_cross_entropy_with_integer_labels(attend(hidden), given["labels"][step]).mean()
    return loss


def assert_same(tables, frozen, case):
    np.testing.assert_allclose(np.stack(tables), frozen[f"{case.name}/tables"], rtol=0, atol=TOLERANCE)


def linen_tables(case, tx, given, value_and_grad, extra_args, *, fused=False):
    """Trains the table of a Linen module. The optimizer gets `extra_args(ids)`."""
    embed = fse.linen.Embed(*SHAPE, **options(case))

    def loss_fn(params, ids, step):
        bound = embed.bind({"params": params})
        return loss_of(bound(ids), lambda q: bound.attend(q, token_ids=ids), given, step, case.tied)

    @jax.jit
    def one(params, state, ids, step):
        _, grads = value_and_grad(loss_fn)(params, ids, step)
        if fused:
            return fse.fused_update(tx, grads, state, params, **extra_args(ids))
        updates, state = tx.update(grads, state, params, **extra_args(ids))
        return optax.apply_updates(params, updates), state

    given = {name: jnp.asarray(x) for name, x in given.items()}
    params = {"embedding": given["table"]}
    state, tables = tx.init(params), []
    for step in range(STEPS):
        params, state = one(params, state, given["ids"][step], step)
        tables.append(params["embedding"])
    return tables


@pytest.mark.one_in(16)
@pytest.mark.parametrize("case", MAX_NORM, ids=lambda case: case.name)
def test_with_max_norm_trains_like_torch(case, frozen):
    tx = fse.with_max_norm(optimizer(case), **case.options)
    tables = linen_tables(case, tx, inputs(case), jax.value_and_grad, lambda ids: {"token_ids": ids})
    assert_same(tables, frozen, case)


@pytest.mark.one_in(16, start=1)
@pytest.mark.parametrize("case", MAX_NORM, ids=lambda case: case.name)
def test_write_back_trains_like_torch(case, frozen):
    given = inputs(case)
    embed = fse.nnx.Embed.from_pretrained(given["table"], rngs=flax.nnx.Rngs(0), **options(case, write_back=True))
    trained = flax.nnx.Optimizer(embed, optimizer(case), wrt=flax.nnx.Param)

    @flax.nnx.jit
    def one(embed, trained, ids, step):
        def loss_fn(embed):
            return loss_of(embed(ids), embed.attend, jax.tree.map(jnp.asarray, given), step, case.tied)

        trained.update(embed, flax.nnx.grad(loss_fn)(embed))

    tables = []
    for step in range(STEPS):
        one(embed, trained, given["ids"][step], step)
        tables.append(embed.embedding[...])
    assert_same(tables, frozen, case)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", [c for c in MAX_NORM if c.optimizer == "AdamW"], ids=lambda case: case.name)
def test_with_max_norm_trains_like_torch_in_fused_updates(case, frozen):
    inner = fse.adamw8bit(case.hyper["lr"], weight_decay=case.hyper["weight_decay"])
    tx = fse.with_max_norm(inner, **case.options)
    tables = linen_tables(case, tx, inputs(case), jax.value_and_grad, lambda ids: {"token_ids": ids}, fused=True)
    assert_same(tables, frozen, case)


@pytest.mark.parametrize("route", ["row gradients", "token_ids"])
@pytest.mark.parametrize("case", SPARSE, ids=lambda case: case.name)
@pytest.mark.one_in(4)
def test_row_sparse_trains_like_torch(case, route, frozen):
    tx = fse.row_sparse(optimizer(case))
    if route == "row gradients":
        tables = linen_tables(case, tx, inputs(case), fse.row_value_and_grad, lambda ids: {})
    else:
        tables = linen_tables(case, tx, inputs(case), jax.value_and_grad, lambda ids: {"token_ids": ids})
    assert_same(tables, frozen, case)


def test_training_without_with_max_norm_differs_from_torch(frozen):
    """Shows that the cases are sensitive: if rows are scaled in the forward pass only, tables differ by far more."""
    case = next(c for c in MAX_NORM if c.optimizer == "SGD" and not c.tied)
    tables = linen_tables(case, optimizer(case), inputs(case), jax.value_and_grad, lambda ids: {})
    assert np.abs(np.stack(tables) - frozen[f"{case.name}/tables"]).max() > 0.1


@pytest.mark.filterwarnings("ignore:Sparse invariant")  # of torch
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_installed_torch_gives_the_frozen_tables(case, frozen):
    given = inputs(case)
    for name, array in given.items():
        np.testing.assert_array_equal(array, frozen[f"{case.name}/{name}"])
    np.testing.assert_allclose(torch_tables(case), frozen[f"{case.name}/tables"], rtol=0, atol=1e-6)
