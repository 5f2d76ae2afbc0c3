"""Tests percentile clipping against the steps of bitsandbytes in NumPy, and inside the wrappers of optax."""

import functools
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed.optim.transforms.percentile_clipping import _percentile
from tests.tools import assert_nearly, assert_same_bits, gradients, parameters, types

PARAMS = parameters()
either_norm = pytest.mark.parametrize("per_parameter", [False, True], ids=["global", "per_parameter"])


class Bitsandbytes:
    """Does the steps of bitsandbytes up to 0.49 for one parameter, in its kernel and around it."""

    def __init__(self, percentile):
        self.percentile, self.gnorm_vec, self.step = percentile, np.zeros(100), 0

    def __call__(self, grad):
        self.step += 1
        squared = np.sum(np.asarray(grad, np.float64) ** 2)
        if self.step == 1:
            self.gnorm_vec[:] = squared
        else:
            self.gnorm_vec[self.step % 100] = squared
        current = np.sqrt(self.gnorm_vec[self.step % 100])
        clip_value = np.sqrt(np.sort(self.gnorm_vec)[self.percentile])
        return grad * (clip_value / current if current > clip_value else 1.0)


def norms(n, seed=0):
    return np.exp(np.random.default_rng(seed).normal(size=n))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def stepped(tx):
    return jax.jit(lambda grads, state: tx.update(grads, state))


def run(tx, steps, state=None):
    """Returns the updates of gradients with these norms, and the last state."""
    state, out = tx.init({"a": jnp.ones(4)}) if state is None else state, []
    for norm in steps:
        updates, state = stepped(tx)({"a": jnp.full(4, norm / 2, jnp.float32)}, state)
        out.append(float(2 * updates["a"][0]))
    return np.array(out), state


@pytest.mark.parametrize("percentile", [0, 5, 50, 99])
@either_norm
@pytest.mark.one_in(5)
def test_every_update_equals_that_of_bitsandbytes(percentile, per_parameter):
    tx = fse.percentile_clipping(percentile, per_parameter=per_parameter)
    state = tx.init(PARAMS)
    theirs = jax.tree.map(lambda _: Bitsandbytes(percentile), PARAMS) if per_parameter else Bitsandbytes(percentile)
    clipped = 0
    for i, norm in enumerate(norms(230)):
        grads = jax.tree.map(lambda g, norm=norm: norm * g, gradients(i % 7))
        updates, state = stepped(tx)(grads, state)
        if per_parameter:
            expected = jax.tree.map(lambda clip, g: clip(np.asarray(g)), theirs, grads)
        else:
            expected = theirs(flat(grads))
        np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-5)
        clipped += np.any(flat(updates) != flat(grads))
    assert (
        clipped == 0 if percentile == 99 else 0 < clipped < 230
    )  # 99 selects the largest of 100 norms, its own included
    assert int(state.count) == 230


def test_at_100_percent_nothing_is_clipped():
    out, state = run(fse.percentile_clipping(100), norms(120))
    np.testing.assert_array_equal(out, norms(120).astype(np.float32))
    assert int(state.count) == 120


@pytest.mark.parametrize(("percentile", "history", "index"), [(5, 10, 0), (50, 10, 5), (29, 100, 29), (99, 7, 6),
                                                              (12.5, 8, 1), (50, 1, 0), (57, 1000, 570),
                                                              (4.996, 100, 4)])  # fmt: skip
def test_the_percentile_is_computed_over_the_history(percentile, history, index):
    """With a full ring buffer, a larger norm is clipped to the entry at floor(percentile n / 100)."""
    tx = fse.percentile_clipping(percentile, history)
    ring = norms(history) ** 2
    state = tx.init({"a": jnp.ones(4)})._replace(
        count=jnp.int32(history - 1), squared_norms=jnp.asarray(ring, jnp.float32)
    )
    (out,), _ = run(tx, [1e3], state)
    expected = np.sqrt(np.sort(np.append(ring[1:], 1e6))[index])  # slot `history % history` is overwritten
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@either_norm
def test_a_gradient_that_is_not_clipped_keeps_its_bits(per_parameter):
    tx = fse.percentile_clipping(per_parameter=per_parameter)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        grads = {"a": jnp.asarray([1e-3, -0.0, 0.1, 7], dtype), "b": jnp.zeros(3, dtype)}
        updates, _ = stepped(tx)(grads, tx.init(grads))
        assert_same_bits(updates, grads)


