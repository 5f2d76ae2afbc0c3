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
from tests.tools import SMALL, assert_same_bits, build, gradients, jitted_fused, parameters

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
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))
    grads = jax.tree.map(jnp.cos, before)
    want, _ = jitted_fused(tx)(grads, tx.init(before), before)
    optimizer = nnx.Optimizer(model, fse.in_place(tx), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))

    step(model, optimizer)
    assert_same_bits(nnx.as_pure(nnx.state(model, nnx.Param)), want)


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


def test_what_hides_the_optimizer_is_refused_by_name():
    for tx in (optax.adam(1e-3), optax.chain(ADAMW()), optax.masked(ADAMW(), True), optax.MultiSteps(ADAMW(), 2)):
        with pytest.raises(TypeError, match="hides what is in it"):
            fse.in_place(tx)
    with pytest.raises(ValueError, match=r"fse.in_place needs `params`, got None"):
        fse.in_place(ADAMW()).update(gradients(), ADAMW().init(parameters()))


# --- the seal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint16", "bool", "complex64", "float64", "complex128"]
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4, 2)], ids=str)
def test_the_seal_keeps_every_bit(dtype, shape):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        bits = np.random.default_rng(0).integers(0, 256, size=(*shape, jnp.dtype(dtype).itemsize)).astype(np.uint8)
        x = jnp.asarray((bits % 2 if dtype == "bool" else bits).view(dtype).reshape(shape))
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
