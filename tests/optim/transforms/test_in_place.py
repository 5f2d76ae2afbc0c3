"""Tests that `in_place` equals `fused_update` through `optax.apply_updates`, and that its updates cannot be misused."""

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
from flax_stable_embed.optim.transforms.in_place import _sealed, _unsealed
from tests.cases import OPTIMIZERS
from tests.tools import SMALL, as_pure, assert_same_bits, build, gradients, jitted_fused, parameters

FUSED = {case.name: functools.partial(build, case) for case in OPTIMIZERS} | {
    "chain": lambda: fse.chain(optax.clip_by_global_norm(1.0), fse.adamw8bit(1e-2, state_format=SMALL)),
    "stochastic_round_updates": lambda: fse.stochastic_round_updates(fse.adamw8bit(1e-2, state_format=SMALL)),
    "schedule": lambda: fse.lion8bit(optax.linear_schedule(1e-2, 0.0, 10), state_format=SMALL),
}
ADAMW = functools.partial(fse.adamw8bit, 1e-2, state_format=SMALL)


def apply(tx):
    """Returns a jitted step by `update` and `optax.apply_updates`."""

    @jax.jit
    def step(grads, state, params, **extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def assert_steps_alike(inner, params, gradients_of, tx=None):
    tx = fse.in_place(inner) if tx is None else tx
    found, state = params, tx.init(params)
    want, expected = params, inner.init(params)
    for i in range(3):
        found, state = apply(tx)(gradients_of(i), state, found)
        want, expected = jitted_fused(inner)(gradients_of(i), expected, want)
    assert_same_bits(found, want)
    assert_same_bits(jax.tree.leaves(state), jax.tree.leaves(expected))


# --- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.one_in(5)
def test_a_step_equals_fused_update(name, dtype):
    assert_steps_alike(FUSED[name](), parameters(dtype), lambda i: gradients(i, dtype=dtype))


def test_eager_steps_equal_fused_update():
    tx, params = ADAMW(), parameters()
    updates, state = fse.in_place(tx).update(gradients(), tx.init(params), params)
    want, expected = fse.fused_update(tx, gradients(), tx.init(params), params)
    assert_same_bits(optax.apply_updates(params, updates), want)
    assert_same_bits(state, expected)
    assert_same_bits(fse.fused_update(fse.in_place(tx), gradients(), tx.init(params), params), (want, expected))


def test_updates_can_leave_jit_and_be_applied_in_another_program():
    tx, params = fse.in_place(ADAMW()), parameters()
    updates, _ = jax.jit(tx.update)(gradients(), tx.init(params), params)
    want, _ = apply(tx)(gradients(), tx.init(params), params)
    assert_same_bits(optax.apply_updates(params, updates), want)
    assert_same_bits(jax.jit(optax.apply_updates)(params, updates), want)
    assert "for optax.apply_updates" in repr(updates["kernel"])


def test_a_train_state_and_an_nnx_optimizer_step_like_fused_update():
    tx, params = ADAMW(), parameters()
    want, _ = jitted_fused(tx)(gradients(), tx.init(params), params)
    state = TrainState.create(apply_fn=None, params=params, tx=fse.in_place(tx))
    assert_same_bits(jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, gradients()).params, want)

    model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, as_pure(nnx.state(model, nnx.Param)))
    grads = jax.tree.map(jnp.cos, before)
    want, _ = jitted_fused(tx)(grads, tx.init(before), before)
    optimizer = nnx.Optimizer(model, fse.in_place(tx), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))

    step(model, optimizer)
    assert_same_bits(as_pure(nnx.state(model, nnx.Param)), want)


