"""Trains with a stable embedding and 8-bit AdamW in an NNX model: a small transformer learns to write this very file.

    python examples/quickstart_nnx.py

Takes seconds on CPU. Only the two lines with `fse` differ from a script with Flax and optax alone.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import flax_stable_embed as fse

TEXT = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
BYTES, WIDTH, CONTEXT, STEPS = 256, 128, 64, 100


class Block(nnx.Module):
    """Causal attention, then a two-layer network."""

    def __init__(self, *, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class LanguageModel(nnx.Module):
    """Maps bytes to logits for the next byte."""

    def __init__(self, *, rngs):
        self.tokens = fse.nnx.StableEmbed(BYTES, WIDTH, rngs=rngs)  # instead of nnx.Embed
        self.positions = fse.nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(CONTEXT))[None]
        for block in self.blocks:
            x = block(x, nnx.make_causal_mask(ids))
        return self.tokens.attend(self.norm(x))


model = LanguageModel(rngs=nnx.Rngs(0))
tx = fse.in_place(fse.adamw8bit(3e-3, b2=0.99))  # instead of optax.adamw
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, windows):
    """Runs one step, which updates model and optimizer in place."""

    def loss_of(model):
        logits = model(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


losses = []
for step in range(STEPS):
    starts = np.random.default_rng(step).integers(len(TEXT) - CONTEXT, size=16)
    windows = TEXT[starts[:, None] + np.arange(CONTEXT + 1)]
    losses.append(float(train_step(model, optimizer, windows)))

params = nnx.state(model, nnx.Param)
print(fse.describe(tx, params))
held = sum(leaf.nbytes for leaf in jax.tree.leaves(optimizer.opt_state))
fp32 = 8 * sum(leaf.size for leaf in jax.tree.leaves(params))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; optimizer state {held / 1e6:.2f} MB; in fp32: {fp32 / 1e6:.2f} MB")
