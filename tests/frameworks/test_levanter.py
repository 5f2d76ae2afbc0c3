"""Tests levanter's flow: modules of named arrays, masks by regular expressions, `inject_hyperparams` around a chain.

The flow is that of https://github.com/stanford-crfm/levanter (`OptimizerConfig.build`, `build_weight_decay_mask`), in
our own words; the modules are dataclasses with the paths that levanter's have.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import flax_stable_embed as fse
from tests.frameworks.tools import batch_of, by_path
from tests.tools import SMALL, assert_same_bits, is_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    array: jax.Array
    axes: tuple = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: Named
    bias: Named | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Embeddings:
    token_embeddings: Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    embeddings: Embeddings
    up_proj: Linear


def model():
    table, kernel = Named(jnp.ones((128, 64)), ("vocab", "embed")), Named(jnp.ones((64, 256)), ("embed", "mlp"))
    return Model(Embeddings(Linear(table, None)), Linear(kernel, Named(jnp.ones(256), ("mlp",))))


def decays(params):
    """Levanter's mask as a function of the parameters: True where a regular expression matches the path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(re.search("weight", jax.tree_util.keystr(path))), params
    )


def optimizer(scale_by, **options):
    """Levanter's chain: clipping, scaling, decay, and a learning rate from a schedule by `inject_hyperparams`."""

    def chain(learning_rate):
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            scale_by(**options),
            optax.add_decayed_weights(0.1, decays),
            optax.scale(-learning_rate),
        )

    return optax.inject_hyperparams(chain)(learning_rate=optax.linear_schedule(0.0, 0.01, 10))


RULES = (("embeddings|norm|ln_|bias", 32),)  # its paths end in "weight/array" and "bias/array"


@pytest.mark.parametrize("scale_by", [fse.scale_by_adam8bit, fse.scale_by_lion8bit])
def test_the_chain_trains_with_a_rule_for_fp32_parameters(scale_by):
    params = model()
    tx = optimizer(scale_by, rules=RULES, state_format=SMALL)
    state, theirs = tx.init(params), optimizer(scale_by, rules=((".*", 32),)).init(params)
    with_fp32 = optimizer(scale_by, rules=((".*", 32),))
    step, step32 = jax.jit(tx.update), jax.jit(with_fp32.update)
    for i in range(3):
        updates, state = step(batch_of(params, i), state, params)
        expected, theirs = step32(batch_of(params, i), theirs, params)
    assert step._cache_size() <= 1
    moments = {path: x for path, x in by_path(state).items() if re.search("/(mu|nu)/", path)}
    kernels = {path for path in moments if "up_proj/weight" in path}
    assert kernels == {path for path, x in moments.items() if is_codes(x)} != set()
    assert_same_bits((updates.embeddings, updates.up_proj.bias), (expected.embeddings, expected.up_proj.bias))
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.002)


def test_a_warning_names_embeddings_without_a_rule():
    with pytest.warns(UserWarning, match="token_embeddings"):
        optimizer(fse.scale_by_adam8bit).init(model())