def test_row_gradients_and_max_norm_step_like_fused_update():
    params = {"embedding": jnp.ones((32, 8)), "kernel": jnp.ones((64, 64))}
    rows = fse.SparseRows.of_lookups(jnp.array([3, 3, 7]), jnp.ones((3, 8)), 32)
    for inner in (fse.row_sparse(ADAMW()), fse.row_sparse(fse.with_max_norm(ADAMW(), 1.0))):
        assert_steps_alike(inner, params, lambda i: {"embedding": rows, "kernel": params["kernel"] * (i + 1)})


def test_a_parameter_without_a_gradient_stays():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones(8)}
    tx = fse.in_place(ADAMW())
    updates, _ = tx.update({"a": params["a"], "b": None}, tx.init(params), params)
    assert_same_bits(optax.apply_updates(params, updates)["b"], params["b"])


def test_numpy_parameters_become_jax_arrays():
    params = jax.tree.map(np.asarray, parameters())
    tx = fse.in_place(ADAMW())
    updates, _ = tx.update(gradients(), tx.init(params), params)
    want, _ = fse.fused_update(ADAMW(), gradients(), tx.init(params), params)
    assert_same_bits(optax.apply_updates(params, updates), want)


# --- around it -------------------------------------------------------------------------------------------------------


def test_optax_wrappers_around_it_step_like_those_around_the_optimizer():
    params, inner = parameters(), ADAMW()
    mask = {"kernel": True, "norm": False, "wte": True}
    others = jax.tree.map(lambda m: not m, mask)
    labels = jax.tree.map(lambda m: "train" if m else "freeze", mask)
    wrapped = {
        "chain": lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
        "partition": lambda tx: optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels),
        "masked": lambda tx: optax.chain(optax.masked(tx, mask), optax.masked(optax.set_to_zero(), others)),
        "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=others),
    }
    for make in wrapped.values():
        tx, plain = make(fse.in_place(inner)), make(inner)
        found, _ = apply(tx)(gradients(), tx.init(params), params)
        want, _ = apply(plain)(gradients(), plain.init(params), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, want)


def test_hyper_parameters_can_be_injected_around_it():
    params = parameters()
    tx = optax.inject_hyperparams(lambda rate: fse.in_place(fse.adamw8bit(rate, state_format=SMALL)))(1e-2)
    found, state = apply(tx)(gradients(), tx.init(params), params)
    want, _ = apply(ADAMW())(gradients(), ADAMW().init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, want)
    state.hyperparams["rate"] = jnp.float32(0.0)
    still, _ = apply(tx)(gradients(1), state, found)
    assert_same_bits(still, found)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_it_steps_alike_on_a_mesh_and_keeps_shardings(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    params, tx = parameters(), fse.in_place(ADAMW())
    want, _ = apply(tx)(gradients(), tx.init(params), params)
    spec = jax.tree.map(lambda x: NamedSharding(mesh, P()), params) | {"kernel": NamedSharding(mesh, P("a", "b"))}
    with jax.set_mesh(mesh):
        placed, grads = jax.device_put(params, spec), jax.device_put(gradients(), spec)
        found, _ = apply(tx)(grads, tx.init(placed), placed)
        updates, _ = jax.jit(tx.update)(grads, tx.init(placed), placed)
        apart = optax.apply_updates(placed, updates)
    assert found["kernel"].sharding.is_equivalent_to(spec["kernel"], 2)
    assert_same_bits(jax.device_get(found), want)
    assert_same_bits(jax.device_get(apart), want)


def test_scan_vmap_and_remat_work():
    params, tx = parameters(), fse.in_place(ADAMW())

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(gradients(i) for i in range(3)))
    (found, _), _ = jax.lax.scan(jax.remat(step), (params, tx.init(params)), stacked)
    want, state = params, tx.init(params)
    for i in range(3):
        want, state = apply(tx)(gradients(i), state, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, want)

    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    updates, _ = jax.vmap(tx.update)(two, jax.vmap(tx.init)(two), two)
    both = jax.vmap(optax.apply_updates)(two, updates)
    one, _ = apply(tx)(params, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6), both, one)


# --- members of a batch ----------------------------------------------------------------------------------------------


