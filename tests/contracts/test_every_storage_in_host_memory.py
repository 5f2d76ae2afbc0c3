"""Tests moments in host memory: the same bits as in device memory, and still in host memory after every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_stable_embed as fse
from benchmarks.counted import compiled as counted

pytestmark = pytest.mark.recent_compiler  # XLA for CPU has no host memory before JAX 0.10

HOST = ((".*", fse.Rule(memory_kind="pinned_host")),)
RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": jnp.asarray(RNG.standard_normal((130, 64)), jnp.float32),
    "kernel": jnp.asarray(RNG.standard_normal((64, 256)), jnp.float32),
}
GRADS = jax.tree.map(lambda p: 0.1 * p, PARAMS)


def memories(state):
    """Returns the memory kinds of all matrices in a state."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(state) if x.ndim == 2}


def trained(tx, params=PARAMS, grads=GRADS, fused=False):
    """Parameters and state after three steps under jit, both donated."""

    def step(params, state, grads):
        if fused:
            return fse.fused_update(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for _ in range(3):
        params, state = step(params, state, grads)
    return params, state


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bits", [None, 8, 32, "bf16", "rowwise"])
@pytest.mark.one_in(4)
def test_every_storage_gives_the_same_bits_as_in_device_memory(bits, fused):
    host = ((".*", fse.Rule(bits, memory_kind="pinned_host")),)
    tx, on_device = fse.adamw8bit(1e-3, rules=host), fse.adamw8bit(1e-3, rules=((".*", fse.Rule(bits)),))
    assert memories(tx.init(PARAMS)) == {"pinned_host"}
    got, want = trained(tx, fused=fused), trained(on_device, fused=fused)
    assert memories(got[1]) == {"pinned_host"} and memories(want[1]) == {"device"}
    assert_same(got, want)


@pytest.mark.parametrize("bits", [None, 32, "bf16"])
def test_small_moments_that_are_not_in_8_bits_stay_on_the_device(bits):
    """Also with donation of the state alone, for which JAX would end the process."""
    params = {"bias": jnp.ones(256), "scale": jnp.ones(()), "kernel": PARAMS["kernel"], "long": jnp.ones(8192)}
    tx = fse.adamw8bit(
        1e-3,
        rules=(
            ("kernel|long", fse.Rule(8, memory_kind="pinned_host")),
            (".*", fse.Rule(bits, memory_kind="pinned_host")),
        ),
    )
    state = tx.init(params)
    for _ in range(2):
        for moment in (state[0].mu, state[0].nu, state[0].mu_absmax, state[0].nu_absmax):
            kinds = {name: x.sharding.memory_kind for name, x in moment.items()}
            assert kinds == {"bias": "device", "scale": "device", "kernel": "pinned_host", "long": "pinned_host"}
        _, state = jax.jit(tx.update, donate_argnums=1)(params, state, params)


def test_a_rule_can_move_some_moments_to_host_memory_and_steps_keep_them_there():
    tx = fse.adamw8bit(1e-3, rules=(("embedding", fse.Rule(memory_kind="pinned_host")),))
    state = tx.update(GRADS, tx.init(PARAMS), PARAMS)[1]
    kinds = {name: x.sharding.memory_kind for name, x in state[0].mu.items()}
    assert kinds == {"embedding": "pinned_host", "kernel": "device"}
    assert "memory_kind=pinned_host" in str(fse.describe(tx, PARAMS))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.chain(optax.clip_by_global_norm(1.0), fse.lion8bit(1e-3, rules=HOST)),
        lambda: optax.MultiSteps(fse.adamw8bit(1e-3, rules=HOST), 2).gradient_transformation(),
        lambda: optax.apply_if_finite(fse.lamb8bit(1e-3, rules=HOST), 3),
        lambda: optax.inject_hyperparams(fse.adamw8bit)(1e-3, rules=HOST),
        lambda: optax.masked(fse.adamw8bit(1e-3, rules=HOST), {"embedding": False, "kernel": True}),
    ],
    ids=["chain", "MultiSteps", "apply_if_finite", "inject_hyperparams", "masked"],
)
def test_optax_wrappers_keep_moments_in_host_memory(wrap):
    assert "pinned_host" in memories(trained(wrap())[1])


