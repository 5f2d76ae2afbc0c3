"""Tests every optimizer of tests/cases.py inside optax's wrappers, in Flax and with serialization."""

import contextlib
import functools
import itertools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.tools import (
    ALL_FP32,
    SMALL,
    as_pure,
    assert_8bit,
    assert_nearly,
    assert_same_bits,
    build,
    build_theirs,
    core,
    every_kind_of_optimizer,
    every_optimizer,
    first_moment,
    gradients,
    is_codes,
    jitted,
    kinds,
    may_straddle,
    moments,
    parameters,
    run,
    types,
)

every_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
X = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)


# --- wrappers of optax ------------------------------------------------------------------------------------------------


@every_kind_of_optimizer
@pytest.mark.one_in(4)
def test_masked_works_around_the_optimizer(case):
    params, grads = parameters(), gradients()
    tx = optax.masked(build(case), {"kernel": True, "norm": {"scale": False}, "wte": {"embedding": True}})
    state = tx.init(params)
    new, after, updates = jitted(tx)(grads, state, params)
    assert_8bit(case, after)
    assert types(after) == types(state)
    assert isinstance(first_moment(case, after)["norm"]["scale"], optax.MaskedNode)
    assert_same_bits(updates["norm"], grads["norm"])
    _, _, expected = jitted(build(case))(grads, build(case).init(params), params)
    assert_nearly((updates["kernel"], updates["wte"]), (expected["kernel"], expected["wte"]))
    by_function = optax.masked(build(case), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    assert_same_bits(run(by_function, params, 1), (new, after))


@every_kind_of_optimizer
def test_partition_works_around_the_optimizer(case):
    """A rule that matches nothing is accepted, because it can match in the other part of the partition."""
    params, grads = parameters(), gradients()
    ours = build(case, rules=(("wte", 32), ("kernel", 8), ("scale", 32)))
    labels = {"kernel": "8bit", "norm": {"scale": "plain"}, "wte": {"embedding": "8bit"}}
    tx = optax.partition({"8bit": ours, "plain": optax.sgd(0.1)}, labels)
    state = tx.init(params)
    _, after, updates = jitted(tx)(grads, state, params)
    assert_8bit(case, after)
    assert types(after) == types(state)
    assert_same_bits(updates["norm"]["scale"], -0.1 * grads["norm"]["scale"])
    _, _, expected = jitted(build(case))(grads, build(case).init(params), params)
    assert_nearly((updates["kernel"], updates["wte"]), (expected["kernel"], expected["wte"]))


@every_kind_of_optimizer
def test_partition_works_with_two_8bit_optimizers(case):
    params = {"left": parameters(), "right": parameters(seed=1)}
    tx = optax.partition(
        {"left": build(case), "right": build(case, state_format=fse.StateFormat("dynamic", min_size=0))},
        {"left": "left", "right": "right"},
    )
    state = jax.jit(tx.init)(params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert types((updates, after)) == types((params, state))
    left, right = (assert_8bit(case, after.inner_states[side]) for side in ("left", "right"))
    for side, signed_dtype in ((left, jnp.int8), (right, jnp.uint8)):
        (codes,) = [x for x in jax.tree.leaves(first_moment(case, side)) if x.shape == (64, 64)]
        assert codes.dtype == (jnp.uint8 if case.moments[0] in ("nu", "sum_of_squares") else signed_dtype)
    assert left.format.shape != right.format.shape


@every_kind_of_optimizer
def test_wrappers_that_select_between_states_work(case):
    params, grads = parameters(), gradients()
    tx = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), build(case)), 3)
    state = tx.init(params)
    bad = grads | {"kernel": grads["kernel"].at[0, 0].set(jnp.nan)}
    new, after, _ = jitted(tx)(bad, state, params)
    assert_same_bits(new, params)
    assert_same_bits(core(case, after), core(case, state))
    new, after, _ = jitted(tx)(grads, after, params)
    assert_8bit(case, after)
    assert not np.array_equal(new["kernel"], params["kernel"])
    frozen = optax.chain(build(case), optax.keep_params_nonnegative())
    assert_8bit(case, frozen.init(params))


# --- flax.linen -------------------------------------------------------------------------------------------------------


class LinenModel(nn.Module):
    """A dense layer whose parameters carry axis names in the box that `boxed` makes."""

    boxed: object = nn.with_partitioning
    names: tuple = (None, "model")

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        bias = nn.initializers.zeros
        if self.boxed is not None:
            init, bias = self.boxed(init, self.names), self.boxed(bias, self.names[-1:])
        return nn.Dense(96, kernel_init=init, bias_init=bias)(x)