def members(n):
    """Returns parameters and gradients of `n` members: a matrix, a vector and a scalar each."""
    one = {"kernel": jnp.ones((16, 96)), "bias": jnp.ones(96), "scale": jnp.float32(1)}
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), one)
    return params, jax.tree.map(lambda x: x * (jnp.arange(n) + 1.0).reshape(-1, *[1] * (x.ndim - 1)), params)


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def in_lanes(step, params, grads, chosen):
    """`vmap` with the members along the last axis of the updates."""
    last = jax.vmap(step, out_axes=-1)(params, grads, chosen)
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), last)


BATCHES = {
    "vmap": lambda step, *members: jax.vmap(step)(*members),
    "jit of vmap": lambda step, *members: jax.jit(jax.vmap(step))(*members),
    "last axis": in_lanes,
    "scan": lambda step, *members: jax.lax.scan(lambda carry, x: (carry, step(*x)), None, members)[1],
    "map in batches": lambda step, *members: jax.lax.map(lambda x: step(*x), members, batch_size=2),
    "stack": lambda step, *members: jax.tree.map(
        lambda *x: jnp.stack(x), *(step(*at(members, i)) for i in range(len(members[-1])))
    ),
    "vmap of vmap": lambda step, *members: jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]),
        jax.vmap(jax.vmap(step))(*jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), members)),
    ),
}


@pytest.mark.parametrize("how", BATCHES)
@pytest.mark.parametrize("n", [4, 16, 96])  # 16 and 96 are also the sizes of axes
@pytest.mark.parametrize("skips", [False, True], ids=["all", "some"])
@pytest.mark.one_in(7)
def test_updates_of_members_can_be_applied_to_all_at_once(how, n, skips):
    if how == "stack" and n > 4:
        return
    params, grads = members(n)
    chosen = jnp.arange(n) % 2 == 0

    def step(tx, params, grads, chosen):
        updates, _ = tx.update(grads, tx.init(params), params)
        return jax.tree.map(lambda x: jnp.where(chosen, x, jnp.zeros_like(x)), updates) if skips else updates

    found, want = (
        optax.apply_updates(params, BATCHES[how](functools.partial(step, tx), params, grads, chosen))
        for tx in (fse.in_place(ADAMW()), ADAMW())
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, want)
    still = jax.tree.map(lambda x, p: np.asarray(x == p).reshape(n, -1).all(axis=1), found, params)
    for unmoved in jax.tree.leaves(still):
        np.testing.assert_array_equal(unmoved, ~np.asarray(chosen) if skips else np.zeros(n, bool))


def test_the_update_of_one_member_can_be_taken_out():
    tx, (params, grads) = fse.in_place(ADAMW()), members(4)
    updates, _ = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(params), params)
    together = optax.apply_updates(params, updates)
    for i in range(4):
        assert_same_bits(optax.apply_updates(at(params, i), at(updates, i)), at(together, i))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_members_can_be_on_different_devices(kind):
    tx, (params, grads) = fse.in_place(ADAMW()), members(8)
    want = optax.apply_updates(params, jax.vmap(tx.update)(grads, jax.vmap(tx.init)(params), params)[0])
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("a"))
        placed, state, grads = jax.device_put((params, jax.vmap(tx.init)(params), grads), sharding)
        updates, _ = jax.jit(jax.vmap(tx.update))(grads, state, placed)
        found = optax.apply_updates(placed, updates)
    assert found["kernel"].sharding.is_equivalent_to(sharding, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-6), found, want)


def test_updates_that_were_joined_along_an_axis_of_parameters_are_refused():
    tx, (params, grads) = fse.in_place(ADAMW()), members(2)
    updates, _ = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(params), params)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *(at(updates["kernel"], i) for i in range(2)))
    with pytest.raises(TypeError, match=r"only optax.apply_updates can use it"):
        _ = params["kernel"].reshape(32, 96) + joined


