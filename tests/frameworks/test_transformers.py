"""Tests the flow of transformers' Flax models (last in 4.x): a replicated TrainState and a step under `pmap`.

The flow is that of https://github.com/huggingface/transformers/blob/v4.57.6/examples/flax/language-modeling/run_clm_flax.py
(decay_mask_fn, train_step), written again here.
"""

import functools

import flax.jax_utils
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import flax_stable_embed as fse
from tests.frameworks.tools import OPTIMIZERS, assert_8bit, batch_of, every_optimizer, loss_of
from tests.frameworks.tools import without_framework as on_one_device
from tests.tools import SMALL, assert_nearly

PARAMS = {
    "wte": {"embedding": jnp.ones((128, 64))},
    "mlp": {"c_fc": {"kernel": jnp.ones((256, 64))}},
    "ln_f": {"scale": jnp.ones(64)},
}


def decay_mask(params):
    """Everything decays except for biases and the scales of layer norms."""
    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: path[-1] not in ("bias", "scale") for path in flat})


def trained(tx, params, loss, batches, apply_fn=None):
    state = flax.jax_utils.replicate(TrainState.create(apply_fn=apply_fn, params=params, tx=tx))

    @functools.partial(jax.pmap, axis_name="batch", donate_argnums=0)
    def step(state, batch):
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        return state.apply_gradients(grads=jax.lax.pmean(grads, "batch")), jax.lax.pmean(value, "batch")

    losses = []
    for batch in batches:
        state, value = step(state, batch)
        losses.append(float(value[0]))
    return flax.jax_utils.unreplicate(state), losses


@every_optimizer
@pytest.mark.one_in(5)
def test_a_replicated_train_state_trains_under_pmap(name):
    mask = {} if name == "quantize_state" else {"mask": decay_mask}
    tx = OPTIMIZERS[name](state_format=SMALL, **mask)
    batches = [flax.jax_utils.replicate(batch_of(PARAMS, i)) for i in range(3)]
    state, _ = trained(tx, PARAMS, loss_of, batches)
    assert_8bit(state.opt_state, state.params)
    assert_nearly((state.params, state.opt_state), on_one_device(tx, PARAMS))  # another program, so one ulp may differ


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_the_real_models_train(name, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs transformers<5", exc_type=ImportError)
    if not hasattr(transformers, f"Flax{name}"):
        pytest.skip("needs transformers<5, the last with Flax models")
    jax.config.update("jax_numpy_rank_promotion", "allow")  # its models rely on it
    try:
        if name.startswith("GPT2"):
            config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=32)
        else:
            sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = transformers.BertConfig(vocab_size=128, **sizes)
        model = getattr(transformers, f"Flax{name}")(config)

        def loss(params, ids):
            logits = model(ids, params=params).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

        ids = np.random.default_rng(0).integers(0, 128, (jax.device_count(), 2, 16))
        tx = fse.adamw8bit(1e-2, weight_decay=0.1, mask=decay_mask, state_format=SMALL)
        state, losses = trained(tx, model.params, loss, [ids] * 5, model.__call__)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5
    assert_8bit(state.opt_state, state.params)
