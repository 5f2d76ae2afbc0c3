"""Checks that a wheel works without the repository and without extras. `make dist` runs it in a bare environment."""

import sys
from importlib.metadata import files, requires
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.training.train_state import TrainState

import flax_stable_embed as fse

package = Path(fse.__file__).parent
assert package.is_relative_to(sys.prefix), f"This is not the wheel: {package}"
assert (package / "py.typed").exists() and (package / "ops/blockwise/README.md").exists()
folders = {file.parts[0] for file in files("flax-stable-embed")}
assert {name.partition("-")[0] for name in folders} == {"flax_stable_embed"}, folders
assert all(
    line.startswith(("jax>", "flax>", "optax>", "numpy>")) or "extra ==" in line
    for line in requires("flax-stable-embed")
)

ids = jnp.arange(16)[None]
tx = fse.adamw8bit(1e-3)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, ids):
        tokens = fse.linen.StableEmbed(256, 128)
        return tokens.attend(linen.Dense(128)(tokens(ids)))


params = LinenModel().init(jax.random.key(0), ids)["params"]
state = TrainState.create(apply_fn=LinenModel().apply, params=params, tx=tx)
grads = jax.grad(lambda p: jnp.mean(state.apply_fn({"params": p}, ids) ** 2))(state.params)
state = state.apply_gradients(grads=grads)
assert state.opt_state[0].mu["Dense_0"]["kernel"].dtype == jnp.int8
assert jnp.any(state.params["Dense_0"]["kernel"] != params["Dense_0"]["kernel"])


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.tokens, self.hidden = fse.nnx.StableEmbed(256, 128, rngs=rngs), nnx.Linear(128, 128, rngs=rngs)

    def __call__(self, ids):
        return self.tokens.attend(self.hidden(self.tokens(ids)))


model = NnxModel(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
before = model.hidden.kernel[...]
optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(ids) ** 2))(model))
assert optimizer.opt_state[0].mu.hidden.kernel[...].dtype == jnp.int8
assert jnp.any(model.hidden.kernel[...] != before)

print(fse.describe(tx, params))
print(f"flax_stable_embed {fse.__version__} works from its wheel")
