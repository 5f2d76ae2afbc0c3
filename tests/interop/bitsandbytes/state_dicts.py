"""Helpers for tests with the frozen state dicts of bitsandbytes."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from flax_stable_embed.interop.bitsandbytes.optimizer_state import NESTED
from tests.golden.make_optimizers import FROZEN_STATE_DICTS, SAVED, STATE_DICTS, WEIGHT, state_dict
from tests.golden.test_optimizers_formulas import code_values, decode
from tests.interop.bitsandbytes.tools import BLOCKS, clips_as_on_cpu

AS_SAVED = fse.StateFormat("dynamic", "nearest", block_size=256, block_axis=-1, min_size=256)
ADAM = next(case for case in STATE_DICTS if case.name == "adam8bit")
GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def frozen():
    with np.load(FROZEN_STATE_DICTS) as file:
        return dict(file)


def arrays_of(case, frozen):
    return {name.removeprefix(f"{case.name}/"): x for name, x in frozen.items() if name.startswith(f"{case.name}/")}


def saved_of(case, frozen):
    """The frozen state dict, and its two parameters after the same steps."""
    arrays = arrays_of(case, frozen)
    params = {name: jnp.asarray(arrays[f"{SAVED}/{name}"]) for name in ("weight", "bias")}
    return state_dict(arrays["structure"], arrays), params


def flattened(saved):
    """The state dict of a model whose weight is a vector. Its blocks are then the same as ours."""
    saved = copy.deepcopy(saved)
    tensors = saved["state"][0][NESTED]
    for name in ("state1", "state2"):
        if name in tensors:
            x = tensors[name]
            tensors[name] = x.reshape(-1) if x.shape == WEIGHT else x.reshape(2, -1)
    return saved


def as_before_050(saved):
    """The state dict with tensors next to the step, as versions before 0.50 have it."""
    states = {key: {"step": state["step"], **state[NESTED]} for key, state in saved["state"].items()}
    return {"state": states, "param_groups": saved["param_groups"]}


def their_values(tensors, i):
    """A moment of a state dict, in float64."""
    if f"absmax{i}" not in tensors:
        return tensors[f"state{i}"]
    return decode(tensors[f"state{i}"], tensors[f"absmax{i}"], tensors[f"qmap{i}"])


def assert_same(a, b):
    """The same tree, the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def is_8bit(case):
    return "8bit" in case.optimizer


def ours_as_saved(case):
    """Our optimizer with the same parameters in 8 bits as in the state dict."""
    precision = {"state_format": AS_SAVED} if is_8bit(case) else {"rules": ((".*", 32),)}
    return clips_as_on_cpu(case, **precision)


def one_vector(n=1024, **changes):
    """A state dict of Lion with one vector: codes 0..255 repeated, scales 1, 2, ..."""
    tensors = {
        "state1": (np.arange(n) % 256).astype(np.uint8),
        "absmax1": 1 + np.arange(-(-n // 256), dtype=np.float32),
        "qmap1": code_values(True),
    }
    return {"state": {0: {"step": 4, **tensors, **changes}}, "param_groups": [{"params": [0]}]}


def load_vector(saved, n=1024):
    tx = bitsandbytes.lion8bit(state_format=BLOCKS)
    state, report = bitsandbytes.load_optimizer_state(saved, tx, {"kernel": jnp.zeros(n)}, order=["kernel"])
    return state[0], report.rows[0]