def test_integers_that_float32_cannot_hold_are_kept():
    tx, grads = fse.percentile_clipping(), {"a": jnp.asarray([2**24 + 1, -3], jnp.int32)}
    assert_same_bits(tx.update(grads, tx.init(grads))[0], grads)


# --- special numbers ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("first", [True, False], ids=["at_first", "later"])
@pytest.mark.one_in(4)
def test_a_nonfinite_gradient_passes_and_is_not_recorded(bad, first):
    tx = fse.percentile_clipping(5)
    _, state = run(tx, [] if first else norms(20))
    grads = {"a": jnp.asarray([1, bad, 2, 3], jnp.float32)}
    updates, after = stepped(tx)(grads, state)
    assert_same_bits(updates, grads)
    assert_same_bits(after.squared_norms, state.squared_norms)
    assert int(after.count) == int(state.count) + 1
    out, after = run(tx, [2.0, 50.0], after)
    assert np.isfinite(after.squared_norms).all() and np.all(out <= 2.0 + 1e-6)


def test_per_parameter_only_the_nonfinite_gradient_is_not_clipped():
    tx = fse.percentile_clipping(5, per_parameter=True)
    state = tx.init({"a": jnp.ones(4), "b": jnp.ones(4)})
    grads = {"a": jnp.ones(4), "b": jnp.ones(4)}
    _, state = tx.update(grads, state)
    updates, after = tx.update({"a": 8 * grads["a"], "b": grads["b"].at[0].set(jnp.nan)}, state)
    np.testing.assert_array_equal(updates["a"], 1.0)
    np.testing.assert_array_equal(updates["b"], [np.nan, 1, 1, 1])
    np.testing.assert_array_equal(after.squared_norms[:, 1], 4.0)


@pytest.mark.parametrize("spike", [1e20, 1e30, 3e38])
def test_a_gradient_whose_square_overflows_is_clipped(spike):
    tx = fse.percentile_clipping(5)
    _, state = run(tx, [1.0])
    grads = {"a": jnp.asarray([spike, 0, 0, -spike], jnp.float32)}
    updates, state = stepped(tx)(grads, state)
    expected = 0.0 if spike == 3e38 else 0.5**0.5  # the norm is too large for float32
    np.testing.assert_allclose(updates["a"], [expected, 0, 0, -expected], rtol=1e-6)
    assert np.isfinite(state.squared_norms).all()
    assert np.max(state.squared_norms) == np.finfo(np.float32).max


def test_an_overflowing_first_gradient_passes():
    out, state = run(fse.percentile_clipping(5), [1e25, 1.0])
    assert np.isfinite(state.squared_norms).all()
    np.testing.assert_allclose(out[1], 1.0, rtol=1e-6)
    assert np.isfinite(out[0]) and out[0] > 1e19


