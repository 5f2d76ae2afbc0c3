"""Trains with a stable embedding and 8-bit AdamW in a Linen model: a small transformer learns to write this very file.

    python examples/quickstart_linen.py

Takes seconds on CPU. Only the two lines with `fse` differ from a script with Flax and optax alone.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import flax_stable_embed as fse

TEXT = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
BYTES, WIDTH, CONTEXT, STEPS = 256, 128, 64, 100


class Block(nn.Module):
    """Causal attention, then a two-layer network."""

    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class LanguageModel(nn.Module):
    """Maps bytes to logits for the next byte."""

    @nn.compact
    def __call__(self, ids):
        tokens = fse.linen.StableEmbed(BYTES, WIDTH, name="tokens")  # instead of nn.Embed
        positions = fse.linen.Embed(CONTEXT, WIDTH, name="positions")
        x = tokens(ids) + positions(np.arange(CONTEXT))[None]
        for _ in range(2):
            x = Block()(x, nn.make_causal_mask(ids))
        return tokens.attend(nn.LayerNorm()(x))


model = LanguageModel()
tx = fse.in_place(fse.adamw8bit(3e-3, b2=0.99))  # instead of optax.adamw
params = model.init(jax.random.key(0), TEXT[None, :CONTEXT])["params"]
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def train_step(state, windows):
    """Returns a new state, and the loss of the old one."""

    def loss_of(params):
        logits = state.apply_fn({"params": params}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


losses = []
for step in range(STEPS):
    starts = np.random.default_rng(step).integers(len(TEXT) - CONTEXT, size=16)
    state, loss = train_step(state, TEXT[starts[:, None] + np.arange(CONTEXT + 1)])
    losses.append(float(loss))

print(fse.describe(tx, state.params))
held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
fp32 = 8 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; optimizer state {held / 1e6:.2f} MB; in fp32: {fp32 / 1e6:.2f} MB")
