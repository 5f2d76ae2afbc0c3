"""Helpers for tests of our optimizers against bitsandbytes' own: names, options and fields of states."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes as ours
from tests.golden.make_optimizers import BLOCK

BLOCKS = fse.StateFormat("dynamic", "nearest", block_size=BLOCK, block_axis=-1, min_size=0)
ALL_FP32 = ((".*", 32),)
PER_STEP = 2e-5  # in learning rates


class Twin(NamedTuple):
    """Our optimizer for one of bitsandbytes, and the fields of our state that are state1 and state2 there."""

    factory: object
    state1: tuple[str, ...]
    state2: str | None = None


TWINS = {
    "Adam": Twin(ours.adam8bit, ("mu",), "nu"),
    "AdamW": Twin(ours.adamw8bit, ("mu",), "nu"),
    "LAMB": Twin(ours.lamb8bit, ("mu",), "nu"),
    "AdEMAMix": Twin(ours.ademamix8bit, ("m1", "m2"), "nu"),
    "SGD": Twin(ours.sgd8bit, ("trace",)),
    "LARS": Twin(ours.lars8bit, ("trace",)),
    "RMSprop": Twin(ours.rmsprop8bit, ("nu",)),
    "Adagrad": Twin(ours.adagrad8bit, ("sum_of_squares",)),
    "Lion": Twin(ours.lion8bit, ("mu",)),
}


def normal(seed, shape, scale, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def family(case):
    """The name of an optimizer without its number of bits."""
    return case.optimizer.removesuffix("8bit").removesuffix("32bit")


def twin(case):
    return TWINS[family(case)]


def our_options(case):
    """The options of a case under our names."""
    names = {"lr": "learning_rate"} | ({"alpha": "decay"} if family(case) == "RMSprop" else {})
    options = {names.get(name, name): value for name, value in case.options.items() if name != "optim_bits"}
    return options | dict(zip(("b1", "b2", "b3"), options.pop("betas", ())))


def our_optimizer(case, **options):
    """Our optimizer for a case of tests/golden/make_optimizers.py."""
    return twin(case).factory(**our_options(case), **options)


def clips_as_on_cpu(case, **options):
    """Our optimizer, but LAMB clips as the CPU build does, by the norm of the step before bias corrections."""
    if family(case) != "LAMB":
        return our_optimizer(case, **options)
    hyper = our_options(case)
    max_unorm, b1, b2 = hyper.pop("max_unorm", 1.0), hyper.get("b1", 0.9), hyper.get("b2", 0.999)

    def limit(count):
        t = count + 1
        return max_unorm * jnp.sqrt(1 - b2**t) / (1 - b1**t)

    static = ("learning_rate", "b1", "b2", "eps", "weight_decay")
    return optax.inject_hyperparams(ours.lamb8bit, static_args=static)(**hyper, max_unorm=limit, **options)


def assert_parameters(case, found, expected, steps):
    """Parameters are equal within `PER_STEP` learning rates per step, however long the steps are, and one rounding."""
    rounding = np.spacing(np.maximum(np.abs(expected), np.abs(found)))
    assert (np.abs(found - expected) <= PER_STEP * case.options["lr"] * steps + rounding).all()


def their_bytes(codes):
    """Returns signed codes of ours as bitsandbytes writes them, where zero is 127. Floats stay as they are."""
    return codes + np.uint8(127) if codes.dtype == np.uint8 else codes


def our_bytes(codes):
    """Undoes `their_bytes`."""
    return codes - np.uint8(127) if codes.dtype == np.uint8 else codes


def our_fields(case, state, path="kernel"):
    """Returns the arrays of one parameter in our state, under bitsandbytes' names and with its bytes."""
    found = {}
    for i, names in ((1, twin(case).state1), (2, (twin(case).state2,))):
        for kind, suffix in (("state", ""), ("absmax", "_absmax")):
            arrays = [np.asarray(getattr(state[0], f"{name}{suffix}")[path]) for name in names if name]
            if arrays:
                found[f"{kind}{i}"] = arrays[0] if len(arrays) == 1 else np.stack(arrays)
    return found | {"state1": their_bytes(found["state1"])}


def with_fields(case, state, fields, step, path="kernel"):
    """Returns our state after `step` steps with new arrays of one parameter, given as `our_fields` returns them."""
    fields = fields | {"state1": our_bytes(np.asarray(fields["state1"]))} if "state1" in fields else fields
    changes = {name: jnp.asarray(step, jnp.int32) for name in state[0]._fields if name.startswith("count")}
    for i, names in ((1, twin(case).state1), (2, (twin(case).state2,))):
        for kind, suffix in (("state", ""), ("absmax", "_absmax")):
            for j, name in enumerate(names):
                if name and f"{kind}{i}" in fields:
                    array = fields[f"{kind}{i}"][j] if len(names) == 2 else fields[f"{kind}{i}"]
                    tree = getattr(state[0], f"{name}{suffix}")
                    changes[f"{name}{suffix}"] = tree | {path: jnp.asarray(array)}
    return (state[0]._replace(**changes), *state[1:])


def fused(tx):
    """A compiled step that returns parameters and state."""
    return jax.jit(lambda grads, state, params: fse.fused_update(tx, grads, state, params))


def ulps(a, b):
    """How many float32 numbers apart two arrays of the same signs are."""
    return np.abs(np.asarray(a).view(np.int32).astype(np.int64) - np.asarray(b).view(np.int32))


@pytest.fixture
def live():
    """Skips a test if torch and bitsandbytes are not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their warnings at import are not ours
        for name in ("torch", "bitsandbytes"):
            pytest.importorskip(name, reason="torch and bitsandbytes are not installed (dependency group `parity`)")
        yield
