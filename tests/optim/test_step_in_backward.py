"""Tests steps inside the backward pass against the same steps after it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed import experimental

LAYERS, WIDTH = 3, 64
OPTIMIZERS = {
    "adamw8bit": fse.adamw8bit(1e-2),
    "lion8bit": fse.lion8bit(1e-2),
    "clipped": fse.chain(optax.clip_by_global_norm(0.1), fse.adamw8bit(1e-2)),
    "split_weights": fse.split_weights(fse.adamw8bit(1e-2)),
    "optax.adamw": optax.adamw(1e-2),
    "in_place": fse.in_place(fse.adamw8bit(1e-2)),
}


def layers_of(dtype=jnp.float32):
    kernel = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / 8
    return {"kernel": kernel.astype(dtype), "norm": {"scale": jnp.ones((LAYERS, WIDTH), dtype)}}


def layer(params, x, shift, ids):
    """Has an input with a gradient, and one of integers."""
    return x + jnp.tanh((x + shift[ids]) @ params["kernel"]) * params["norm"]["scale"][None]


def loss_fn(params, layers, batch):
    x = layers(layer, batch * params["scale"], params["shift"], jnp.arange(8) % 2)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def scanned(params, layers, batch):
    def apply(layer, x, *inputs):
        return jax.lax.scan(lambda x, p: (layer(p, x, *inputs), None), x, layers)[0]

    return loss_fn(params, apply, batch)


def other_params(dtype=jnp.float32):
    return {
        "scale": jnp.ones((1, WIDTH), dtype),
        "shift": jnp.linspace(-1, 1, 2 * WIDTH, dtype=dtype).reshape(2, WIDTH),
    }


def batch(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (8, WIDTH)).astype(dtype)


def step_after(tx, params, layers, state, batch):
    loss, (grads, of_layers) = jax.value_and_grad(scanned, argnums=(0, 1))(params, layers, batch)

    def step(grads, state, params):
        if hasattr(tx, "fused_update"):
            return fse.fused_update(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return loss, grads, *jax.vmap(step)(of_layers, state, layers)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_those_after_the_backward_pass(name):
    tx, dtype = OPTIMIZERS[name], jnp.bfloat16 if name == "split_weights" else jnp.float32
    params, layers = other_params(dtype), layers_of(dtype)
    state = jax.vmap(tx.init)(layers)
    found = jax.jit(experimental.step_in_backward(loss_fn, tx))
    want = jax.jit(functools.partial(step_after, tx))
    a = b = (layers, state)
    for _ in range(3):
        loss, grads, *a = found(params, *a, batch(dtype))
        wanted_loss, wanted_grads, *b = want(params, *b, batch(dtype))
    tolerance = {"rtol": 1e-2 if dtype == jnp.bfloat16 else 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(loss, wanted_loss, **tolerance)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), *map(in_float32, (grads, wanted_grads)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), *map(in_float32, (a[0], b[0])))
    assert jax.eval_shape(lambda: tuple(a)) == jax.eval_shape(lambda: tuple(b))
    assert not np.array_equal(a[0]["kernel"], layers["kernel"])


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def test_eager_calls_step_too():
    tx, layers = OPTIMIZERS["adamw8bit"], layers_of()
    args = other_params(), layers, jax.vmap(tx.init)(layers), batch()
    step = experimental.step_in_backward(loss_fn, tx)
    eager, compiled = step(*args), jax.jit(step)(*args)
    np.testing.assert_allclose(eager[2]["kernel"], compiled[2]["kernel"], rtol=1e-5)


def test_layers_step_even_if_nothing_else_has_a_gradient():
    tx, layers = optax.sgd(0.1), {"kernel": jnp.stack([jnp.eye(4)] * 2)}

    def loss_fn(params, layers, x):
        return layers(lambda p, x: x @ p["kernel"], x).sum(), "aux"

    step = experimental.step_in_backward(loss_fn, tx, has_aux=True)
    (loss, aux), grads, new, _ = step({}, layers, jax.vmap(tx.init)(layers), jnp.ones((1, 4)))
    assert (float(loss), aux, grads) == (4.0, "aux", {})
    np.testing.assert_allclose(new["kernel"], layers["kernel"] - 0.1)


@pytest.mark.recent_compiler
def test_no_gradient_of_all_layers_is_in_memory():
    tx, layers = optax.sgd(0.1), {"kernel": jnp.zeros((16, 128, 128))}
    args = {}, layers, jax.vmap(tx.init)(layers), jnp.ones((1, 128))

    def loss_fn(params, layers, x):
        return layers(lambda p, x: jnp.tanh(x @ p["kernel"]), x).sum()

    def plain(params, layers, state, x):
        def loss(layers):
            return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["kernel"]), None), x, layers)[0].sum()

        updates, state = jax.vmap(tx.update)(jax.grad(loss)(layers), state, layers)
        return optax.apply_updates(layers, updates), state

    def temporaries(step):
        return jax.jit(step, donate_argnums=(1, 2)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    size = layers["kernel"].nbytes
    assert temporaries(plain) >= size
    assert temporaries(experimental.step_in_backward(loss_fn, tx)) < size / 4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_layers_keep_their_sharding(kind):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(kind,))
    tx, layers = OPTIMIZERS["adamw8bit"], {"kernel": layers_of()["kernel"]}
    x = batch()

    def loss_fn(params, layers, x):
        return (layers(lambda p, x: x + jnp.tanh(gathered(x) @ gathered(p["kernel"])), x) ** 2).mean()

    def gathered(x):
        is_explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        return jax.sharding.reshard(x, P()) if is_explicit else x

    step = jax.jit(experimental.step_in_backward(loss_fn, tx))
    want = step({}, layers, jax.vmap(tx.init)(layers), x)[2]
    where = NamedSharding(mesh, P(None, "a", None))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(layers, where)
        found = step({}, sharded, jax.vmap(tx.init)(sharded), x)[2]
    np.testing.assert_allclose(found["kernel"], want["kernel"], atol=1e-5)
    assert found["kernel"].sharding.is_equivalent_to(where, 3)


def test_errors_say_what_is_wrong():
    tx, layers = optax.sgd(0.1), {"kernel": jnp.ones((2, 4, 4))}
    state = jax.vmap(tx.init)(layers)
    apply = lambda p, x: x @ p["kernel"]  # noqa: E731

    def run(loss_fn, layers=layers, state=state, tx=tx):
        return experimental.step_in_backward(loss_fn, tx)({}, layers, state, jnp.ones((1, 4)))

    with pytest.raises(ValueError, match="twice"):
        run(lambda params, layers, x: layers(apply, layers(apply, x)).sum())
    with pytest.raises(ValueError, match="does not depend"):
        run(lambda params, layers, x: x.sum())
    with pytest.raises(ValueError, match="does not depend"):
        run(lambda params, layers, x: jax.lax.stop_gradient(layers(apply, x)).sum())
    with pytest.raises(ValueError, match=r"vmap\(tx.init\)"):
        run(lambda params, layers, x: layers(apply, x).sum(), state=fse.adamw8bit(1e-3).init(layers))
    with pytest.raises(ValueError, match="no arrays"):
        run(lambda params, layers, x: layers(apply, x).sum(), layers={}, state=())
    with pytest.raises(TypeError, match="optax"):
        experimental.step_in_backward(loss_fn, "adam")


TRANSFORMED = {
    "scan": lambda layers, x: jax.lax.scan(lambda y, _: (layers(apply, y), None), x, None, length=3)[0],
    "jit": lambda layers, x: (run := jax.jit(lambda x: layers(apply, x)), run(run(x)))[1],
    "cond": lambda layers, x: jax.lax.cond(x.sum() > 0, lambda x: layers(apply, x), lambda x: x, x),
    "vmap": lambda layers, x: jax.vmap(lambda x: layers(apply, x[None])[0])(x),
    "grad": lambda layers, x: jax.grad(lambda x: layers(apply, x).sum())(x),
    "checkpoint": lambda layers, x: jax.checkpoint(lambda x: layers(apply, x))(x),
}


def apply(params, x):
    return jnp.tanh(x @ params["kernel"])


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("is_jitted", [True, False])
def test_layers_inside_of_a_transformation_are_refused(name, is_jitted):
    """They could run several times, and each run would make a step."""
    tx, layers = optax.sgd(0.1), {"kernel": jnp.ones((2, 4, 4))}

    def step(params):
        step = experimental.step_in_backward(lambda p, layers, x: TRANSFORMED[name](layers, x * p).sum(), tx)
        return step(params, layers, jax.vmap(tx.init)(layers), jnp.ones((1, 4)))

    with pytest.raises(ValueError, match="in `loss_fn` itself"):
        (jax.jit(step) if is_jitted else step)(jnp.ones([]))


@pytest.mark.parametrize("is_jitted", [True, False])
def test_a_layer_may_use_arrays_around_it(is_jitted):
    """Those that depend on the parameters get their gradient, as in a scan."""
    tx, layers = optax.sgd(0.1), {"kernel": layers_of()["kernel"]}
    constant = jnp.linspace(-1, 1, WIDTH)[None]

    def loss_with(apply_all, params, x):
        doubled = 2 * params["scale"]
        return (apply_all(lambda p, x: jnp.tanh(x @ p["kernel"]) * doubled + constant, x) ** 2).mean()

    def plain(params, layers, x):
        return loss_with(lambda f, x: jax.lax.scan(lambda x, p: (f(p, x), None), x, layers)[0], params, x)

    step = experimental.step_in_backward(lambda p, layers, x: loss_with(layers, p, x), tx)
    params, x = {"scale": jnp.full((1, WIDTH), 0.5)}, batch()
    loss, grads, new, _ = (jax.jit(step) if is_jitted else step)(params, layers, jax.vmap(tx.init)(layers), x)
    want, (d_params, d_layers) = jax.value_and_grad(plain, (0, 1))(params, layers, x)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(grads["scale"], d_params["scale"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["kernel"], layers["kernel"] - 0.1 * d_layers["kernel"], rtol=1e-5, atol=1e-6)


def test_inputs_may_be_python_numbers():
    tx, layers = optax.sgd(0.1), {"kernel": jnp.ones((2, 4, 4))}

    def loss_fn(params, layers, x):
        return layers(lambda p, x, a, n: jnp.tanh(x @ p["kernel"]) * a + n, x, 0.5, 2).sum()

    experimental.step_in_backward(loss_fn, tx)({}, layers, jax.vmap(tx.init)(layers), jnp.ones((1, 4)))


def test_layers_without_parameters_that_train_are_refused_early():
    tx = optax.sgd(0.1)
    step = experimental.step_in_backward(lambda params, layers, x: layers(apply, x).sum(), tx)
    numbered = {"kernel": jnp.ones((2, 4, 4)), "number": jnp.arange(2)}
    with pytest.raises(TypeError, match="'number' of `layers` is int32"):
        step({}, numbered, jax.vmap(tx.init)(numbered), jnp.ones((1, 4)))
    none = {"kernel": jnp.ones((0, 4, 4))}
    with pytest.raises(ValueError, match="no layers"):
        step({}, none, tx.init(none) and {"count": jnp.zeros(0)}, jnp.ones((1, 4)))
