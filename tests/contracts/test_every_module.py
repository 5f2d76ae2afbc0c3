"""Tests every module of tests/cases.py in Linen and in NNX: same numbers, transformations, sharding."""

import copy
import functools
import pickle

import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.nnx import bridge
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_stable_embed import linen, nnx
from tests.cases import MODULES

every_module = pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)
IDS = np.array([[1, 0, 3, 3], [7, -1, 3, 2]], np.int32)


def linen_module(case):
    return getattr(linen, case.module)(case.num_embeddings, case.features, **case.options)


def nnx_module(case):
    rngs = flax.nnx.Rngs(0)
    return getattr(nnx, case.module)(case.num_embeddings, case.features, **case.options, rngs=rngs)


def parameters(case):
    """Random parameters: scale is not one, and neither bias nor padding row is zero."""
    rng = np.random.default_rng(0)
    dtypes = {"embedding": case.options.get("param_dtype", jnp.float32)}
    params = {"embedding": rng.normal(size=(case.num_embeddings, case.features))}
    if case.module == "StableEmbed":
        params["norm"] = {"scale": rng.normal(size=case.features), "bias": rng.normal(size=case.features)}
        dtypes["norm"] = {"scale": jnp.float32, "bias": jnp.float32}
    return jax.tree.map(jnp.asarray, params, dtypes)


def linen_forward(case):
    module = linen_module(case)
    return lambda params, ids: module.apply({"params": params}, ids)


def nnx_forward(case):
    graph, state = flax.nnx.split(nnx_module(case))

    def forward(params, ids):
        flax.nnx.replace_by_pure_dict(state, params)
        return flax.nnx.merge(graph, state)(ids)

    return forward


def params_into(module, params):
    state = flax.nnx.state(module)
    flax.nnx.replace_by_pure_dict(state, params)
    flax.nnx.update(module, state)
    return module


def loss(y):
    """A sum with a weight per position, so that rows get different cotangents."""
    return jnp.sum(y.astype(jnp.float32) * (1 + jnp.arange(y.size).reshape(y.shape) % 7))


def gradient(forward, params):
    return jax.jit(jax.grad(lambda params: loss(forward(params, IDS))))(params)


def output_and_gradient(forward, params, ids=IDS):
    def output_twice(params):
        y = forward(params, ids)
        return loss(y), y

    gradient, y = jax.jit(jax.grad(output_twice, has_aux=True))(params)
    return y, gradient


