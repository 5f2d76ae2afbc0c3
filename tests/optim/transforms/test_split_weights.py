"""Tests that split weights train like float32 ones: bit for bit with 32 bits, on average with 24, on every path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed.ops.split_weights import join_weight
from tests.tools import SMALL, assert_same_bits

INNER = {
    "adamw8bit": lambda: fse.adamw8bit(1e-3, weight_decay=0.1, state_format=SMALL),
    "chain": lambda: fse.chain(
        optax.add_decayed_weights(0.1), optax.clip_by_global_norm(0.5), fse.adam8bit(1e-3, state_format=SMALL)
    ),
    "lamb8bit": lambda: fse.lamb8bit(1e-3, state_format=SMALL),
    "lion8bit": lambda: fse.lion8bit(1e-3, state_format=SMALL),
    "rules": lambda: fse.adamw8bit(1e-3, rules=(("kernel", "bf16"), ("up", "rowwise")), state_format=SMALL),
    "quantize_state": lambda: fse.quantize_state(optax.adamw(1e-3), state_format=SMALL),
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.sgd": lambda: optax.sgd(1e-2, momentum=0.9),
}
every_inner = pytest.mark.parametrize("inner", INNER)
every_bits = pytest.mark.parametrize("bits", [24, 32])


@functools.cache
def build(inner, bits):
    return fse.split_weights(INNER[inner](), bits)


def masters(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.02, jnp.float32)

    return {
        "block": {"kernel": normal(64, 256), "up": normal(128, 64)},
        "norm": {"scale": jnp.ones(64)},
        "wte": {"embedding": normal(128, 64)},
    }


def gradients(params, step, dtype=jnp.float32):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype).astype(dtype), params)


@functools.cache
def updated(tx):
    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def fused(tx):
    return jax.jit(lambda *args: fse.fused_update(tx, *args))


def in_float32(tx):
    return fused(tx) if hasattr(tx, "fused_update") else updated(tx)


# --- Training ---------------------------------------------------------------------------------------------------------


@every_inner
@pytest.mark.one_in(3)
def test_training_with_32_bits_is_that_of_float32_bit_for_bit(inner):
    tx, alone = build(inner, 32), INNER[inner]()
    want, own = masters(), alone.init(masters())
    params, state = fse.from_master_weights(tx, masters())
    for i in range(200 if inner == "adamw8bit" else 20):
        grads = gradients(want, i)
        want, own = in_float32(alone)(grads, own, want)
        params, state = fused(tx)(grads, state, params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    assert_same_bits(fse.master_weights(tx, params, state), want)
    assert_same_bits(state.inner_state, own)


@every_inner
@every_bits
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.one_in(5)
def test_update_and_apply_updates_have_the_bits_of_fused_update(inner, bits, dtype):
    tx = build(inner, bits)
    a = b = fse.from_master_weights(tx, masters())
    c = a
    for i in range(3):
        grads = gradients(a[0], i, dtype)
        a, b = updated(tx)(grads, a[1], a[0]), fused(tx)(grads, b[1], b[0])
        c = updated(fse.in_place(tx))(grads, c[1], c[0])
    assert_same_bits(a, b)
    assert_same_bits(c, b)


@every_bits
def test_an_update_lands_on_the_new_parameter_when_weights_cross_zero(bits):
    """Of weights and updates of very different magnitudes, on all paths the pair is the split of the same weight."""
    tx = fse.split_weights(optax.sgd(1.0), bits)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 512)) * 10.0 ** rng.integers(-20, 5, (64, 512))
    params, state = fse.from_master_weights(tx, {"kernel": jnp.asarray(weights, jnp.float32)})
    for i in range(4):
        before = fse.master_weights(tx, params, state)["kernel"]
        size = 10.0 ** rng.integers(-20, 5, (64, 512))
        near = rng.integers(0, 2, (64, 512)) == 1  # the update nearly cancels the weight
        grads = {
            "kernel": jnp.where(
                near, before * (1 + rng.normal(size=near.shape) * 1e-3), rng.normal(size=near.shape) * size
            )
        }
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        want = fused(tx)(grads, state, params)
        params, state = updated(tx)(grads, state, params)
        assert_same_bits((params, state), want), i
        after, exact = fse.master_weights(tx, params, state)["kernel"], before - grads["kernel"]
        np.testing.assert_allclose(after, exact, rtol=2.0**-15 if bits == 24 else 2.0**-23)


@every_bits
def test_a_gradient_of_zero_changes_nothing(bits):
    tx = fse.split_weights(fse.sgd8bit(1.0, state_format=SMALL), bits)
    params, state = fse.from_master_weights(tx, masters())
    zeros = jax.tree.map(jnp.zeros_like, masters())
    for step in (fused(tx), updated(tx)):
        new, after = step(zeros, state, params)
        assert_same_bits((new, after.remainder), (params, state.remainder))
    updates, _ = tx.update(zeros, state, params)
    assert all((np.signbit(u) & (np.asarray(u) == 0)).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(("rate", "center", "nearest"), [(1e-6, 0.0, 0.95), (1e-5, 1.0, 0.5)])
def test_updates_smaller_than_the_last_bit_are_kept_on_average(rate, center, nearest):
    """Share of the movement that is kept after 1000 updates in one direction. Plain bfloat16 keeps none."""
    start = jnp.asarray(np.random.default_rng(0).normal(center, 0.02, (64, 256)), jnp.float32)
    tx = fse.split_weights(optax.sgd(rate))
    params, state = fse.from_master_weights(tx, {"kernel": start})
    first = fse.master_weights(tx, params, state)["kernel"]
    grads = {"kernel": jnp.ones((64, 256))}
    run = jax.jit(lambda both: jax.lax.fori_loop(0, 1000, lambda _, x: fse.fused_update(tx, grads, x[1], x[0]), both))
    params, state = run((params, state))
    moved = np.asarray(first - fse.master_weights(tx, params, state)["kernel"])
    assert moved.mean() / (1000 * rate) == pytest.approx(1, abs=0.01)


# --- Which parameters -------------------------------------------------------------------------------------------------


def test_matrices_have_24_bits_and_vectors_and_norms_32():
    tx = fse.split_weights(optax.sgd(1.0))
    params = {
        "kernel": jnp.ones((4, 4), jnp.bfloat16),
        "norm": {"scale": jnp.ones((2, 4), jnp.bfloat16)},
        "vector": jnp.ones(4, jnp.bfloat16),
        "wide": jnp.ones((4, 4)),
        "ids": jnp.ones((4, 4), jnp.int32),
        "none": None,
    }
    found = jax.tree.map(lambda x: (x.dtype.name, x.shape), tx.init(params).remainder)
    placeholder = ("int8", (1, 1))
    assert found == {
        "kernel": ("int8", (4, 4)),
        "norm": {"scale": ("int16", (2, 4))},
        "vector": ("int16", (4,)),
        "wide": placeholder,
        "ids": placeholder,
        "none": None,
    }
    every = fse.split_weights(optax.sgd(1.0), 32).init(params).remainder
    assert every["kernel"].dtype == jnp.int16


def test_rules_choose_the_bits():
    rules = (("norm", 24), (fse.where(lambda path, shape: shape == (4, 4)), 32), ("kernel", 24))
    tx = fse.split_weights(optax.sgd(1.0), rules=rules)
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16), "norm": jnp.ones(4, jnp.bfloat16)}
    assert jax.tree.map(lambda x: x.dtype.name, tx.init(params).remainder) == {"kernel": "int16", "norm": "int8"}


def test_float32_parameters_get_the_updates_of_the_optimizer():
    alone = INNER["adamw8bit"]()
    tx, params = build("adamw8bit", 24), masters()
    grads = gradients(params, 0)
    found, state = tx.update(grads, tx.init(params), params)
    want, own = alone.update(grads, alone.init(params), params)
    assert_same_bits((found, state.inner_state), (want, own))


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`bits` must be 24 or 32, got 16"):
        fse.split_weights(optax.sgd(1.0), 16)
    with pytest.raises(TypeError, match="must be a tuple of pairs"):
        fse.split_weights(optax.sgd(1.0), rules={"kernel": 24})
    with pytest.raises(ValueError, match="give 24 or 32 for each pattern, got 8 for 'kernel'"):
        fse.split_weights(optax.sgd(1.0), rules=(("kernel", 8),))
    tx = build("optax.sgd", 24)
    with pytest.raises(TypeError, match="'kernel' is float16"):
        tx.init({"kernel": jnp.ones((4, 4), jnp.float16)})
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    with pytest.raises(ValueError, match="`params` is None"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="must be a SplitWeightsState"):
        tx.update(params, tx.init(params).inner_state, params)
    with pytest.raises(TypeError, match="it splits no parameter"):
        fse.master_weights(optax.sgd(1.0), params, ())


@pytest.mark.parametrize("inside_jit", [False, True])
def test_a_state_of_other_bits_is_refused(inside_jit):
    params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    state, tx = build("optax.sgd", 32).init(params), build("optax.sgd", 24)
    cast = state._replace(remainder=jax.tree.map(lambda r: r.astype(jnp.int8), state.remainder))  # as orbax does
    update = jax.jit(tx.update) if inside_jit else tx.update
    for wrong in (state, cast):
        with pytest.raises(ValueError, match="bits that made it"):
            update(params, wrong, params)


# --- Numbers that are not usual ---------------------------------------------------------------------------------------


@every_bits
def test_a_parameter_that_was_set_to_zero_from_outside_stays_zero(bits):
    tx = build("optax.sgd", bits)
    params, state = fse.from_master_weights(tx, masters())
    pruned = jax.tree.map(lambda p: p.at[:8].set(0), params)
    weights = fse.master_weights(tx, pruned, state)
    assert all((jnp.abs(w[:8]) < 1e-37).all() for w in jax.tree.leaves(weights))
    new, _ = fused(tx)(jax.tree.map(jnp.zeros_like, masters()), state, pruned)
    assert_same_bits(new, pruned)


@every_bits
@pytest.mark.parametrize("inner", ["adamw8bit", "optax.sgd"])
def test_a_gradient_that_is_not_finite_does_as_with_float32_parameters(inner, bits):
    alone, tx = INNER[inner](), build(inner, bits)
    grads = gradients(masters(), 0)
    grads["block"]["kernel"] = grads["block"]["kernel"].at[0, :4].set(jnp.array([np.nan, np.inf, -np.inf, 1e30]))
    params, state = fse.from_master_weights(tx, masters())
    params, state = fused(tx)(grads, state, params)
    want, _ = in_float32(alone)(grads, alone.init(masters()), masters())
    found = fse.master_weights(tx, params, state)["block"]["kernel"]
    np.testing.assert_allclose(found, want["block"]["kernel"], rtol=2.0**-14, atol=1e-6)


# --- Around and inside ------------------------------------------------------------------------------------------------


@every_bits
def test_apply_if_finite_outside_leaves_weights_within_an_ulp(bits):
    tx = optax.apply_if_finite(build("adamw8bit", bits), 5)
    params, state = fse.from_master_weights(build("adamw8bit", bits), masters())
    state = tx.init(params)._replace(inner_state=state)
    before = fse.master_weights(tx, params, state)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, np.nan), params)
    params, state = updated(tx)(grads, state, params)
    after = fse.master_weights(tx, params, state)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before)):
        np.testing.assert_allclose(a, b, rtol=2.0**-7)


def test_multi_steps_goes_outside_with_float32_sums():
    tx, alone = build("adamw8bit", 32), INNER["adamw8bit"]()
    around = optax.MultiSteps(tx, 2)
    params, own = fse.from_master_weights(tx, masters())
    state = around.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))._replace(inner_opt_state=own)
    assert {x.dtype.name for x in jax.tree.leaves(state.acc_grads)} == {"float32"}
    want, want_state = masters(), alone.init(masters())
    for i in range(4):
        updates, state = around.update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
        if i % 2:
            mean = jax.tree.map(lambda a, b: a + (b - a) / 2, gradients(params, i - 1), gradients(params, i))
            want, want_state = updated(alone)(mean, want_state, want)
    for a, b in zip(jax.tree.leaves(fse.master_weights(around, params, state)), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-6)


@every_bits
@pytest.mark.parametrize("inner", ["8 bits", "optax"])
def test_rows_of_a_table_are_split_and_joined_alone(bits, inner):
    rows = fse.row_sparse(fse.sgd8bit(0.5) if inner == "8 bits" else optax.sgd(0.5))
    tx = fse.split_weights(rows, bits)
    table = {"embedding": jnp.asarray(np.random.default_rng(0).normal(size=(1000, 64)), jnp.float32)}
    params, state = fse.from_master_weights(tx, table)
    g = fse.SparseRows.of_lookups(jnp.array([7, 9, 7]), jnp.ones((3, 64)), num_rows=1000)
    step = jax.jit(lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    found = step({"embedding": g}, state, params)
    before = fse.master_weights(tx, params, state)["embedding"]
    after = fse.master_weights(tx, *found)["embedding"]
    untouched = np.delete(np.arange(1000), [7, 9])
    np.testing.assert_array_equal(after[untouched], before[untouched])
    want = before[jnp.array([7, 9])] - jnp.array([[1.0], [0.5]])
    np.testing.assert_allclose(after[jnp.array([7, 9])], want, rtol=2.0**-15, atol=1e-7)
    if inner == "8 bits":
        assert_same_bits(jax.jit(lambda *args: fse.fused_update(tx, *args))({"embedding": g}, state, params), found)


def test_max_norm_scales_rows():
    tx = fse.split_weights(fse.with_max_norm(fse.sgd8bit(0.5), 1.0), 32)
    params, state = fse.from_master_weights(tx, {"embedding": jnp.full((16, 64), 0.5)})
    zeros = {"embedding": jnp.zeros((16, 64))}
    new, state = fse.fused_update(tx, zeros, state, params, token_ids=jnp.array([3]))
    norms = jnp.linalg.norm(fse.master_weights(tx, new, state)["embedding"], axis=1)
    np.testing.assert_allclose(norms, np.where(np.arange(16) == 3, 1.0, 4.0), rtol=1e-5)


@every_bits
def test_train_state_and_nnx_optimizer_take_it(bits):
    tx = fse.in_place(build("adamw8bit", bits))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters())
    want, _ = fused(tx)(params, tx.init(params), params)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    assert_same_bits(jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, params).params, want)
    model = nnx.Linear(64, 256, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model.kernel[...]
    nnx.jit(lambda m, o: o.update(m, nnx.state(m, nnx.Param)))(model, optimizer)
    assert model.kernel.dtype == jnp.bfloat16 and (model.kernel[...] != before).mean() > 0.3


def test_a_derivative_is_that_of_float32_parameters():
    tx = fse.split_weights(optax.sgd(0.25), 24)
    params = {"kernel": jnp.full((4, 4), 3.0, jnp.bfloat16)}
    state = tx.init(params)

    def through(how, g):
        if how == "fused":
            return fse.fused_update(tx, {"kernel": g}, state, params)[0]["kernel"].sum().astype(jnp.float32)
        updates, _ = tx.update({"kernel": g}, state, params)
        return optax.apply_updates(params, updates)["kernel"].sum().astype(jnp.float32)

    for how in ("fused", "update"):
        grad = jax.grad(functools.partial(through, how))(jnp.ones((4, 4)))
        np.testing.assert_array_equal(grad, np.full((4, 4), -0.25))


# --- Meshes and the state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize("devices", [2, 4, 8])
@every_bits
@pytest.mark.one_in(5)
def test_bits_do_not_depend_on_the_mesh_and_nothing_is_gathered(devices, kind, bits):
    tx = build("adamw8bit", bits)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
    params, state = fse.from_master_weights(tx, masters())
    sharded = {"kernel": NamedSharding(mesh, P(None, "data")), "up": NamedSharding(mesh, P(None, "data"))}
    everywhere = NamedSharding(mesh, P())
    where = {"block": sharded, "norm": {"scale": everywhere}, "wte": {"embedding": NamedSharding(mesh, P("data"))}}
    placed = jax.device_put(params, where)
    with jax.set_mesh(mesh):
        shapes = fse.abstract_state(tx, placed)
        own = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
        grads = jax.device_put(gradients(params, 0), where)
        step = jax.jit(lambda g, s, p: fse.fused_update(tx, g, s, p))
        text = step.lower(grads, own, placed).compile().as_text()
        found = step(grads, own, placed)
    assert not any(f"{name}(" in text for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert_same_bits(found, fused(tx)(gradients(params, 0), state, params))
    for p, r in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1].remainder)):
        assert r.sharding.is_equivalent_to(p.sharding, p.ndim)


def test_the_remainder_is_sharded_like_concrete_parameters():
    mesh = jax.make_mesh((8,), ("data",))
    p = jax.device_put(jnp.ones((64, 128), jnp.bfloat16), NamedSharding(mesh, P("data")))
    state = build("adamw8bit", 24).init({"kernel": p})
    assert state.remainder["kernel"].sharding.is_equivalent_to(p.sharding, 2)


@pytest.mark.recent_compiler  # XLA for CPU has no host memory before JAX 0.10
def test_the_remainder_follows_the_memory_of_moments():
    rules = (("kernel", fse.Rule(8, memory_kind="pinned_host")),)
    tx = fse.split_weights(fse.adamw8bit(1e-3, rules=rules, state_format=SMALL))
    params = {"kernel": jnp.ones((64, 128), jnp.bfloat16)}
    state = tx.init(params)
    for _ in range(2):
        assert state.remainder["kernel"].sharding.memory_kind == "pinned_host"
        params, state = fse.fused_update(tx, params, state, params)


def test_the_state_is_a_plain_pytree_for_optax_and_eval_shape():
    tx = build("adamw8bit", 24)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters())
    state = tx.init(params)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    doubled = optax.tree.map_params(tx, lambda x: x, state)
    assert_same_bits(doubled, state)


def test_master_weights_and_from_master_weights_are_inverse():
    weights = masters()
    for tx in (
        build("adamw8bit", 32),
        fse.in_place(build("adamw8bit", 32)),
        optax.MultiSteps(build("adamw8bit", 32), 2),
    ):
        params, state = fse.from_master_weights(tx, weights)
        assert_same_bits(fse.master_weights(tx, params, state), weights)
    params, state = fse.from_master_weights(build("adamw8bit", 24), weights)
    for a, b in zip(
        jax.tree.leaves(fse.master_weights(build("adamw8bit", 24), params, state)), jax.tree.leaves(weights)
    ):
        np.testing.assert_allclose(a, b, rtol=2.0**-16)
    kernel, remainder = params["block"]["kernel"], state.remainder["block"]["kernel"]
    np.testing.assert_array_equal(
        join_weight(kernel, remainder), fse.master_weights(build("adamw8bit", 24), params, state)["block"]["kernel"]
    )


def test_a_float32_run_continues():
    alone, tx = INNER["adamw8bit"](), build("adamw8bit", 32)
    weights, own = in_float32(alone)(gradients(masters(), 0), alone.init(masters()), masters())
    params, state = fse.from_master_weights(tx, weights, own)
    params, state = fused(tx)(gradients(masters(), 1), state, params)
    want, own = in_float32(alone)(gradients(masters(), 1), own, weights)
    assert_same_bits((fse.master_weights(tx, params, state), state.inner_state), (want, own))


# --- Reports ----------------------------------------------------------------------------------------------------------


def test_describe_counts_the_remainders():
    tx, params = build("adamw8bit", 24), jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters())
    report, alone = fse.describe(tx, params), fse.describe(INNER["adamw8bit"](), masters())
    assert report.rows == tuple(row for row in alone.rows)
    assert report.remainders["block/kernel"] == (24, 64 * 256)
    assert report.remainders["norm/scale"] == (32, 2 * 64)
    assert report.total_bytes == sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert "split weights: 24 bits (3 parameters, 32,768 bytes), 32 bits (1 parameter, 128 bytes)" in str(report)
    only = fse.describe(build("optax.sgd", 32), params)
    assert str(only).startswith("split weights: 32 bits (4 parameters, 65,664 bytes)")


# --- Conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["adamw8bit", "quantize_state", "optax.adamw"])
def test_convert_state_moves_a_run_between_24_and_32_bits(inner):
    narrow, wide = build(inner, 24), build(inner, 32)
    params, state = fse.from_master_weights(wide, masters())
    params, state = fused(wide)(gradients(masters(), 0), state, params)
    less = fse.convert_state(wide, narrow, params, state)
    assert_same_bits(less.inner_state, state.inner_state)
    exact, rounded = fse.master_weights(wide, params, state), fse.master_weights(narrow, params, less)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded)):
        np.testing.assert_allclose(a, b, rtol=2.0**-15)
    again = fse.convert_state(narrow, wide, params, less)
    assert_same_bits(fse.master_weights(wide, params, again), rounded)
    assert_same_bits(fse.convert_state(wide, narrow, params, again), less)


def test_convert_state_begins_and_ends_split_weights():
    alone, tx = INNER["adamw8bit"](), build("adamw8bit", 24)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters())
    _, state = updated(alone)(params, alone.init(params), params)
    found = fse.convert_state(alone, tx, params, state)
    assert_same_bits(found.inner_state, state)
    assert found.count == 1 and not any(r.any() for r in jax.tree.leaves(found.remainder))
    with pytest.raises(ValueError, match=r"remainder/block/kernel .*allow_reset=\('remainder',\)"):
        fse.convert_state(tx, alone, params, found)
    assert_same_bits(fse.convert_state(tx, alone, params, found, allow_reset="remainder"), state)


def test_convert_state_sees_through_wrappers_and_other_optimizers():
    before = fse.split_weights(optax.adamw(1e-3))
    after = optax.MultiSteps(fse.in_place(fse.split_weights(fse.adamw8bit(1e-3, state_format=SMALL), 32)), 2)
    params, state = fse.from_master_weights(before, masters())
    params, state = updated(before)(gradients(masters(), 0), state, params)
    found = fse.convert_state(
        before, after, params, state, allow_reset=("acc_grads", "mini_step", "gradient_step", "skip_state")
    )
    assert_same_bits(fse.master_weights(after, params, found), fse.master_weights(before, params, state))


def test_two_parameters_with_one_path_are_refused():
    tx = fse.split_weights(optax.adamw(1e-3))
    for params in (
        {"a": {"b": jnp.ones((4, 4))}, "a/b": jnp.ones((4, 4))},
        {"x": {"value": jnp.ones(4), "raw_value": jnp.ones(4)}},
    ):
        with pytest.raises(ValueError, match="Two parameters have the path"):
            fse.from_master_weights(tx, params)
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        with pytest.raises(ValueError, match="Two parameters have the path"):
            fse.master_weights(tx, half, tx.init(half))


def test_parameters_that_are_not_split_stay_in_float32():
    params = {"a": jnp.full((4, 4), 0.1), "b": jnp.full((4, 4), 0.1)}
    tx = optax.masked(fse.split_weights(optax.sgd(0.1)), {"a": True, "b": False})
    new, state = fse.from_master_weights(tx, params)
    assert (new["a"].dtype, new["b"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(fse.master_weights(tx, new, state)["a"], params["a"], rtol=2.0**-15)


def test_a_state_that_belongs_to_another_part_of_the_optimizer_is_refused():
    params, inner = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}, fse.adamw8bit(1e-3)
    split = fse.split_weights(inner)
    both = optax.partition({"a": split, "b": split}, {"a": "a", "b": "b"})
    with pytest.raises(ValueError, match="has 2 split_weights"):
        fse.from_master_weights(both, params, inner.init(params))
    chained = optax.chain(optax.clip(1.0), inner)
    with pytest.raises(ValueError, match="the one optimizer inside split_weights"):
        fse.from_master_weights(optax.chain(optax.clip(1.0), split), params, chained.init(params))


def test_quantize_state_around_it_is_refused():
    tx = fse.quantize_state(fse.split_weights(optax.adamw(1e-3)))
    with pytest.raises(TypeError, match="Put split_weights around it"):
        tx.init({"kernel": jnp.ones((64, 64), jnp.bfloat16)})


def test_bits_must_be_an_integer():
    for bits in ([24], 24.0, "24"):
        with pytest.raises(ValueError, match="24 or 32"):
            fse.split_weights(fse.adamw8bit(1e-3), bits)