# --- derivatives -----------------------------------------------------------------------------------------------------

BOUNDARIES = {
    "jit": lambda update: jax.jit(update),
    "checkpoint": lambda update: jax.checkpoint(update),
    "tree.map": lambda update: lambda *args: jax.tree.map(lambda x: x, update(*args)),
    "where": lambda update: (
        lambda *args: jax.tree.map(
            lambda x: jnp.where(args[2]["kernel"][0, 0] < 9, x, jnp.zeros_like(x)), update(*args)
        )
    ),
    "cond": lambda update: (
        lambda *args: jax.lax.cond(
            args[2]["kernel"][0, 0] < 9, update, lambda *args: jax.tree.map(jnp.zeros_like, update(*args)), *args
        )
    ),
    "scan": lambda update: lambda *args: at(jax.lax.scan(lambda c, _: (c, update(*args)), None, None, 1)[1], 0),
    "vmap": lambda update: lambda *args: at(jax.vmap(update)(*jax.tree.map(lambda x: x[None], args)), 0),
    "stop_gradient": lambda update: lambda *args: jax.lax.stop_gradient(update(*args)),
}


def after_a_step(wrap, boundary, rate, scale):
    """Returns a loss after a step, with parameters that are scaled."""
    tx = wrap(fse.adamw8bit(rate, weight_decay=0.1, rules=((".*", 32),)))
    params = {"kernel": jnp.linspace(-1, 1, 64 * 96).reshape(64, 96) * scale}
    grads = jax.tree.map(jnp.cos, params)
    updates = boundary(lambda *args: tx.update(*args)[0])(grads, tx.init(params), params)
    return jnp.sum(optax.apply_updates(params, updates)["kernel"] ** 2)


DERIVATIVES = {
    "grad": lambda f, *args, k: jax.grad(f, k)(*args),
    "jvp": lambda f, *args, k: jax.jvp(lambda x: f(*args[:k], x, *args[k + 1 :]), (args[k],), (jnp.float32(1),))[1],
}