@every_optimizer
@pytest.mark.one_in(5)
def test_a_train_state_trains(case):
    model = LinenModel(boxed=None)
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=build(case))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn({"params": p}, X) - 1.0) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    state = state.replace(step=jnp.int32(0))  # flax starts with a Python 0, whose type differs from that of step 1
    before = types(state)
    losses = []
    for _ in range(4):
        state, loss = step(state)
        losses.append(float(loss))
    assert step._cache_size() <= 1 and types(state) == before
    assert losses == sorted(losses, reverse=True)
    found = core(case, state.opt_state)
    for name in moments(case):
        assert is_codes(getattr(found, name)["Dense_0"]["kernel"])
        assert not is_codes(getattr(found, name)["Dense_0"]["bias"])
    restored = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), flax.serialization.to_bytes(state))
    assert_same_bits(jax.tree.map(jnp.asarray, restored), state)


BOXES = {"partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning}


@every_kind_of_optimizer
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(
    "names", [(None, "model"), ("model", None), ("data", "model"), (("data", "model"), None)], ids=str
)
@pytest.mark.one_in(8)
def test_linen_boxes_give_specs_that_divide(case, box, names):
    """The flow of MaxText: an abstract boxed train state, its specs, and a jitted init with these as out_shardings."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model, tx = LinenModel(boxed=BOXES[box], names=names), build(case)

    def init(key):
        params = model.init(key, X)["params"]
        return params, tx.init(params)

    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(init, jax.random.key(0))
        specs = nn.get_partition_spec(abstract)
        found, spec = core(case, abstract[1]), core(case, specs[1])
        for name in moments(case):
            assert getattr(spec, name) == specs[0]
            for field, leaf in itertools.product((name, f"{name}_absmax"), ("kernel", "bias")):
                box = getattr(found, field)["Dense_0"][leaf]
                assert isinstance(box, meta.AxisMetadata)
                placed = NamedSharding(mesh, getattr(spec, field)["Dense_0"][leaf])
                placed.shard_shape(box.value.shape)  # raises unless it divides
            assert is_codes(getattr(found, name)["Dense_0"]["kernel"].value)
        out = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        boxed, state = jax.jit(init, out_shardings=out)(jax.random.key(0))
        assert kinds((boxed, state)) == kinds(abstract)
        grads = jax.tree.map(jnp.ones_like, boxed)
        updates, after = jax.eval_shape(tx.update, grads, state, boxed)
        assert kinds((updates, after)) == kinds(abstract)


@every_kind_of_optimizer
@every_kind
def test_linen_boxes_of_shapes_and_arrays_are_initialized_under_a_mesh(case, kind):
    """Flax's own `unbox` needs the named sharding, which shapes and arrays from outside the mesh do not have."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    tx = build(case)
    for value in (jax.ShapeDtypeStruct((64, 96), jnp.float32), jnp.ones((64, 96))):
        with jax.set_mesh(mesh):
            state = tx.init({"kernel": meta.Partitioned(value, ("data", "model"))})
        assert_8bit(case, state)


@every_kind_of_optimizer
def test_linen_boxes_do_not_change_the_result(case):
    model = LinenModel()
    boxed = model.init(jax.random.key(0), X)["params"]
    plain = meta.unbox(boxed)
    tx = build(case)
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), boxed)
    outcome = jitted(tx)(grads, tx.init(boxed), boxed)
    assert is_codes(first_moment(case, meta.unbox(outcome[1]))["Dense_0"]["kernel"])
    assert_same_bits(meta.unbox(outcome), jitted(tx)(meta.unbox(grads), tx.init(plain), plain))
    fused = jax.eval_shape(functools.partial(fse.fused_update, tx), grads, tx.init(boxed), boxed)
    assert types(fused) == types(outcome[:2])


# --- flax.nnx ---------------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    """An embedding, a dense layer and a norm; `names` shards the dense kernel."""

    def __init__(self, rngs, names=None, width=64, key="out_sharding"):
        init = nnx.initializers.lecun_normal()
        metadata = {} if names is None else {key: names}
        self.token = nnx.Embed(16, 64, rngs=rngs)
        self.up = nnx.Linear(64, width, kernel_init=init, kernel_metadata=metadata, use_bias=True, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, ids):
        return self.norm(self.up(self.token(ids)))


IDS = np.arange(16)


def nnx_loss(model):
    return jnp.mean((model(IDS) - 1.0) ** 2)


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = nnx.value_and_grad(nnx_loss)(model)
    optimizer.update(model, grads)
    return loss


