"""Tests that the state of parameters on another device than the first is made on their device."""

import jax
import jax.numpy as jnp
import optax
import pytest

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import build, parameters, takes

WRAPPERS = {
    "quantize_state": lambda: fse.quantize_state(optax.adamw(1e-3)),
    "quantize_state, bf16": lambda: fse.quantize_state(optax.adamw(1e-3), rules=((".*", "bf16"),)),
    "split_weights": lambda: fse.split_weights(fse.adamw8bit(1e-3)),
    "stochastic_round_updates": lambda: fse.stochastic_round_updates(fse.adamw8bit(1e-3)),
    "row_sparse": lambda: fse.row_sparse(fse.adamw8bit(1e-3)),
    "row_sparse, catch_up": lambda: fse.row_sparse(fse.adamw8bit(1e-3), "catch_up"),
    "percentile_clipping": lambda: fse.chain(fse.percentile_clipping(), fse.adamw8bit(1e-3)),
    "per parameter": lambda: fse.chain(fse.percentile_clipping(per_parameter=True), fse.adamw8bit(1e-3)),
    "MultiSteps": lambda: optax.MultiSteps(fse.adamw8bit(1e-3), 2),
    "with_max_norm": lambda: fse.with_max_norm(fse.adamw8bit(1e-3), 1.0),
}
TRANSFORMS = WRAPPERS | {
    f"{case.name}, {bits}": lambda case=case, bits=bits: build(case, rules=((".*", bits),))
    for case in OPTIMIZERS
    for bits in (8, 32, "bf16", "rowwise")
    if bits != "rowwise" or takes(case, "b2") or takes(case, "decay")
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_state_is_made_on_the_device_of_its_parameters(name):
    try:
        tx = TRANSFORMS[name]()
    except ValueError as error:
        assert "no second moment" in str(error)
        return
    device = jax.devices()[3]
    state = tx.init(jax.device_put(parameters(), device))
    elsewhere = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if x.size > 1 and x.devices() != {device}
    ]
    assert not elsewhere


def test_uncommitted_parameters_have_an_uncommitted_state():
    params = {"kernel": jnp.ones((64, 128))}
    state = fse.adamw8bit(1e-3).init(params)
    assert not any(x.committed for x in jax.tree.leaves(state))