@pytest.mark.parametrize("how", DERIVATIVES)
@pytest.mark.parametrize("by", [0, 1], ids=["rate", "params"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_derivative_that_would_be_lost_raises(boundary, by, how):
    f = functools.partial(after_a_step, fse.in_place, BOUNDARIES[boundary])
    args = jnp.float32(0.01), jnp.float32(1)
    with pytest.raises(TypeError, match=r"A derivative reaches an update of fse\.in_place"):
        DERIVATIVES[how](f, *args, k=by)
    with pytest.raises(TypeError, match=r"A derivative reaches an update of fse\.in_place"):
        jax.jit(lambda *args: DERIVATIVES[how](f, *args, k=by))(*args)
    if boundary != "stop_gradient":
        plain = after_a_step(lambda tx: tx, BOUNDARIES[boundary], *args)
        np.testing.assert_allclose(f(*args), plain, rtol=1e-5)


@pytest.mark.parametrize("how", DERIVATIVES)
@pytest.mark.parametrize("by", [0, 1], ids=["rate", "params"])
@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
def test_a_derivative_is_right_where_one_function_makes_and_applies_updates(around, by, how):
    args = jnp.float32(0.01), jnp.float32(1)
    found, want = (
        DERIVATIVES[how](around(functools.partial(after_a_step, wrap, lambda update: update)), *args, k=by)
        for wrap in (fse.in_place, lambda tx: tx)
    )
    np.testing.assert_allclose(found, want, rtol=1e-4)
    assert abs(want) > 1


def test_a_derivative_by_parameters_that_get_fixed_updates_raises():
    tx, params = fse.in_place(ADAMW()), parameters()
    updates, _ = jax.jit(tx.update)(gradients(), tx.init(params), params)
    with pytest.raises(TypeError, match=r"A derivative reaches an update of fse\.in_place"):
        jax.grad(lambda params: jnp.sum(optax.apply_updates(params, updates)["kernel"]))(params)


def test_a_derivative_of_something_else_may_surround_a_step():
    tx, params = fse.in_place(ADAMW()), parameters()
    want, _ = apply(tx)(gradients(), tx.init(params), params)

    def loss(x):
        updates, _ = jax.jit(tx.update)(gradients(), tx.init(params), params)
        return jnp.sum(x**2), optax.apply_updates(params, jax.tree.map(lambda x: x, updates))

    (_, found), slope = jax.value_and_grad(loss, has_aux=True)(jnp.ones(3))
    assert_same_bits(found, want)
    np.testing.assert_array_equal(slope, 2 * jnp.ones(3))


# --- zeros mean no update --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_zeros_leave_parameters_bit_for_bit(dtype, jitted):
    params = parameters(dtype) | {"special": jnp.asarray([-0.0, 0.0, np.inf, np.nan, 1e-45], dtype)}
    tx = fse.in_place(ADAMW())
    grads = gradients(like=params, dtype=dtype)

    def zeroed(grads, state, params):
        updates, _ = tx.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(jnp.zeros_like, updates))

    found = (jax.jit(zeroed) if jitted else zeroed)(grads, tx.init(params), params)
    assert_same_bits(found, params)


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("how", ["where", "cond", "select", "scan"])
def test_a_choice_between_an_update_and_zeros(ok, how):
    params, tx = parameters(), fse.in_place(ADAMW())
    want, _ = apply(tx)(gradients(), tx.init(params), params)

    @jax.jit
    def step(grads, state, params, ok):
        updates, _ = tx.update(grads, state, params)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        if how == "where":
            updates = jax.tree.map(lambda u, z: jnp.where(ok, u, z), updates, zeros)
        elif how == "select":
            updates = jax.tree.map(lambda u, z: jax.lax.select_n(ok, z, u), updates, zeros)
        elif how == "cond":
            updates = jax.lax.cond(ok, lambda: updates, lambda: zeros)
        else:
            updates, _ = jax.lax.scan(lambda u, _: (jax.lax.cond(ok, lambda: updates, lambda: u), None), zeros, None, 2)
        return optax.apply_updates(params, updates)

    assert_same_bits(step(gradients(), tx.init(params), params, ok), want if ok else params)


# --- misuse ----------------------------------------------------------------------------------------------------------

MISUSE = {
    "scale": optax.scale(0.5),
    "decayed": optax.add_decayed_weights(0.1),
    "noise": optax.add_noise(1.0, 0.5, jax.random.key(0)),
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "trust_ratio": optax.scale_by_trust_ratio(),
    "rate": optax.scale_by_learning_rate(0.1),
    "schedule": optax.scale_by_schedule(lambda count: 0.5),
    "ema": optax.ema(0.9),
    "trace": optax.trace(0.9),
}


@pytest.mark.parametrize("name", MISUSE)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_transform_after_it_raises(name, jitted):
    tx, params = optax.chain(fse.in_place(ADAMW()), MISUSE[name]), parameters()
    state = tx.init(params)
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        (jax.jit(tx.update) if jitted else tx.update)(gradients(), state, params)
    names = ("fse.in_place", "InPlaceUpdate", "Cannot call abstract method")  # the last is JAX's own, outside of jit
    assert any(name in str(error.value) for name in (names[:2] if jitted else names))


@pytest.mark.parametrize(
    "compute",
    [
        lambda u, p: u * 0.5,
        lambda u, p: 0.5 * u,
        lambda u, p: u + p,
        lambda u, p: u - p,
        lambda u, p: p - u,
        lambda u, p: -u,
        lambda u, p: u / 2,
        lambda u, p: u @ p,
        lambda u, p: np.asarray(u),
        lambda u, p: u.astype(jnp.float32),
        lambda u, p: u[0],
    ],
)
def test_arithmetic_on_an_update_raises(compute):
    tx, params = fse.in_place(ADAMW()), parameters()
    updates, _ = tx.update(gradients(), tx.init(params), params)
    with pytest.raises(TypeError, match=r"only optax.apply_updates can use it"):
        compute(updates["kernel"], params["kernel"])


@pytest.mark.parametrize("wrap", [lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.apply_if_finite(tx, 2)])
def test_wrappers_that_compute_with_updates_raise(wrap):
    tx, params = wrap(fse.in_place(ADAMW())), parameters()
    with pytest.raises(TypeError, match=r"fse\.in_place|InPlaceUpdate"):
        tx.update(gradients(), tx.init(params), params)


def test_other_parameters_are_refused():
    tx, params = fse.in_place(ADAMW()), parameters()
    others = jax.tree.map(lambda x: x + 1, params)
    updates, _ = tx.update(gradients(), tx.init(params), params)
    with pytest.raises(ValueError, match="Pass the very parameters that `update` got"):
        optax.apply_updates(others, updates)

    def step(grads, state, params, others):
        return optax.apply_updates(others, tx.update(grads, state, params)[0])

    with pytest.raises(ValueError, match="Pass the very parameters that `update` got"):
        jax.jit(step)(gradients(), tx.init(params), params, others)
    outside, _ = jax.jit(tx.update)(gradients(), tx.init(params), params)
    with pytest.raises(ValueError, match="Pass the very parameters that `update` got"):
        optax.apply_updates(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), outside)