def assert_nnx_8bit(case, optimizer):
    found = core(case, as_pure(optimizer.opt_state))
    for name in moments(case):
        moment = getattr(found, name)
        assert is_codes(moment["up"]["kernel"])
        assert not is_codes(moment["token"]["embedding"])
        assert not is_codes(moment["norm"]["scale"])
    return found


@every_optimizer
@pytest.mark.one_in(19)
def test_an_nnx_optimizer_trains(case):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, build(case), wrt=nnx.Param)
    before = types(as_pure(optimizer.opt_state))
    losses = [float(nnx_step(model, optimizer)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert_nnx_8bit(case, optimizer)
    assert types(as_pure(optimizer.opt_state)) == before

    other = Model(nnx.Rngs(0))
    theirs = nnx.Optimizer(other, build_theirs(case), wrt=nnx.Param)
    np.testing.assert_allclose(losses, [float(nnx_step(other, theirs)) for _ in range(4)], rtol=1e-2)


@every_kind_of_optimizer
def test_nnx_and_plain_dicts_take_the_same_step(case):
    tx, model = build(case), Model(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = nnx.grad(nnx_loss)(model)
    plain_grads = nnx.to_pure_dict(grads)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, grads)
    assert_nnx_8bit(case, optimizer)
    updates, state = tx.update(plain_grads, tx.init(params), params)
    assert_same_bits(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optax.apply_updates(params, updates))
    ours = jax.tree.leaves(as_pure(optimizer.opt_state))
    assert all(np.array_equal(a, b) for a, b in zip(ours, jax.tree.leaves(state), strict=True))


NNX_SHARDINGS = [
    ((None, "b"), 64),
    (("a", "b"), 256),
    ((("a", "b"), None), 96),
    (("b", "a"), 64),
    ((None, ("a", "b")), 96),
]


@every_kind_of_optimizer
@pytest.mark.parametrize(
    ("kind", "names", "width"),
    [
        (AxisType.Auto, *NNX_SHARDINGS[0]),
        (AxisType.Explicit, *NNX_SHARDINGS[1]),
        (AxisType.Auto, *NNX_SHARDINGS[2]),
        *(pytest.param(AxisType.Auto, *sharding, marks=pytest.mark.slow) for sharding in NNX_SHARDINGS[1::2]),
        *(pytest.param(AxisType.Explicit, *sharding, marks=pytest.mark.slow) for sharding in NNX_SHARDINGS[2:]),
    ],
)
@pytest.mark.recent_compiler  # that of JAX 0.8 shards some scales otherwise after a step
@pytest.mark.one_in(13)
@may_straddle
def test_an_nnx_optimizer_keeps_its_shardings_on_a_mesh(case, kind, names, width):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0), names, width)
        kernel = model.up.kernel.get_value()
        assert kernel.sharding.spec == P(*names)
        optimizer = nnx.Optimizer(model, build(case), wrt=nnx.Param)
        found = assert_nnx_8bit(case, optimizer)
        for name in moments(case):
            variable = getattr(core(case, optimizer.opt_state), name)["up"]["kernel"]
            assert variable.get_metadata()["out_sharding"] == names
            scales = getattr(core(case, optimizer.opt_state), f"{name}_absmax")["up"]["kernel"]
            spec = scales.get_metadata()["out_sharding"]
            NamedSharding(mesh, P(*spec)).shard_shape(scales.get_value().shape)  # raises unless it divides
            assert getattr(found, name)["up"]["kernel"].sharding.is_equivalent_to(kernel.sharding, 2)
        before = [x.sharding for x in moment_arrays(case, optimizer)]
        if kind == AxisType.Auto:
            for _ in range(2):
                nnx_step(model, optimizer)
            after = [x.sharding for x in moment_arrays(case, optimizer)]
            ndims = [x.ndim for x in moment_arrays(case, optimizer)]
            assert all(a.is_equivalent_to(b, n) for a, b, n in zip(after, before, ndims))
        specs = core(case, nnx.get_partition_spec(optimizer.opt_state))
        for name in moments(case):
            assert getattr(specs, name)["up"]["kernel"].get_value() == P(*names)


class ShardedModel(nnx.Module):
    """Batches are sharded along "a", features along "b". The table of the stable embedding also gives the logits."""

    def __init__(self, rngs):
        cut = {"out_sharding": (None, "b")}
        self.token = fse.nnx.StableEmbed(16, 64, embedding_metadata=cut, rngs=rngs)
        self.up = nnx.Linear(64, 256, kernel_metadata=cut, bias_metadata={"out_sharding": ("b",)}, rngs=rngs)
        self.down = nnx.Linear(256, 64, kernel_metadata=cut, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, ids):
        rows = P("a", None)
        hidden = nnx.gelu(self.up(self.token(ids, out_sharding=rows), out_sharding=P("a", "b")))
        out = self.norm(self.down(jax.sharding.reshard(hidden, rows), out_sharding=rows))
        return self.token.attend(out, out_sharding=rows)


