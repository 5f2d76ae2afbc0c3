"""Lists the cases that tests/contracts sweeps over. A module or optimizer in a list gets all of these tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import flax_stable_embed as fse

# --- modules: the same class name and options in flax_stable_embed.linen and flax_stable_embed.nnx -------------------


class ModuleCase(NamedTuple):
    """A module and its options. The table has 8 rows of 16 features, so every sharding on 8 devices divides it."""

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

# --- optimizers: our factory, the optax optimizer of that name, hyper-parameters, and the scale_by transforms --------


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that tests can cache what they build
class OptimizerCase:
    """An 8-bit optimizer, and the optax optimizer that it must equal if nothing is stored in 8 bits.

    `hyper` is passed to `ours` and to `theirs`. `half` and `their_half` are the scale_by transforms, which get `hyper`
    without the keys in `only_whole`. `moments` are optax's names of the moments in the state with these
    hyper-parameters.
    """

    name: str
    ours: Callable
    theirs: Callable  # of optax
    hyper: dict[str, Any]
    state: type
    moments: tuple[str, ...]
    half: Callable
    their_half: Callable
    only_whole: tuple[str, ...] = ("learning_rate", "weight_decay")
    mask: str = "mask"  # the name of the argument that says where weights decay
    sums: bool = False  # it sums over a parameter, so the last bits depend on the sharding
    bounded: bool = True  # a huge gradient moves its parameter no further than a small one
    teaches: dict[str, Any] | None = None  # hyper-parameters to learn a small regression in 200 steps


def _lamb_half(**hyper):
    return optax.chain(optax.scale_by_adam(eps=1e-6), optax.add_decayed_weights(**hyper), optax.scale_by_trust_ratio())


def _lars_half(weight_decay, momentum, trust_coefficient):
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient),
        optax.trace(momentum),
    )


ADAM = fse.ScaleByAdam8bitState, ("mu", "nu")
ADAM_HALVES = fse.scale_by_adam8bit, optax.scale_by_adam

OPTIMIZERS = [
    OptimizerCase("adam8bit", fse.adam8bit, optax.adam, {"learning_rate": 0.01}, *ADAM, *ADAM_HALVES),
    OptimizerCase(
        "adamw8bit", fse.adamw8bit, optax.adamw, {"learning_rate": 0.01, "weight_decay": 0.1}, *ADAM, *ADAM_HALVES
    ),
    OptimizerCase(
        "sgd8bit",
        fse.sgd8bit,
        optax.sgd,
        {"learning_rate": 0.01, "momentum": 0.9},
        fse.ScaleBySgd8bitState,
        ("trace",),
        fse.scale_by_sgd8bit,
        lambda momentum: optax.trace(momentum),
        bounded=False,
        teaches={"learning_rate": 0.1},
    ),
    OptimizerCase(
        "rmsprop8bit",
        fse.rmsprop8bit,
        optax.rmsprop,
        {"learning_rate": 0.01, "decay": 0.99},
        fse.ScaleByRmsprop8bitState,
        ("nu",),
        fse.scale_by_rmsprop8bit,
        optax.scale_by_rms,
    ),
    OptimizerCase(
        "adagrad8bit",
        fse.adagrad8bit,
        optax.adagrad,
        {"learning_rate": 0.01, "initial_accumulator_value": 0.01},
        fse.ScaleByAdagrad8bitState,
        ("sum_of_squares",),
        fse.scale_by_adagrad8bit,
        optax.scale_by_rss,
        teaches={"learning_rate": 0.1},
    ),
    OptimizerCase(
        "lion8bit",
        fse.lion8bit,
        optax.lion,
        {"learning_rate": 0.01, "weight_decay": 0.1},
        fse.ScaleByLion8bitState,
        ("mu",),
        fse.scale_by_lion8bit,
        optax.scale_by_lion,
    ),
    OptimizerCase(
        "lamb8bit",
        fse.lamb8bit,
        optax.lamb,
        {"learning_rate": 0.01, "weight_decay": 0.1},
        *ADAM,
        fse.scale_by_lamb8bit,
        _lamb_half,
        only_whole=("learning_rate",),
        sums=True,
    ),
    OptimizerCase(
        "lars8bit",
        fse.lars8bit,
        optax.lars,
        {"learning_rate": 0.1, "weight_decay": 0.01, "momentum": 0.9, "trust_coefficient": 0.1},
        fse.ScaleBySgd8bitState,
        ("trace",),
        fse.scale_by_lars8bit,
        _lars_half,
        only_whole=("learning_rate",),
        mask="weight_decay_mask",
        sums=True,
    ),
    OptimizerCase(
        "ademamix8bit",
        fse.ademamix8bit,
        optax.contrib.ademamix,
        {"learning_rate": 0.01, "weight_decay": 0.1, "alpha": 2.0, "b3": 0.99},
        fse.ScaleByAdemamix8bitState,
        ("m1", "m2", "nu"),
        fse.scale_by_ademamix8bit,
        optax.contrib.scale_by_ademamix,
    ),
]

# --- transforms of optax whose moments `quantize_state` stores in 8 bits ---------------------------------------------


class WrappedCase(NamedTuple):
    """A factory of optax, the names of the fields that hold its moments, and the extra arguments of its update."""

    name: str
    make: Callable[..., optax.GradientTransformation]
    hyper: dict[str, Any]
    moments: str  # separated by spaces
    extra: tuple[str, ...] = ()  # "value", "obj_fn"


def _wrapped(make, moments, *extra, name="", **hyper):
    return WrappedCase(name or make.__name__, make, hyper, moments, extra)


def _mechanized(learning_rate):
    return optax.contrib.mechanize(optax.adam(learning_rate))


def _schedule_free_momentum(learning_rate):
    return optax.contrib.schedule_free(optax.sgd(learning_rate, momentum=0.9), learning_rate)


def _signum(learning_rate):  # optax.signum, which optax has since 0.2.7
    return optax.chain(optax.ema(0.9, debias=False), optax.scale_by_sign(), optax.scale_by_learning_rate(learning_rate))


def _averaged(learning_rate):
    return optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(learning_rate))


WRAPPED = [
    _wrapped(optax.adabelief, "mu nu", learning_rate=0.1),
    _wrapped(optax.adadelta, "e_g e_x", learning_rate=10.0, eps=1e-3),
    _wrapped(optax.adafactor, "ema", name="adafactor_momentum", learning_rate=0.1, momentum=0.9),
    _wrapped(optax.adagrad, "sum_of_squares", learning_rate=1.0),
    _wrapped(optax.adam, "mu nu", learning_rate=0.1),
    _wrapped(optax.adamax, "mu nu", learning_rate=0.1),
    _wrapped(optax.adamaxw, "mu nu", learning_rate=0.1),
    _wrapped(optax.adamw, "mu nu", learning_rate=0.1),
    _wrapped(optax.adan, "m n v", learning_rate=0.1),
    _wrapped(optax.amsgrad, "mu nu nu_max", learning_rate=0.1),
    _wrapped(optax.lamb, "mu nu", learning_rate=0.03),
    _wrapped(optax.lars, "trace", learning_rate=10.0),
    _wrapped(optax.lion, "mu", learning_rate=0.03),
    _wrapped(optax.nadam, "mu nu", name="nadam", learning_rate=0.1),
    _wrapped(optax.nadamw, "mu nu", name="nadamw", learning_rate=0.1),
    _wrapped(optax.novograd, "mu", learning_rate=0.05),
    _wrapped(optax.optimistic_adam_v2, "mu nu", learning_rate=0.05),
    _wrapped(optax.radam, "mu nu", learning_rate=0.1),
    _wrapped(optax.rmsprop, "nu", learning_rate=0.03),
    _wrapped(optax.rmsprop, "nu trace", name="rmsprop_momentum", learning_rate=0.01, momentum=0.9),
    _wrapped(optax.rmsprop, "trace", name="rmsprop_centered_momentum", learning_rate=0.01, centered=True, momentum=0.9),
    _wrapped(optax.sgd, "trace", name="sgd_momentum", learning_rate=5.0, momentum=0.9),
    _wrapped(_signum, "ema", name="signum", learning_rate=0.03),
    _wrapped(optax.sm3, "nu", learning_rate=1.0),
    _wrapped(optax.yogi, "mu nu", learning_rate=0.1),
    _wrapped(_averaged, "ema", name="ema", learning_rate=30.0),
    _wrapped(optax.contrib.acprop, "mu nu", learning_rate=0.05),
    _wrapped(optax.contrib.ademamix, "m1 m2 nu", learning_rate=0.05),
    _wrapped(optax.contrib.adopt, "mu nu", learning_rate=0.05),
    _wrapped(optax.contrib.dadapt_adamw, "exp_avg exp_avg_sq grad_sum", learning_rate=1.0),
    _wrapped(_mechanized, "mu nu", name="mechanize", learning_rate=3.0),
    _wrapped(optax.contrib.momo, "exp_avg", "value", learning_rate=30.0),
    _wrapped(optax.contrib.momo_adam, "exp_avg exp_avg_sq", "value", learning_rate=0.1),
    _wrapped(optax.contrib.muon, "mu nu", learning_rate=0.05),
    _wrapped(optax.contrib.prodigy, "exp_avg exp_avg_sq grad_sum", learning_rate=1.0),
    _wrapped(_schedule_free_momentum, "trace", name="schedule_free_momentum", learning_rate=3.0),
    _wrapped(optax.contrib.schedule_free_adamw, "nu", learning_rate=0.1),
    _wrapped(optax.contrib.simplified_ademamix, "m n", learning_rate=0.002),
    _wrapped(optax.contrib.sophia, "mu nu", "obj_fn", learning_rate=0.1),
]

# Optimizers that have nothing to store in 8 bits, each with the reason.
NOT_WRAPPED = [
    ("adafactor", lambda: optax.adafactor(0.1), "its second moment is factored"),
    ("fromage", lambda: optax.fromage(0.1), "keeps nothing"),
    ("lbfgs", optax.lbfgs, "parameters and updates of the last steps, of which it takes differences"),
    ("noisy_sgd", lambda: optax.noisy_sgd(0.1, key=0), "keeps nothing of the parameters' shape"),
    ("optimistic_gradient_descent", lambda: optax.optimistic_gradient_descent(0.1), "the previous gradient"),
    ("polyak_sgd", optax.polyak_sgd, "keeps nothing"),
    ("rmsprop_centered", lambda: optax.rmsprop(0.1, centered=True), "nu - mu^2 of rounded moments can be negative"),
    ("rprop", lambda: optax.rprop(0.1), "step sizes, each its own, and signs"),
    ("sgd", lambda: optax.sgd(0.1), "keeps nothing"),
    ("sign_sgd", lambda: optax.sign_sgd(0.1), "keeps nothing"),
    ("cocob", optax.contrib.cocob, "parameters are computed from its sums"),
    ("dog", lambda: optax.contrib.dog(1.0), "the first parameters"),
    ("dowg", lambda: optax.contrib.dowg(1.0), "the first parameters"),
    ("galore", lambda: optax.contrib.galore(0.1, rank=8), "moments of projected gradients: wrap its base_optimizer"),
    ("madgrad", lambda: optax.contrib.madgrad(0.1), "parameters are computed from its sums"),
    ("schedule_free_sgd", lambda: optax.contrib.schedule_free_sgd(0.1), "its z holds parameters"),
]