def test_a_wrapper_that_keeps_parameters_of_its_own_is_refused_by_name():
    tx, params = optax.contrib.schedule_free(fse.in_place(ADAMW()), 1e-2), parameters()
    with pytest.raises(ValueError, match=r"such as optax\.contrib\.schedule_free, needs the optimizer without"):
        tx.update(gradients(), tx.init(params), params)


def test_what_hides_the_optimizer_is_refused_by_name():
    for tx in (optax.adam(1e-3), optax.chain(ADAMW()), optax.masked(ADAMW(), True), optax.MultiSteps(ADAMW(), 2)):
        with pytest.raises(TypeError, match="hides what is in it"):
            fse.in_place(tx)
    with pytest.raises(ValueError, match=r"fse.in_place needs `params`, got None"):
        fse.in_place(ADAMW()).update(gradients(), ADAMW().init(parameters()))


# --- the seal --------------------------------------------------------------------------------------------------------


FLOATS = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float4_e2m1fn", "complex64", "complex128"]


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "int8", "uint16", "int4", "uint2", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4, 2)], ids=str)
def test_the_seal_keeps_every_bit(dtype, shape):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        of_a_byte = {"bool": 2, "float4_e2m1fn": 16, "int4": 16, "uint2": 4}.get(dtype, 256)
        bits = np.random.default_rng(0).integers(0, of_a_byte, size=(*shape, jnp.dtype(dtype).itemsize), dtype=np.uint8)
        x = jnp.asarray(bits.view(jnp.dtype(dtype)).reshape(shape))
        assert np.asarray(_unsealed(_sealed(x), np.dtype(x.dtype))).tobytes() == np.asarray(x).tobytes()


def test_sealed_programs_compile_to_the_direct_one():
    """On CPU the compiled program that flattens the update has no more instructions than the direct one."""
    tx, params = fse.in_place(ADAMW()), {"kernel": jnp.ones((64, 96))}

    def step(flattens, params, state, grads):
        updates, state = tx.update(grads, state, params)
        updates = jax.tree.map(lambda x: x, updates) if flattens else updates
        return optax.apply_updates(params, updates), state

    texts = [
        jax.jit(functools.partial(step, flattens)).lower(params, tx.init(params), params).compile().as_text()
        for flattens in (False, True)
    ]
    counts = [sum(" = " in line for line in text.splitlines()) for text in texts]
    assert counts[1] <= counts[0]
