"""Tests moments that are reset against moments in float32 that are set by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.tools import ALL_FP32, SMALL, assert_same_bits, build, every_optimizer, parameters, run

TX = fse.adamw8bit(1e-2, state_format=SMALL)
ROWS = jnp.arange(64) % 20 == 3
ELEMENTS = jax.random.uniform(jax.random.key(0), (64, 64)) < 0.05


@every_optimizer
@pytest.mark.parametrize("mask", [ROWS, ELEMENTS], ids=["rows", "elements"])
@pytest.mark.one_in(3)
def test_reset_elements_start_again_and_the_others_keep_their_moments(case, mask):
    tx, plain = build(case), build(case, rules=ALL_FP32)
    params, state = run(tx, parameters())
    where = {"kernel": mask, "norm": {"scale": False}, "wte": {"embedding": False}}
    found = fse.convert_state(tx, plain, params, fse.reset_moments(tx, state, params, where))
    before, start = fse.convert_state(tx, plain, params, state), plain.init(params)
    whole = np.broadcast_to(mask if mask.ndim == 2 else mask[:, None], (64, 64))
    for x, old, first in zip(*map(jax.tree.leaves, (found, before, start)), strict=True):
        if x.shape == (64, 64):
            np.testing.assert_array_equal(x[whole], first[whole])
            np.testing.assert_allclose(x[~whole], old[~whole], atol=0.02 * float(jnp.abs(old).max()))
        elif x.dtype != jnp.uint8:
            np.testing.assert_array_equal(x, old)


def test_what_is_not_reset_keeps_its_bits():
    params, state = run(TX, parameters())
    after = fse.reset_moments(TX, state, params, {"kernel": False, "norm": {"scale": False}, "wte": False})
    assert_same_bits(after, state)
    after = fse.reset_moments(TX, state, params, ["norm", "wte/embedding"])
    assert_same_bits(after[0].mu["kernel"], state[0].mu["kernel"])
    assert_same_bits(after[0].nu["norm"], TX.init(params)[0].nu["norm"])
    assert int(after[0].count) == 3
    holes = params | {"none": None}
    assert_same_bits(fse.reset_moments(TX, TX.init(holes), holes, True), TX.init(holes))
    everything = fse.reset_moments(TX, state, params, True)
    assert_same_bits(everything[0].mu, TX.init(params)[0].mu)


def test_rows_of_blocks_along_the_last_axis_leave_other_rows_bit_for_bit():
    tx = fse.adamw8bit(1e-2, state_format=fse.StateFormat(block_axis=-1, min_size=0))
    params, state = run(tx, parameters())
    after = fse.reset_moments(tx, state, params, lambda path: ROWS if path == "kernel" else False)
    for field in ("mu", "nu", "mu_absmax", "nu_absmax"):
        old, now = (getattr(s[0], field)["kernel"] for s in (state, after))
        np.testing.assert_array_equal(now[~ROWS], old[~ROWS])
        np.testing.assert_array_equal(now[ROWS], 0)


@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
def test_without_a_gradient_rows_that_were_reset_do_not_move(codec):
    tx = fse.adam8bit(1e-2, state_format=fse.StateFormat(codec, min_size=0))
    params, state = run(tx, parameters())
    state = fse.reset_moments(tx, state, params, {"kernel": ROWS, "norm": False, "wte": False})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert not updates["kernel"][ROWS].any() and updates["kernel"][~ROWS].any()


def test_it_runs_under_jit_with_masks_that_are_computed_there():
    params, state = run(TX, parameters())

    @jax.jit
    def reset(state, params, threshold):
        return fse.reset_moments(TX, state, params, jax.tree.map(lambda p: jnp.abs(p) < threshold, params))

    want = fse.reset_moments(TX, state, params, jax.tree.map(lambda p: jnp.abs(p) < 0.1, params))
    found = reset(state, params, 0.1)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-6, atol=1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_a_sharded_state_is_reset_to_the_same_bits_and_stays_sharded(kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    params, state = run(TX, parameters())
    where = {"kernel": ELEMENTS, "norm": False, "wte": False}
    want = fse.reset_moments(TX, state, params, where)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("a") if x.ndim == 2 else P())), params)
        there = jax.device_put(state, jax.tree.map(lambda x: x.sharding, fse.abstract_state(TX, placed)))
        found = fse.reset_moments(TX, there, placed, where)
    assert_same_bits(jax.device_get(found), jax.device_get(want))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(there)):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_remainders_and_records_stay_and_sums_of_gradients_are_reset():
    tx = optax.MultiSteps(fse.split_weights(TX), 2)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters())
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    after = fse.reset_moments(tx, state, params, ["kernel"])
    assert_same_bits(after.inner_opt_state.remainder, state.inner_opt_state.remainder)
    assert state.acc_grads["kernel"].any() and not after.acc_grads["kernel"].any()
    assert_same_bits(after.acc_grads["wte"], state.acc_grads["wte"])
    assert not after.inner_opt_state.inner_state[0].mu["kernel"].any()


@pytest.mark.parametrize("bits", [32, "bf16", "rowwise"])
def test_every_storage_is_reset(bits):
    tx = fse.adamw8bit(1e-2, rules=((".*", bits),))
    params, state = run(tx, parameters())
    after = fse.reset_moments(tx, state, params, {"kernel": ROWS, "norm": False, "wte": False})
    for field in ("mu", "nu"):
        old, now = (getattr(s[0], field)["kernel"] for s in (state, after))
        np.testing.assert_array_equal(now[ROWS], 0)
        np.testing.assert_allclose(now[~ROWS], old[~ROWS], rtol=1e-6)


def test_the_first_step_after_a_reset_is_as_long_as_the_docstring_says():
    tx, params = optax.adam(1.0), {"kernel": jnp.zeros((4, 4))}
    state, grads = tx.init(params), {"kernel": jnp.ones((4, 4))}
    state = (state[0]._replace(count=jnp.int32(20_000)), state[1])
    state = fse.reset_moments(tx, state, params, True)
    lengths = []
    for _ in range(30):
        updates, state = tx.update(grads, state, params)
        lengths.append(-float(updates["kernel"][0, 0]))
    assert lengths[0] == pytest.approx(3.16, abs=0.01)
    assert max(lengths) == pytest.approx(6.57, abs=0.02) and int(np.argmax(lengths)) == 11


def test_wrong_masks_are_errors_with_the_path():
    params, state = run(TX, parameters())

    def reset(where):
        return fse.reset_moments(TX, state, params, where)

    with pytest.raises(ValueError, match=r"mask of shape \(8,\) for 'kernel'.*\(64, 64\)"):
        reset({"kernel": jnp.ones(8, bool), "norm": False, "wte": False})
    with pytest.raises(TypeError, match="int32 for 'kernel'"):
        reset({"kernel": jnp.ones((64, 64), jnp.int32), "norm": False, "wte": False})
    with pytest.raises(TypeError, match=r"0\.5 for"):
        reset(0.5)
    with pytest.raises(ValueError, match="`where` names 'nowhere'"):
        reset(["nowhere"])
    with pytest.raises(ValueError, match="a pytree of masks"):
        reset({"kernel": True})
    with pytest.raises(ValueError, match="was not made by `tx`"):
        fse.reset_moments(fse.lion8bit(1e-2, state_format=SMALL), state, params, True)