def test_zero_gradients_do_not_divide_by_zero():
    out, state = run(fse.percentile_clipping(5), [0.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(
        out, [0.0, 0.0, 1.0, 0.0]
    )  # in bitsandbytes a history of zeros zeroes all later gradients
    assert np.isfinite(state.squared_norms).all()


def test_the_norm_of_half_precision_is_summed_in_float32():
    """In bfloat16 a sum of ones stops at 256, and in float16 the square of 300 is infinite."""
    for dtype, value in ((jnp.bfloat16, 1.0), (jnp.float16, 300.0)):
        tx = fse.percentile_clipping(5)
        grads = {"a": jnp.full(5000, value, dtype)}
        updates, state = tx.update(grads, tx.init(grads))
        np.testing.assert_allclose(state.squared_norms, 5000 * value**2, rtol=1e-6)
        updates, state = tx.update({"a": grads["a"] * 2}, state)
        assert updates["a"].dtype == dtype
        np.testing.assert_array_equal(updates["a"], grads["a"])


# --- the contract of an optax transform ---

TREES = {
    "empty": {},
    "array": jnp.ones((3, 4)),
    "scalar": {"a": jnp.float32(2.0)},
    "no_elements": {"a": jnp.zeros((0, 4)), "b": jnp.ones(2)},
    "none": {"a": jnp.ones(2), "b": None},
    "hidden": {"a": jnp.ones(2), "b": optax.MaskedNode()},
    "numpy": {"a": np.ones(3, np.float32)},
    "mixed": {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16), "c": jnp.ones(2, jnp.complex64)},
    "nnx": {"a": nnx.Param(jnp.ones((2, 2)))},
}


@either_norm
@pytest.mark.parametrize("kind", TREES)
@pytest.mark.one_in(10)
def test_every_kind_of_tree_keeps_its_types(kind, per_parameter):
    tx, grads = fse.percentile_clipping(per_parameter=per_parameter), TREES[kind]
    state = tx.init(grads)
    assert state.squared_norms.shape == ((100, len(jax.tree.leaves(grads))) if per_parameter else (100,))
    assert types(jax.eval_shape(tx.init, grads)) == types(state)
    for update in (tx.update, jax.jit(tx.update)):
        _, warm = update(grads, state)
        updates, after = update(jax.tree.map(lambda g: 2 * g, grads), warm)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        assert types((updates, after)) == types((jax.tree.map(jnp.asarray, grads), state))
        for u, g in zip(*map(jax.tree.leaves, (updates, grads))):
            np.testing.assert_allclose(u, g, rtol=1e-6)


def test_complex_numbers_count_with_their_magnitude():
    tx, grads = fse.percentile_clipping(), {"a": jnp.asarray([3 + 4j, 0])}
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state.squared_norms, 25, rtol=1e-6)


@pytest.mark.slow
@either_norm
def test_float64_stays_float64(per_parameter):
    with jax.enable_x64(True):
        grads = {"a": jnp.asarray([0.1, 0.2]), "b": jnp.ones(3, jnp.float32)}
        tx = fse.percentile_clipping(np.float64(5), per_parameter=per_parameter)
        updates, state = tx.update(grads, tx.init(grads))
        assert_same_bits(updates, grads)
        assert types(state) == types(tx.init(grads))
        injected = optax.inject_hyperparams(fse.percentile_clipping)(per_parameter=per_parameter)
        assert_same_bits(jax.jit(injected.update)(grads, injected.init(grads))[0], grads)


def test_a_second_call_compiles_nothing():
    tx = fse.percentile_clipping()
    step, state = jax.jit(lambda *args: tx.update(*args)), tx.init(PARAMS)
    for i in range(3):
        _, state = step(gradients(i), state)
    assert step._cache_size() <= 1


def test_extra_arguments_are_ignored():
    tx = fse.percentile_clipping()
    expected = tx.update(PARAMS, tx.init(PARAMS))
    assert_same_bits(tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0), expected)


@either_norm
@pytest.mark.one_in(4)
def test_a_scan_equals_a_loop(per_parameter):
    tx = fse.percentile_clipping(50, 10, per_parameter=per_parameter)
    batches = [gradients(i) for i in range(15)]
    state, loop = tx.init(PARAMS), []
    for grads in batches:
        updates, state = stepped(tx)(grads, state)
        loop.append(updates)
    body = lambda state, grads: tx.update(grads, state)[::-1]  # noqa: E731
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    found, scanned = jax.jit(lambda s: jax.lax.scan(body, s, stack(batches)))(tx.init(PARAMS))
    assert_nearly((found, scanned), (state, stack(loop)))


@either_norm
@pytest.mark.one_in(4, start=1)
def test_vmap_equals_a_loop_over_members(per_parameter):
    tx = fse.percentile_clipping(50, 4, per_parameter=per_parameter)
    members = [gradients(i) for i in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *members)
    state = jax.vmap(tx.init)(stack)
    step = jax.jit(jax.vmap(lambda g, s: tx.update(g, s)))
    _, state = step(stack, state)
    updates, state = step(jax.tree.map(lambda g: 4 * g, stack), state)
    for i, grads in enumerate(members):
        _, own = tx.update(grads, tx.init(grads))
        expected = tx.update(jax.tree.map(lambda g: 4 * g, grads), own)
        assert_nearly(jax.tree.map(lambda x, i=i: x[i], (updates, state)), expected)


