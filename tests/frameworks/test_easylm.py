"""Tests EasyLM's flow: regular expressions over the paths of a TrainState, where the first match gives the spec.

The flow is that of https://github.com/young-geng/EasyLM, `EasyLM/jax_utils.py` (match_partition_rules) and
`EasyLM/models/llama/llama_train.py`, written again here; names and rules are those of its LLaMA.
"""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as PS

from tests.frameworks.tools import (
    OF_256,
    OPTIMIZERS,
    assert_codes_are_sharded_like_parameters,
    assert_same_numbers,
    batch_of,
    every_optimizer,
    loss_of,
    without_framework,
)
from tests.tools import SMALL

RULES = (
    ("transformer/wte/embedding", PS("mp", "fsdp")),
    ("attention/(wq|wk|wv)/kernel", PS("fsdp", "mp")),
    ("attention_norm/kernel", PS(None)),
    (".*", PS(None)),
)
SIZES = {"wte/embedding": (128, 64), "attention_norm/kernel": (64,), "attention/wq/kernel": (64, 768)}
NORMS = (("norm/kernel", 32),)  # EasyLM calls the scale of a norm `kernel`


def shapes():
    tree = {}
    for path, shape in SIZES.items():
        node = tree
        for key in (parts := f"transformer/{path}".split("/"))[:-1]:
            node = node.setdefault(key, {})
        node[parts[-1]] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"params": tree}


def match(rules, tree):
    def spec(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if x.size == 1:
            return PS()
        return next(spec for pattern, spec in rules if re.search(pattern, name))

    return jax.tree_util.tree_map_with_path(spec, tree)


def flow(tx, rules, steps=3):
    mesh = jax.make_mesh((1, 4, 2), ("dp", "fsdp", "mp"), axis_types=(AxisType.Auto,) * 3)

    def init():
        params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes())
        return TrainState.create(apply_fn=None, params=params, tx=tx)

    def step(state, batch):
        return state.apply_gradients(grads=jax.grad(loss_of)(state.params, batch))

    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), match(rules, jax.eval_shape(init)))
    state = jax.jit(init, out_shardings=where)()
    step = jax.jit(step, in_shardings=(where, None), out_shardings=where, donate_argnums=0)
    for i in range(steps):
        state = step(state, batch_of(shapes(), i))
    assert step._cache_size() <= 1
    return state


@every_optimizer
@pytest.mark.one_in(5)
def test_the_rules_of_easylm_work_unchanged_if_blocks_divide(name):
    tx = OPTIMIZERS[name](state_format=SMALL, rules=NORMS)
    state = flow(tx, RULES)
    assert_codes_are_sharded_like_parameters(state.opt_state, state.params)
    assert_same_numbers((state.params, state.opt_state), without_framework(tx, shapes()))


@every_optimizer
@pytest.mark.one_in(5, start=1)
def test_any_blocks_work_with_a_rule_for_scales_in_front(name):
    tx = OPTIMIZERS[name](state_format=OF_256, rules=NORMS)
    with pytest.raises(ValueError, match=r"divide the shape|divisible by"):
        flow(tx, RULES)
    state = flow(tx, (("absmax", PS()), *RULES))
    assert_codes_are_sharded_like_parameters(state.opt_state, state.params)
    assert_same_numbers((state.params, state.opt_state), without_framework(tx, shapes()))


@pytest.mark.filterwarnings("ignore:An optimizer step with 8-bit moments is lowered")  # in a cond of optax 0.2.7
def test_multi_steps_around_a_chain_works():
    """This is EasyLM's gradient accumulation. The rules match accumulated gradients like the parameters."""
    ours = OPTIMIZERS["adamw8bit"](state_format=SMALL, rules=NORMS)
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1e9), ours), 3).gradient_transformation()
    state = flow(tx, RULES)
    assert_codes_are_sharded_like_parameters(state.opt_state.inner_opt_state, state.params)
    assert state.opt_state.gradient_step == 1