@functools.cache
def reference(name):
    case = next(case for case in MODULES if case.name == name)
    return output_and_gradient(linen_forward(case), parameters(case))


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(ours, theirs):
    """Equal within four roundings of the largest element, because sums may run in another order."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        eps = float(jnp.finfo(a.dtype).eps)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * eps * np.abs(b).max())


@every_module
def test_both_apis_create_the_same_parameters(case):
    def describe(params):
        return jax.tree.map(lambda p: (p.shape, p.dtype), params)

    expected = describe(parameters(case))
    assert describe(linen_module(case).init(jax.random.key(0), IDS)["params"]) == expected
    assert describe(flax.nnx.to_pure_dict(flax.nnx.state(nnx_module(case)))) == expected


@every_module
@pytest.mark.one_in(4)
def test_linen_and_nnx_give_the_same_bits(case):
    params = parameters(case)
    in_linen = output_and_gradient(linen_forward(case), params)
    assert_same_bits(in_linen, output_and_gradient(nnx_forward(case), params))
    query = jnp.ones((2, case.features), case.options.get("param_dtype", jnp.float32))
    tied = params_into(nnx_module(case), params)
    assert_same_bits(linen_module(case).apply({"params": params}, query, method="attend"), tied.attend(query))


@every_module
def test_dtypes_are_the_documented_ones(case):
    params = parameters(case)
    y, grads = reference(case.name)
    assert y.dtype == case.options.get("dtype", params["embedding"].dtype)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda p: p.dtype, params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@every_module
def test_jit_does_not_change_the_output(case):
    params = parameters(case)
    forward = linen_forward(case)
    assert_close(forward(params, IDS), reference(case.name)[0])


@every_module
def test_forward_and_reverse_mode_agree(case):
    params = parameters(case)
    tangents = jax.tree.map(jnp.ones_like, params)
    forward = linen_forward(case)

    @jax.jit
    def both_modes(params, tangents):
        _, along = jax.jvp(lambda params: loss(forward(params, IDS)), (params,), (tangents,))
        products = jax.tree.map(jnp.vdot, jax.grad(lambda params: loss(forward(params, IDS)))(params), tangents)
        return along, sum(p.astype(jnp.float32) for p in jax.tree.leaves(products))

    along, against = both_modes(params, tangents)
    widths = {jnp.dtype(case.options.get(name, jnp.float32)) for name in ("dtype", "param_dtype")}
    np.testing.assert_allclose(along, against, rtol=4 * max(float(jnp.finfo(width).eps) for width in widths))


@every_module
@pytest.mark.one_in(4, start=1)
def test_vmap_works_over_ids_and_over_tables(case):
    params = parameters(case)
    forward = linen_forward(case)
    assert_close(jax.vmap(forward, (None, 0))(params, IDS), reference(case.name)[0])
    two = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    twice = jax.jit(jax.vmap(jax.grad(lambda p, ids: loss(forward(p, ids))), (0, None)))(two, IDS)
    assert_close(jax.tree.map(lambda g: g[0], twice), reference(case.name)[1])


@every_module
@pytest.mark.one_in(4, start=1)
def test_remat_does_not_change_the_gradient(case):
    params = parameters(case)
    forward = linen_forward(case)
    _, expected = reference(case.name)
    assert_close(gradient(jax.checkpoint(forward), params), expected)
    lifted = nn.remat(getattr(linen, case.module))(case.num_embeddings, case.features, **case.options)
    assert_close(gradient(lambda params, ids: lifted.apply({"params": params}, ids), params), expected)

    module = params_into(nnx_module(case), params)
    grads = flax.nnx.jit(flax.nnx.grad(lambda m: loss(flax.nnx.remat(lambda m: m(IDS))(m))))(module)
    assert_close(flax.nnx.to_pure_dict(grads), expected)


@every_module
def test_scan_over_ids_equals_one_call(case):
    params = parameters(case)
    forward = linen_forward(case)
    scanned = jax.jit(lambda params: jax.lax.scan(lambda c, ids: (c, forward(params, ids)), 0, IDS)[1])(params)
    assert_close(scanned, reference(case.name)[0])


@every_module
@pytest.mark.one_in(7)
def test_lifted_transforms_stack_modules(case):
    kind = getattr(linen, case.module)
    stacked = nn.vmap(kind, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
    module = stacked(case.num_embeddings, case.features, **case.options)
    variables = module.init(jax.random.key(0), IDS)
    assert variables["params"]["embedding"].shape == (3, case.num_embeddings, case.features)
    assert module.apply(variables, IDS).shape == (3, *IDS.shape, case.features)

    @flax.nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return getattr(nnx, case.module)(case.num_embeddings, case.features, **case.options, rngs=rngs)

    modules = build(flax.nnx.Rngs(0).split(3))
    outputs = flax.nnx.vmap(lambda m: m(IDS))(modules)
    assert outputs.shape == (3, *IDS.shape, case.features)
    _, last = flax.nnx.scan(lambda c, m: (c, m(IDS)), in_axes=(flax.nnx.Carry, 0))(0, modules)
    assert_close(last, outputs)


@every_module
def test_nnx_modules_can_be_split_abstracted_copied_and_pickled(case):
    module = params_into(nnx_module(case), parameters(case))
    expected = module(IDS)
    again = (
        flax.nnx.merge(*flax.nnx.split(module)),
        flax.nnx.clone(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
    )
    for other in again:
        assert_same_bits(other(IDS), expected)
    abstract = flax.nnx.eval_shape(lambda: nnx_module(case))
    assert abstract.embedding.shape == (case.num_embeddings, case.features)
    assert flax.nnx.graphdef(nnx_module(case)) == flax.nnx.graphdef(module), "two builds would not share a jit cache"
    assert flax.nnx.jit(lambda m: m(IDS))(module).dtype == expected.dtype


@every_module
def test_linen_modules_can_be_cloned_copied_and_hashed(case):
    module = linen_module(case)
    assert module.clone() == module == copy.deepcopy(module)
    assert hash(module.clone()) == hash(module)
    assert module.clone(name="other").name == "other"


@every_module
def test_an_nnx_module_bridged_to_linen_has_the_linen_parameters(case):
    kind = getattr(nnx, case.module)
    module = bridge.to_linen(kind, case.num_embeddings, case.features, **case.options)
    variables = module.init(jax.random.key(0), IDS)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, parameters(case))
    assert module.apply(variables, IDS).shape == (*IDS.shape, case.features)


@every_module
def test_optimizers_of_both_apis_take_the_same_step(case):
    params, tx = parameters(case), optax.sgd(0.125)
    forward = linen_forward(case)
    state = TrainState.create(apply_fn=forward, params=params, tx=tx)
    state = state.apply_gradients(grads=reference(case.name)[1])

    module = params_into(nnx_module(case), params)
    optimizer = flax.nnx.Optimizer(module, tx, wrt=flax.nnx.Param)

    @flax.nnx.jit
    def step(module, optimizer):
        optimizer.update(module, flax.nnx.grad(lambda m: loss(m(IDS)))(module))

    step(module, optimizer)
    assert_close(flax.nnx.to_pure_dict(flax.nnx.state(module)), state.params)
    padding_idx = linen_module(case).padding_idx
    if padding_idx is not None:
        assert_same_bits(module.embedding[padding_idx], params["embedding"][padding_idx])


SHARDINGS = [P("a", "b"), P("a", None), P(None, "b"), P(("a", "b"), None), P("b", "a")]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("case", "spec"),
    [
        pytest.param(case, spec, id=f"{case.name}-{spec}")
        for case in MODULES
        for spec in (SHARDINGS if case.name.endswith("everything") else SHARDINGS[:1])
    ],
)
@pytest.mark.one_in(7)
def test_a_sharded_table_gives_the_same_output_and_gradient(case, kind, spec):
    params = parameters(case)
    expected = reference(case.name)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, jax.tree.map(lambda p: P(), params) | {"embedding": spec})
        ids = jax.device_put(IDS, P("a", None))
        y, grads = output_and_gradient(linen_forward(case), sharded, ids)
        assert_close((y, grads), expected)
        if kind == AxisType.Explicit:
            features = None if spec[1] == "a" else spec[1]  # the ids are sharded over "a" already
            assert jax.typeof(y).sharding.spec == P("a", None, features)
            assert jax.typeof(grads["embedding"]).sharding.spec == spec
