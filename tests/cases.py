"""What the sweeps in tests/contracts run over: whoever joins a list here is tested fully."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import flax_stable_embed as fse

# --- modules: the same class name and options in flax_stable_embed.linen and flax_stable_embed.nnx -------------------


class ModuleCase(NamedTuple):
    """A module and its options; 8 rows of 16 features, so that every sharding on 8 devices divides."""

    name: str
    module: str
    options: dict[str, Any]
    num_embeddings: int = 8
    features: int = 16


MODULES = [
    ModuleCase("embed", "Embed", {}),
    ModuleCase("embed_bfloat16_output", "Embed", {"dtype": jnp.bfloat16}),
    ModuleCase("embed_bfloat16_table", "Embed", {"param_dtype": jnp.bfloat16}),
    ModuleCase(
        "embed_everything",
        "Embed",
        {"padding_idx": -1, "max_norm": 0.5, "norm_type": 1.0, "scale_grad_by_freq": True},
    ),
    ModuleCase("stable_embed", "StableEmbed", {}),
    ModuleCase("stable_embed_float16_table", "StableEmbed", {"param_dtype": jnp.float16}),
    ModuleCase(
        "stable_embed_everything",
        "StableEmbed",
        {
            "dtype": jnp.bfloat16,
            "padding_idx": 0,
            "max_norm": 0.1,
            "norm_type": jnp.inf,
            "scale_grad_by_freq": True,
            "norm_epsilon": 1e-3,
        },
    ),
]

# --- optimizers: our factory beside its optax namesake, the hyper-parameters of both, and the chainable halves --------


@dataclass(frozen=True, eq=False)  # compared and hashed as itself, so that tests can cache what they build from it
class OptimizerCase:
    """An 8-bit optimizer and what it must equal where nothing is in 8 bits.

    `hyper` goes to `ours` and to `theirs`, `hyper` without the keys in `only_whole` to the halves.
    """

    name: str
    ours: Callable
    theirs: Callable  # of optax
    hyper: dict[str, Any]
    state: type
    half: Callable
    their_half: Callable
    only_whole: tuple[str, ...] = ("learning_rate", "weight_decay")


ADAM = fse.ScaleByAdam8bitState, fse.scale_by_adam8bit, optax.scale_by_adam

OPTIMIZERS = [
    OptimizerCase("adam8bit", fse.adam8bit, optax.adam, {"learning_rate": 0.01}, *ADAM),
    OptimizerCase("adamw8bit", fse.adamw8bit, optax.adamw, {"learning_rate": 0.01, "weight_decay": 0.1}, *ADAM),
]