@every_kind_of_optimizer
@pytest.mark.one_in(4)
def test_a_sharded_model_trains_under_an_explicit_mesh_as_with_optax(case):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)

    @nnx.jit
    def step(model, optimizer, ids):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(ids) - 1.0) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = {}
    with jax.set_mesh(mesh):
        ids = jax.device_put(IDS, P("a"))
        for name, tx in (("8", build(case)), ("32", build(case, rules=ALL_FP32)), ("optax", build_theirs(case))):
            model = ShardedModel(nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            before = types((nnx.state(model), nnx.state(optimizer)))
            losses[name] = [float(step(model, optimizer, ids)) for _ in range(4)]
            assert types((nnx.state(model), nnx.state(optimizer))) == before
            if name == "8":
                found = core(case, as_pure(optimizer.opt_state))
                for moment in (getattr(found, name) for name in moments(case)):
                    assert is_codes(moment["up"]["kernel"]) and is_codes(moment["down"]["kernel"])
                    assert not is_codes(moment["token"]["embedding"])
    assert len(set(losses["optax"])) == 4  # RMSprop's first steps are too long for this model, in optax too
    np.testing.assert_allclose(losses["32"], losses["optax"], rtol=1e-6 if case.sums else 0)
    np.testing.assert_allclose(losses["8"], losses["optax"], rtol=1e-2)


def moment_arrays(case, optimizer):
    found = core(case, as_pure(optimizer.opt_state))
    return [getattr(found, f)["up"]["kernel"] for name in moments(case) for f in (name, f"{name}_absmax")]


@every_kind_of_optimizer
@pytest.mark.parametrize("wrap", ["masked", "partition", "multi_steps", "inject"])
@pytest.mark.one_in(14)
def test_an_nnx_optimizer_trains_with_optax_wrappers(case, wrap):
    tx = {
        "masked": lambda: optax.masked(build(case), lambda tree: jax.tree.map(lambda x: jnp.ndim(x) > 0, tree)),
        "partition": lambda: optax.partition(
            {"ours": build(case), "theirs": optax.sgd(0.1)},
            lambda tree: jax.tree_util.tree_map_with_path(
                lambda path, _: "theirs" if "norm" in jax.tree_util.keystr(path) else "ours", tree
            ),
        ),
        "multi_steps": lambda: optax.MultiSteps(build(case), 2),
        "inject": lambda: optax.inject_hyperparams(case.ours)(**case.hyper, state_format=SMALL),
    }[wrap]()
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(nnx_step(model, optimizer)) for _ in range(4)]
    found = core(case, as_pure(optimizer.opt_state))
    for name in moments(case):
        assert is_codes(getattr(found, name)["up"]["kernel"])
    assert losses[-1] < losses[0]


@every_kind_of_optimizer
@pytest.mark.parametrize("names", [None, (None, "b")], ids=["without a mesh", "under a mesh"])
def test_eval_shape_of_an_nnx_optimizer_gives_the_real_shapes_and_specs(case, names):
    """Under the mesh, blocks of 32 are along the first axis, and the second axis is sharded over four devices."""

    def build_both():
        model = Model(nnx.Rngs(0), names, 96)
        return model, nnx.Optimizer(model, build(case), wrt=nnx.Param)

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with contextlib.nullcontext() if names is None else jax.set_mesh(mesh):
        _, abstract = nnx.eval_shape(build_both)
        _, real = build_both()
    assert_nnx_8bit(case, abstract)
    assert kinds(as_pure(abstract.opt_state)) == kinds(as_pure(real.opt_state))
    for specs in (nnx.get_partition_spec(optimizer.opt_state) for optimizer in (abstract, real)):
        for name in moments(case):
            spec = getattr(core(case, specs), name)["up"]["kernel"].get_value()
            assert spec == (P(*names) if names else P())


# --- serialization ----------------------------------------------------------------------------------------------------


@every_kind_of_optimizer
def test_flax_serialization_restores_every_bit(case):
    tx = build(case)
    params, state = run(tx, parameters(), 2)
    assert_8bit(case, state)
    template = jax.tree.map(jnp.zeros_like, state)
    restored = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    restored = jax.tree.map(jnp.asarray, restored)
    assert_same_bits(restored, state)
    assert_same_bits(run(tx, params, 1, state=restored), run(tx, params, 1, state=state))
