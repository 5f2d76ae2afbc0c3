"""Tests kauldron and gemma: an optimizer in a konfig, which holds only numbers, strings, tuples and calls by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from tests.frameworks.tools import by_path
from tests.tools import SMALL, is_codes

PARAMS = {
    "embedder": {"input_embedding": jnp.ones((128, 64))},
    "mlp": {"gating_einsum": jnp.ones((2, 64, 256))},
    "final_norm": {"scale": jnp.ones(64)},
}


def assert_8bit(tx, kept=()):
    state = jax.eval_shape(tx.init, PARAMS)[0]
    for path, x in jax.tree_util.tree_leaves_with_path(state.mu):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert is_codes(x) == (name == "mlp/gating_einsum" and name not in kept), name


def test_rules_can_be_given_as_plain_data():
    """JSON turns tuples into lists."""
    options = {"rules": (("gating_einsum", 32), ("final_norm", "bf16"))}
    tx = fse.adamw8bit(1e-3, **json.loads(json.dumps(options)))
    assert_8bit(tx, kept=("mlp/gating_einsum",))
    assert_8bit(fse.adamw8bit(1e-3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_konfig_stores_and_builds_the_optimizer():
    konfig = pytest.importorskip("kauldron.konfig", reason="needs kauldron", exc_type=ImportError)
    with konfig.imports():
        import flax_stable_embed as lazy

    optimizer = lazy.adamw8bit(
        1e-3, rules=(("gating_einsum", lazy.Rule(8, state_format=lazy.StateFormat(codec="dynamic", min_size=0))),)
    )
    config = konfig.ConfigDict({"optimizer": optimizer, "rules": (("final_norm", "bf16"),)})
    restored = konfig.ConfigDict(json.loads(config.to_json()))
    tx = konfig.resolve(restored.optimizer)
    assert_8bit(tx)
    assert fse.describe(tx, PARAMS).rows[2].bits == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_gemma_trains():
    gm = pytest.importorskip("gemma.gm", reason="needs gemma", exc_type=ImportError)
    from gemma.gm.nn import config
    from kauldron import kd

    sizes = {"num_embed": 256, "embed_dim": 64, "hidden_dim": 256, "num_heads": 2, "head_dim": 32, "num_kv_heads": 1}
    layers = [config.AttentionType.GLOBAL]
    norms = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
    model = gm.nn.Transformer(
        config=config.TransformerConfig(**sizes, **norms, final_logit_softcap=None, attention_types=layers)
    )
    ids = np.random.default_rng(0).integers(0, 256, (8, 16))
    tx = fse.adamw8bit(1e-2, state_format=SMALL)
    with jax.numpy_rank_promotion("allow"):  # the model relies on it
        params = model.init(jax.random.key(0), ids)["params"]
        params = jax.device_put(params, kd.sharding.FSDPSharding(min_size_to_shard_mb=0)(params))

        @jax.jit
        def step(params, state):
            def loss(params):
                logits = model.apply({"params": params}, ids).logits[:, :-1].astype(jnp.float32)
                return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        state, losses = tx.init(params), []
        for _ in range(5):
            params, state, value = step(params, state)
            losses.append(float(value))
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5
    codes = {path for path, x in by_path(state[0].mu).items() if is_codes(x)}
    assert codes == {path for path in by_path(params) if "scale" not in path and "embedding" not in path}
    for path, x in by_path(state[0].mu).items():
        assert x.sharding.is_equivalent_to(by_path(params)[path].sharding, x.ndim), path