def test_nnx_optimizers_keep_moments_in_host_memory():
    model = nnx.Linear(64, 256, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fse.adamw8bit(1e-3, rules=HOST), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(jnp.ones((4, 64))) ** 2))(model))

    step(model, optimizer)
    step(model, optimizer)
    assert memories(nnx.state(optimizer)) == {"pinned_host"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_moments_in_host_memory_are_sharded_as_on_devices(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    cut = NamedSharding(mesh, PartitionSpec(None, "b"))
    params, grads = ({"kernel": jax.device_put(x["kernel"], cut)} for x in (PARAMS, GRADS))
    with jax.set_mesh(mesh):
        got, want = (trained(fse.adamw8bit(1e-3, rules=rules), params, grads) for rules in (HOST, ()))
    mu = got[1][0].mu["kernel"].sharding
    assert mu.memory_kind == "pinned_host" and mu.is_equivalent_to(cut.with_memory_kind("pinned_host"), 2)
    assert_same(got, want)


def test_convert_state_moves_a_state_to_host_memory_and_back():
    here, there = fse.adamw8bit(1e-3), fse.adamw8bit(1e-3, rules=HOST)
    state = here.update(GRADS, here.init(PARAMS), PARAMS)[1]
    away = fse.convert_state(here, there, PARAMS, state)
    assert memories(away) == {"pinned_host"}
    back = fse.convert_state(there, here, PARAMS, away)
    assert memories(back) == {"device"}
    assert_same(back, state)


@pytest.mark.parametrize("jit", [False, True])
def test_convert_state_changes_the_codec_of_a_state_in_host_memory(jit):
    dynamic = fse.StateFormat("dynamic")
    from_host, to_host = fse.adamw8bit(1e-3, rules=HOST), fse.adamw8bit(1e-3, rules=HOST, state_format=dynamic)
    here, to_here = fse.adamw8bit(1e-3), fse.adamw8bit(1e-3, state_format=dynamic)
    state = here.update(GRADS, here.init(PARAMS), PARAMS)[1]
    away = fse.convert_state(here, from_host, PARAMS, state)
    want = fse.convert_state(here, to_here, PARAMS, state)
    for before, given in ((here, state), (from_host, away)):
        for after, kind in ((to_here, "device"), (to_host, "pinned_host")):
            convert = lambda s, before=before, after=after: fse.convert_state(before, after, PARAMS, s)  # noqa: E731
            got = (jax.jit(convert) if jit else convert)(given)
            assert memories(got) == {kind}
            assert_same(got, want)


def test_unsupported_uses_of_host_memory_raise():
    with pytest.raises(ValueError, match="`memory_kind` must be 'device', 'pinned_host' or None, got 'disk'"):
        fse.Rule(memory_kind="disk")
    with pytest.raises(ValueError, match="for a wrapped transform a rule sets only the storage"):
        fse.quantize_state(optax.adam(1e-3), rules=HOST).init(PARAMS)
    tx = fse.row_sparse(fse.adamw8bit(1e-3, rules=HOST))
    rows = fse.SparseRows(jnp.array([1, 5, 130]), jnp.ones((3, 64)), 130)
    with pytest.raises(NotImplementedError, match="'embedding' are in host memory"):
        tx.update(GRADS | {"embedding": rows}, tx.init(PARAMS), PARAMS)


def tpu_step(leaves):
    """AdamW on arrays of 4096 x 4096 with moments in host memory, compiled for one chip with 16 GB."""
    if (devices := counted.devices_of("v5e")) is None:
        pytest.skip("libtpu is not installed: `make test EXTRAS=tpu`")
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    tx = fse.adamw8bit(1e-3, rules=HOST)
    params = {f"kernel_{k}": jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=here) for k in range(leaves)}

    def place(x):
        sharding = here.with_memory_kind("pinned_host") if x.ndim == 2 else here
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(place, jax.eval_shape(tx.init, params))
    step = jax.jit(lambda p, s, g: fse.fused_update(tx, g, s, p), donate_argnums=(0, 1))
    return step.lower(params, state, params).compile().memory_analysis()


def test_on_a_tpu_moments_are_transferred_and_do_not_stay_in_device_memory():
    memory = tpu_step(2)
    n = 2 * 2**24
    assert memory.host_argument_size_in_bytes / n == pytest.approx(2 + 8 / 256, abs=1e-3)
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes  # in place in host memory too
    assert memory.argument_size_in_bytes / n == pytest.approx(8, abs=1e-3)  # parameters and gradients
    assert memory.temp_size_in_bytes / n < 2.1 and memory.host_temp_size_in_bytes == 0


@pytest.mark.slow
def test_a_tpu_prefetches_no_more_moments_than_its_memory_can_hold():
    memory = tpu_step(116)  # parameters and gradients take 15.6 GB of 16, their moments would take 4
    assert memory.temp_size_in_bytes / (116 * 2**24) < 0.3
