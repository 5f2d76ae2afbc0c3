"""Tests EasyDeL's flow: regular expressions shard an abstract NNX state; axes that do not divide are dropped.

The flow is that of https://github.com/erfanzar/EasyDeL, `easydel/infra/base_state.py` (EasyDeLState.init_tx,
_sanitize_partition_specs_for_shape_tree, apply_gradients), written again here.
"""

import functools
import re

import jax
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.frameworks.tools import (
    assert_codes_are_sharded_like_parameters,
    assert_same_numbers,
    batch_of,
    build,
    every_format,
    every_optimizer,
    loss_of,
    without_framework,
)

RULES = (("embed_tokens/embedding", P("tp", "fsdp")), ("up_proj/kernel", P("fsdp", "tp")), (".*", P()))


class Model(nnx.Module):
    def __init__(self, rngs):
        ones = nnx.initializers.ones
        self.embed_tokens = fse.nnx.Embed(128, 64, embedding_init=ones, rngs=rngs)
        self.up_proj = nnx.Linear(64, 768, kernel_init=ones, bias_init=ones, rngs=rngs)


def shardings(mesh, tree):
    """The sharding by the first rule that matches, without axes that do not divide, and the number of dropped axes."""
    dropped = []

    def place(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        kept = [axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in zip(spec, x.shape)]
        dropped.extend(axis for axis, keep in zip(spec, kept) if axis != keep)
        return NamedSharding(mesh, P(*kept))

    return jax.tree_util.tree_map_with_path(place, tree), len(dropped)


@every_optimizer
@every_format
@pytest.mark.one_in(7, start=1)
def test_codes_are_sharded_like_parameters(name, state_format):
    tx, mesh = build(name, state_format), jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    graph = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    params = jax.device_put(graph, shardings(mesh, graph)[0])
    where, dropped = shardings(mesh, jax.eval_shape(tx.init, params))
    assert dropped  # at least those of the placeholders of an embedding with fp32 moments
    state = jax.jit(tx.init, out_shardings=where)(params)

    @functools.partial(jax.jit, out_shardings=(shardings(mesh, graph)[0], where), donate_argnums=(0, 1))
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    shapes = nnx.to_pure_dict(graph)
    for i in range(3):
        params, state = step(params, state, batch_of(shapes, i))
    assert step._cache_size() <= 1
    assert_codes_are_sharded_like_parameters(state, params)
    assert_same_numbers((params, state), without_framework(tx, shapes))