def test_update_runs_in_a_conditional():
    tx = fse.percentile_clipping()
    maybe = jax.jit(lambda flag, g, s: jax.lax.cond(flag, lambda: tx.update(g, s), lambda: (g, s)))
    assert_same_bits(maybe(False, PARAMS, tx.init(PARAMS)), (PARAMS, tx.init(PARAMS)))
    assert_nearly(maybe(True, PARAMS, tx.init(PARAMS)), stepped(tx)(PARAMS, tx.init(PARAMS)))


@either_norm
@pytest.mark.one_in(4)
def test_tree_map_params_finds_no_parameters_in_the_state(per_parameter):
    tx = optax.chain(fse.percentile_clipping(per_parameter=per_parameter), optax.trace(0.9))
    state = tx.init(PARAMS)
    specs = jax.tree.map(lambda p: P("x") if p.ndim == 2 else P(), PARAMS)
    mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None)
    assert mapped == (fse.PercentileClippingState(None, None), optax.TraceState(specs))
    assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)


def test_a_state_survives_serialization():
    tx = fse.percentile_clipping(5, 10)
    _, state = run(tx, norms(15))
    data = flax.serialization.to_bytes(state)
    assert_same_bits(jax.tree.map(jnp.asarray, flax.serialization.from_bytes(run(tx, [])[1], data)), state)


@either_norm
@pytest.mark.one_in(4, start=1)
def test_in_multi_steps_only_the_mean_gradient_counts(per_parameter):
    tx = fse.percentile_clipping(per_parameter=per_parameter)
    multi = optax.MultiSteps(tx, 2)
    state, step = multi.init(PARAMS), jax.jit(lambda g, s: multi.update(g, s, PARAMS))
    for _ in range(4):
        _, state = step(PARAMS, state)
    assert int(state.inner_opt_state.count) == 2
    expected = stepped(tx)(PARAMS, stepped(tx)(PARAMS, tx.init(PARAMS))[1])[1]
    assert_nearly(state.inner_opt_state, expected)


@either_norm
@pytest.mark.one_in(4)
def test_masked_gradients_do_not_count(per_parameter):
    tx = fse.percentile_clipping(5, per_parameter=per_parameter)
    masked = optax.masked(tx, {"a": True, "b": False})
    grads = {"a": jnp.ones(4), "b": jnp.full(4, 1e6)}
    updates, state = jax.jit(masked.update)(grads, masked.init(grads))
    assert_same_bits(updates, grads)
    np.testing.assert_array_equal(state.inner_state.squared_norms, 4.0)


def test_a_chain_keeps_the_fused_path():
    tx = fse.chain(fse.percentile_clipping(5), fse.adamw8bit(1e-3, state_format=fse.StateFormat(min_size=0)))
    params, state = fse.fused_update(tx, gradients(), tx.init(PARAMS), PARAMS)
    assert int(state[0].count) == 1 and types(params) == types(PARAMS)


# --- inject_hyperparams ---


@either_norm
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.one_in(5)
def test_the_percentile_can_be_injected_and_changed(per_parameter, jitted):
    injected = optax.inject_hyperparams(fse.percentile_clipping)(5, per_parameter=per_parameter)
    grads = {"a": jnp.ones(4)}
    state = (jax.jit(injected.init) if jitted else injected.init)(grads)
    assert set(state.hyperparams) == {"percentile"}
    step = jax.jit(lambda g, s: injected.update(g, s))
    _, state = step(grads, state)
    updates, after = step({"a": 3 * grads["a"]}, state)
    np.testing.assert_allclose(updates["a"], 1.0, rtol=1e-6)
    state.hyperparams["percentile"] = jnp.full_like(state.hyperparams["percentile"], 100)
    updates, _ = step({"a": 3 * grads["a"]}, state)
    np.testing.assert_allclose(updates["a"], 3.0)
    assert step._cache_size() <= 1
    assert types(after) == types(state)


def test_the_percentile_can_follow_a_schedule():
    schedule = lambda count: jnp.where(count < 2, 100.0, 0.0)  # noqa: E731
    tx = optax.inject_hyperparams(fse.percentile_clipping)(schedule, history=8)
    out, _ = run(tx, [1.0, 3.0, 3.0])
    np.testing.assert_allclose(out, [1, 3, 1])


def test_every_integer_percentile_is_exact_when_it_is_traced():
    """XLA divides by 100 through its reciprocal, by which 29 percent of 100 would be 28."""
    ring = jnp.asarray(np.arange(1, 101), jnp.float32) ** 2
    index = jax.jit(lambda p: jax.vmap(lambda p: _percentile(ring, p))(p))
    for percent in (jnp.arange(100), jnp.arange(100.0)):
        np.testing.assert_array_equal(index(percent), ring)
    assert np.isinf(index(jnp.array([100]))).all()


def test_an_injected_history_needs_an_init_that_is_not_traced():
    injected = optax.inject_hyperparams(fse.percentile_clipping)(5, history=10)
    state = injected.init(PARAMS)
    assert state.inner_state.squared_norms.shape == (10,)
    _, after = jax.jit(injected.update)(gradients(), state)
    assert types(after) == types(state)
    with pytest.raises(TypeError, match=r'`history` must be a concrete integer.*static_args=\("history",\)'):
        jax.jit(injected.init)(PARAMS)
    static = optax.inject_hyperparams(fse.percentile_clipping, static_args=("history",))(5, history=10)
    numpys = optax.inject_hyperparams(fse.percentile_clipping)(5, history=np.int64(10))
    for tx in (static, numpys):
        state = jax.jit(tx.init)(PARAMS)
        assert state.inner_state.squared_norms.shape == (10,)
        assert types(jax.jit(tx.update)(gradients(), state)[1]) == types(state)


def test_the_default_history_is_that_of_bitsandbytes():
    assert inspect.signature(fse.percentile_clipping).parameters["history"].default == 100


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"percentile": -1}, ValueError, r"`percentile` must be in \[0, 100\], in percent, got -1"),
        ({"percentile": 100.5}, ValueError, r"`percentile` must be in \[0, 100\], in percent, got 100.5"),
        ({"percentile": float("nan")}, ValueError, "got nan"),
        ({"percentile": "5"}, TypeError, "`percentile` must be a number, got '5'"),
        ({"percentile": True}, TypeError, "`percentile` must be a number, got True"),
        ({"percentile": optax.constant_schedule(5)}, TypeError, "For a schedule use optax.inject_hyperparams"),
        ({"history": 0}, ValueError, "`history` must be at least 1, got 0"),
        ({"history": 1.5}, TypeError, "`history` must be an integer, got 1.5"),
        ({"history": True}, TypeError, "`history` must be an integer, got True"),
        ({"history": None}, TypeError, "`history` must be an integer, got None"),
    ],
)
def test_errors_name_the_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        fse.percentile_clipping(**arguments)


def test_a_state_of_other_parameters_is_refused():
    tx = fse.percentile_clipping(per_parameter=True)
    with pytest.raises(ValueError, match="The gradients have 3 leaves, but the state has norms of shape"):
        tx.update(PARAMS, tx.init({"a": jnp.ones(2)}))
    with pytest.raises(ValueError, match="the same parameters and `per_parameter`"):
        tx.update(PARAMS, fse.percentile_clipping().init(PARAMS))


# --- meshes ---


@either_norm
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.one_in(5)
def test_sharded_gradients_have_the_same_norm(kind, per_parameter):
    tx = fse.percentile_clipping(per_parameter=per_parameter)
    batches = [jax.tree.map(lambda g, i=i: (1 + i) * g, gradients(i)) for i in range(3)]
    expected_state, expected = tx.init(PARAMS), None
    for grads in batches:
        expected, expected_state = stepped(tx)(grads, expected_state)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        spec = jax.tree.map(lambda _: NamedSharding(mesh, P()), PARAMS) | {"kernel": NamedSharding(mesh, P("a", "b"))}
        params = jax.device_put(PARAMS, spec)
        state, step = tx.init(params), jax.jit(lambda g, s: tx.update(g, s))
        before = types(state)
        for grads in batches:
            updates, state = step(jax.device_put(grads, spec), state)
        assert updates["kernel"].sharding.is_equivalent_to(spec["kernel"], 2)
        assert types(state) == before
    assert_nearly((updates, state), (expected, expected_state), rtol=1e-5)  # sums are computed in another order
