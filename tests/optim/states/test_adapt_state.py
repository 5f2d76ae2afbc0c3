"""Tests adapted states against moments in float32 that NumPy adapts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.tools import ALL_FP32, SMALL, assert_same_bits, build, every_optimizer, gradients, jitted, run

TX = fse.adamw8bit(1e-2, rules=(("embedding", 8),), state_format=SMALL)


def params_of(vocabulary=48, width=64, hidden=96, layers=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"wte": {"embedding": (vocabulary, width)}, "head": {"kernel": (width, vocabulary)}}
    shapes |= {f"h_{i}": {"kernel": (width, hidden), "norm": {"scale": (width,)}} for i in range(layers)}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=is_shape)


def trained(tx, params, steps=3):
    """Parameters and state after some steps."""
    return run(tx, params, steps)


def in_float32(tx, plain, params, state):
    """The state of the same optimizer with all moments in float32."""
    return fse.convert_state(tx, plain, params, state)


def stacked(params, layers):
    return jax.tree.map(lambda *x: jnp.stack(x), *(params[name] for name in layers))


def assert_decodes_to(tx, plain, params, state, want, atol=2e-2):
    """Checks moments against float32 ones: as exact as codes of 8 bits are, relative to the largest in the array."""
    found = in_float32(tx, plain, params, state)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(y.dtype, jnp.floating) and y.ndim:
            np.testing.assert_allclose(x, y, atol=atol * float(jnp.abs(y).max(initial=1e-30)), rtol=0)
        elif y.dtype == jnp.int32:
            np.testing.assert_array_equal(x, y)


def corner(old, start):
    """`start` with `old` at the indices that both have."""
    out = np.array(start)
    shared = tuple(slice(0, min(n, m)) for n, m in zip(old.shape, start.shape))
    out[shared] = np.asarray(old)[shared]
    return jnp.asarray(out, start.dtype)


RESIZED = {
    "more rows": {"vocabulary": 80},
    "fewer rows": {"vocabulary": 40},
    "more hidden units": {"hidden": 160},
    "everything smaller": {"vocabulary": 24, "width": 32, "hidden": 48},
    "rows more and units fewer": {"vocabulary": 64, "hidden": 64},
}


@every_optimizer
@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.one_in(7)
def test_kept_elements_have_their_moments_and_new_ones_start(case, name):
    tx, plain = build(case, rules=(("embedding", 8),)), build(case, rules=ALL_FP32)
    params, state = trained(tx, params_of())
    new = params_of(**RESIZED[name])
    adapted, report = fse.adapt_state(tx, state, params, new)
    assert jax.tree.structure(adapted) == jax.tree.structure(tx.init(new))
    before, start = in_float32(tx, plain, params, state), plain.init(new)
    want = jax.tree.map(lambda x, y: x if x.shape == y.shape else corner(x, y), before, start)
    assert_decodes_to(tx, plain, new, adapted, want)
    changed = {row.name for row in report.rows if row.change == "resized"}
    assert changed
    for row in report.rows:
        assert row.error is not None and row.error < 0.02, row


def test_codes_are_copied_where_blocks_stay():
    params, state = trained(TX, params_of(vocabulary=64))
    new = params_of(vocabulary=128)
    adapted, report = fse.adapt_state(TX, state, params, new)
    for field in ("mu", "nu", "mu_absmax", "nu_absmax"):
        old, now = (getattr(s[0], field)["wte"]["embedding"] for s in (state, adapted))
        np.testing.assert_array_equal(now[:64], old)
    again = {row.name for row in report.rows if row.encoded_again}
    assert "0/mu/wte/embedding" not in again
    assert_same_bits(adapted[0].mu["h_0"], state[0].mu["h_0"])
    assert int(adapted[0].count) == 3


@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
def test_nothing_changes_if_the_parameters_did_not(codec):
    tx = fse.adamw8bit(1e-2, state_format=fse.StateFormat(codec, min_size=0))
    params, state = trained(tx, params_of())
    adapted, report = fse.adapt_state(tx, state, params, params)
    assert_same_bits(adapted, state)
    assert {row.change for row in report.rows} == {"kept"}
    assert str(report) == f"{len(report.rows)} values kept"


@pytest.mark.parametrize("codec", ["root", "dynamic"])
def test_layers_are_stacked_and_unstacked_bit_for_bit(codec):
    tx = fse.adamw8bit(1e-2, state_format=fse.StateFormat(codec, min_size=0))
    params, state = trained(tx, params_of(layers=3))
    layers = [f"h_{i}" for i in range(3)]
    new = {name: x for name, x in params.items() if name not in layers} | {"h": stacked(params, layers)}
    together, report = fse.adapt_state(tx, state, params, new, stack={"h": layers})
    rows = {row.name: row for row in report.rows}
    assert rows["0/mu/h/kernel"].change == "stacked" and not any(row.encoded_again for row in report.rows)
    assert "0/mu/h_0/kernel" in rows["0/mu/h/kernel"].origin
    back, report = fse.adapt_state(tx, together, new, params, unstack={"h": layers})
    assert {row.change for row in report.rows} == {"kept", "unstacked"}
    assert_same_bits(back, state)


def test_one_layer_is_a_stack_too():
    params, state = trained(TX, params_of(layers=1))
    new = {name: x for name, x in params.items() if name != "h_0"} | {"h": stacked(params, ["h_0"])}
    together, _ = fse.adapt_state(TX, state, params, new, stack={"h": ["h_0"]})
    back, _ = fse.adapt_state(TX, together, new, params, unstack={"h": ["h_0"]})
    assert_same_bits(back, state)


@pytest.mark.parametrize(
    "renames",
    [
        {"h_0": "blocks/0", "h_1/kernel": "blocks/1/kernel", "h_1": "blocks/1"},
        lambda path: path.replace("h_", "blocks/"),
    ],
    ids=["paths", "a function"],
)
def test_renamed_parameters_keep_their_moments(renames):
    params, state = trained(TX, params_of())
    new = {name: x for name, x in params.items() if not name.startswith("h_")}
    new["blocks"] = {str(i): params[f"h_{i}"] for i in range(2)}
    adapted, report = fse.adapt_state(TX, state, params, new, renames=renames)
    for i in range(2):
        assert_same_bits(adapted[0].nu["blocks"][str(i)], state[0].nu[f"h_{i}"])
    assert {row.change for row in report.rows} == {"kept", "renamed"}


def test_new_parameters_start_and_missing_ones_are_named():
    params, state = trained(TX, params_of())
    new = {name: x for name, x in params.items() if name != "h_1"} | {"adapter": {"kernel": jnp.ones((64, 32))}}
    adapted, report = fse.adapt_state(TX, state, params, new)
    assert_same_bits(adapted[0].mu["adapter"], TX.init(new)[0].mu["adapter"])
    by_change = {change: {row.name for row in report.rows if row.change == change} for change in ("new", "dropped")}
    assert by_change["new"] == {"0/mu/adapter/kernel", "0/nu/adapter/kernel"}
    assert by_change["dropped"] == {f"0/{m}/h_1/{leaf}" for m in ("mu", "nu") for leaf in ("kernel", "norm/scale")}
    for name in (*by_change["new"], *by_change["dropped"]):
        assert name in str(report)


@pytest.mark.parametrize("bits", [8, 32, "rowwise", "bf16"])
def test_rows_are_chosen_by_their_numbers(bits):
    tx = fse.adamw8bit(1e-2, rules=(("embedding", bits),), state_format=SMALL)
    params, state = trained(tx, params_of(vocabulary=64))
    rows = np.array([5, -1, 3, 3, 63, -1] + [0] * 58)
    adapted, report = fse.adapt_state(tx, state, params, params, kept_rows={"wte/embedding": rows})
    for field in ("mu", "nu"):
        old, now = (getattr(s[0], field)["wte"]["embedding"] for s in (state, adapted))
        start = getattr(tx.init(params)[0], field)["wte"]["embedding"]
        np.testing.assert_array_equal(now[rows >= 0], old[rows[rows >= 0]])
        np.testing.assert_array_equal(now[rows < 0], start[rows < 0])
    assert {row.change for row in report.rows if row.name.endswith("wte/embedding")} == {"resized"}


def test_initial_values_of_an_optimizer_are_those_of_new_elements():
    tx = fse.adagrad8bit(1e-2, initial_accumulator_value=0.25, state_format=SMALL, rules=ALL_FP32)
    params, state = trained(tx, params_of())
    adapted, _ = fse.adapt_state(tx, state, params, params_of(vocabulary=60))
    (field,) = ("sum_of_squares",)
    found = jax.tree.leaves(jax.tree.map(lambda s: getattr(s, field), adapted, is_leaf=lambda s: hasattr(s, field)))
    assert any(x.shape == (60, 64) and bool((x[48:] == 0.25).all()) for x in found)


# --- what is around an optimizer --------------------------------------------------------------------------------------


def test_remainders_of_split_weights_follow():
    tx = fse.split_weights(TX)
    params, state = trained(tx, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params_of(vocabulary=64)))
    weights = fse.master_weights(tx, params, state)
    new = params | {"wte": {"embedding": jnp.pad(params["wte"]["embedding"], ((0, 64), (0, 0)))}}
    new |= {"head": {"kernel": jnp.pad(params["head"]["kernel"], ((0, 0), (0, 64)))}}
    adapted, _ = fse.adapt_state(tx, state, params, new)
    grown = fse.master_weights(tx, new, adapted)
    np.testing.assert_array_equal(grown["wte"]["embedding"][:64], weights["wte"]["embedding"])
    np.testing.assert_array_equal(grown["head"]["kernel"][:, :64], weights["head"]["kernel"])
    np.testing.assert_array_equal(grown["wte"]["embedding"][64:], 0)
    fse.fused_update(tx, new, adapted, new)


def test_new_rows_of_a_table_have_no_steps_to_catch_up_on():
    tx = fse.row_sparse(fse.adamw8bit(1e-2, weight_decay=0.5, state_format=SMALL), "catch_up")
    params = {"wte": {"embedding": jnp.ones((16, 64))}}

    def rows(ids, size):
        return {"wte": {"embedding": fse.SparseRows.of_lookups(jnp.array(ids), jnp.ones((len(ids), 64)), size)}}

    state = tx.init(params)
    for ids in ([1, 2], [3], [1]):
        updates, state = tx.update(rows(ids, 16), state, params)
        params = optax.apply_updates(params, updates)
    new = {"wte": {"embedding": jnp.ones((20, 64)).at[:16].set(params["wte"]["embedding"])}}
    adapted, _ = fse.adapt_state(tx, state, params, new)
    np.testing.assert_array_equal(adapted.last["wte"]["embedding"][:16], state.last["wte"]["embedding"])
    np.testing.assert_array_equal(adapted.last["wte"]["embedding"][16:], 3)
    # A row that was there catches up on the decay of three steps, a new one on none.
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, rows([9, 18], 20)), adapted, new)
    touched = optax.apply_updates(new, tx.update(rows([9, 18], 20), adapted, new)[0])["wte"]["embedding"]
    fresh = optax.apply_updates(params, tx.update(rows([9], 16), state, params)[0])["wte"]["embedding"]
    np.testing.assert_allclose(touched[9], fresh[9], rtol=1e-6)
    assert float(touched[18, 0]) > float(touched[9, 0])
    assert updates is not None


def test_wrappers_of_optax_and_schedules_follow():
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    inner = optax.chain(fse.percentile_clipping(10), fse.adamw8bit(schedule, state_format=SMALL))
    tx = optax.MultiSteps(inner, 2)
    params = params_of()
    state = tx.init(params)
    for i in range(5):
        updates, state = jax.jit(tx.update)(gradients(i, params), state, params)
        params = optax.apply_updates(params, updates)
    new = params_of(vocabulary=80)
    adapted, report = fse.adapt_state(tx, state, params, new)
    np.testing.assert_array_equal(adapted.acc_grads["wte"]["embedding"][:48], state.acc_grads["wte"]["embedding"])
    np.testing.assert_array_equal(adapted.acc_grads["wte"]["embedding"][48:], 0)
    assert int(adapted.mini_step) == 1 and int(adapted.gradient_step) == 2
    assert_same_bits(adapted.inner_opt_state[0], state.inner_opt_state[0])  # the history of norms
    assert "acc_grads/wte/embedding" in str(report)
    tx.update(new, adapted, new)


@pytest.mark.parametrize("tx", [optax.adamw(1e-2), fse.quantize_state(optax.adam(1e-2), state_format=SMALL)])
def test_optimizers_of_optax_are_adapted_too(tx):
    params, state = trained(tx, params_of(vocabulary=64))
    adapted, report = fse.adapt_state(tx, state, params, params_of(vocabulary=96))
    assert jax.tree.structure(adapted) == jax.tree.structure(tx.init(params_of(vocabulary=96)))
    assert sum(row.change == "resized" for row in report.rows) == 4


def test_another_optimizer_continues():
    params, state = trained(optax.adamw(1e-2), params_of(vocabulary=64))
    new = params_of(vocabulary=96)
    adapted, _ = fse.adapt_state(optax.adamw(1e-2), state, params, new, new_tx=TX)
    both = fse.convert_state(optax.adamw(1e-2), TX, new, fse.adapt_state(optax.adamw(1e-2), state, params, new)[0])
    assert_same_bits(adapted, both)


def test_rules_of_another_optimizer_may_name_the_new_paths():
    before = fse.adamw8bit(1e-2, rules=(("old", 32),), state_format=SMALL)
    after = fse.adamw8bit(1e-2, rules=(("new", "bf16"),), state_format=SMALL)
    params, state = trained(before, {"old": jnp.ones((64, 64)), "other": jnp.ones((64, 64))})
    new = {"new": params["old"], "other": params["other"]}
    adapted, report = fse.adapt_state(before, state, params, new, new_tx=after, renames={"old": "new"})
    assert adapted[0].mu["new"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(adapted[0].mu["new"], np.float32), state[0].mu["old"], rtol=2.0**-8)
    assert_same_bits(adapted[0].mu["other"], state[0].mu["other"])
    assert {row.change for row in report.rows} == {"kept", "renamed"}


# --- shapes, shardings, checkpoints, jit ------------------------------------------------------------------------------


def test_shapes_give_shapes_into_which_a_checkpoint_is_restored(tmp_path):
    params, state = trained(TX, params_of())
    new = params_of(vocabulary=80)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state, new))
    found, report = fse.adapt_state(TX, shapes[1], shapes[0], shapes[2])
    adapted, known = fse.adapt_state(TX, state, params, new)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), adapted)
    assert [row._replace(error=None) for row in report.rows] == [row._replace(error=None) for row in known.rows]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at", adapted)
        checkpointer.wait_until_finished()
        assert_same_bits(checkpointer.restore(tmp_path / "at", found), adapted)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_a_sharded_state_is_adapted_to_the_same_bits_and_stays_sharded(kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    params, state = trained(TX, params_of(vocabulary=64))
    new = params_of(vocabulary=128)
    want, _ = fse.adapt_state(TX, state, params, new)

    def place(tree):
        def one(x):
            return jax.device_put(x, NamedSharding(mesh, P("a") if x.ndim == 2 else P()))

        return jax.tree.map(one, tree)

    with jax.set_mesh(mesh):
        old, grown = place(params), place(new)
        where = jax.tree.map(lambda x: x.sharding, fse.abstract_state(TX, old))
        found, _ = fse.adapt_state(TX, jax.device_put(state, where), old, grown)
    assert_same_bits(jax.device_get(found), jax.device_get(want))
    for x, s in zip(jax.tree.leaves(found), jax.tree.leaves(fse.abstract_state(TX, grown))):
        assert x.sharding.is_equivalent_to(s.sharding, x.ndim)


def test_it_runs_under_jit():
    params, state = trained(TX, params_of())
    new = params_of(vocabulary=80)
    found = jax.jit(lambda state, params, new: fse.adapt_state(TX, state, params, new)[0])(state, params, new)
    want, _ = fse.adapt_state(TX, state, params, new)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-6, atol=1)


# --- random changes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_sequence_of_random_changes_keeps_every_moment_that_is_kept(seed):
    """Each change may encode a moment again, with the error of one rounding."""
    rng = np.random.default_rng(seed)
    plain = fse.adamw8bit(1e-2, rules=ALL_FP32)
    params, state = trained(TX, params_of())
    want = in_float32(TX, plain, params, state)
    for number in range(1, 5):
        change = rng.choice(["resize", "rename", "stack", "unstack", "new"])
        options, new = {}, dict(params)
        layers = sorted(name for name in params if name.startswith("h_"))
        if change == "resize":
            new["wte"] = {"embedding": jnp.zeros((int(rng.integers(8, 128)), 64))}
        elif change == "rename" and layers:
            new[f"h_{90 + number}"] = new.pop(layers[0])
            options = {"renames": {layers[0]: f"h_{90 + number}"}}
        elif change == "stack" and len(layers) > 1 and "all" not in params:
            new = {name: x for name, x in params.items() if name not in layers} | {"all": stacked(params, layers)}
            options = {"stack": {"all": layers}}
        elif change == "unstack" and "all" in params:
            names = [f"h_{10 * number + i}" for i in range(len(params["all"]["kernel"]))]
            own = {name: jax.tree.map(lambda x, i=i: x[i], params["all"]) for i, name in enumerate(names)}
            new = {name: x for name, x in params.items() if name != "all"} | own
            options = {"unstack": {"all": names}}
        else:
            new[f"new_{number}"] = {"kernel": jnp.ones((64, 32))}
        state, _ = fse.adapt_state(TX, state, params, new, **options)
        want, _ = fse.adapt_state(plain, want, params, new, **options)  # in float32 nothing is rounded
        assert_decodes_to(TX, plain, new, state, want, atol=0.02 * number)
        params = new


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_adapted_is_an_error_with_its_path():
    params, state = trained(TX, params_of())
    changed = params | {"head": {"kernel": jnp.ones((64, 6, 8))}}

    def adapt(new=params, **options):
        return fse.adapt_state(TX, state, params, new, **options)

    with pytest.raises(ValueError, match=r"'head/kernel' has shape \(64, 6, 8\).*number of axes"):
        adapt(changed)
    with pytest.raises(ValueError, match="`renames` names 'nowhere'"):
        adapt(renames={"nowhere": "wte"})
    with pytest.raises(ValueError, match="the same path"):
        adapt(renames={"h_0": "h_1"})
    with pytest.raises(ValueError, match="`stack` names 'nowhere'"):
        adapt(stack={"nowhere": ["h_0"]})
    with pytest.raises(ValueError, match="`unstack` names 'nowhere'"):
        adapt(unstack={"nowhere": ["h_0"]})
    with pytest.raises(TypeError, match="must give strings, got 3"):
        adapt(renames=lambda path: 3)
    with pytest.raises(ValueError, match=r"`stack` has 2 layers for 'h/kernel', which has shape \(3, 64, 96\)"):
        adapt({"h": jax.tree.map(lambda x: jnp.stack([x] * 3), params["h_0"])}, stack={"h": ["h_0", "h_1"]})
    with pytest.raises(ValueError, match=r"`unstack` has 1 layers for 'h/kernel', which had shape \(2, 64, 96\)"):
        both = {"h": stacked(params, ["h_0", "h_1"])}
        plain = optax.sgd(0.1, momentum=0.9)
        fse.adapt_state(plain, plain.init(both), both, {"a": params["h_0"]}, unstack={"h": ["a"]})
    with pytest.raises(ValueError, match="in a call of its own"):
        new = {"wte": params["wte"], "h": stacked(params, ["h_0", "h_1"])}
        adapt(new, stack={"h": ["h_0", "h_1"]}, kept_rows={"h/kernel": [0, 1]})
    with pytest.raises(ValueError, match="integers, one per row"):
        adapt(kept_rows={"wte/embedding": [1, 2]})
    with pytest.raises(ValueError, match="row numbers of its old shape"):
        adapt(kept_rows={"wte/embedding": [48] * 48})
    with pytest.raises(ValueError, match="'nowhere'"):
        adapt(kept_rows={"nowhere": [0]})
    with pytest.raises(ValueError, match="was not made by `tx`"):
        fse.adapt_state(TX, state, params_of(vocabulary=50), params)
    with pytest.raises(ValueError, match="several shapes"):
        uneven = params | {"h_1": {"kernel": jnp.ones((64, 97)), "norm": params["h_1"]["norm"]}}
        new = {"h": stacked(params, ["h_0", "h_1"])}
        fse.adapt_state(optax.sgd(0.1), optax.sgd(0.1).init(uneven), uneven, new, stack={"h": ["h_0", "h_1"]})
    with pytest.raises(TypeError, match="optax"):
        fse.adapt_state("adam", state, params, params)


def test_a_run_that_was_interrupted_before_and_after_the_change_has_the_same_bits_on_another_mesh(tmp_path):
    old, new = params_of(vocabulary=64), params_of(vocabulary=128)

    def steps(params, state, numbers):
        for i in numbers:
            params, state, _ = jitted(TX)(gradients(i, params), state, params)
        return params, state

    def grown(params):
        return jax.tree.map(lambda start, x: corner(x, start), new, params)

    def sharded(mesh, tree):
        """Shapes of a tree with shardings."""

        def one(x):
            spec = P("a") if x.ndim == 2 and x.shape[0] % (32 * mesh.size) == 0 else P()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, tree)

    params, state = steps(old, TX.init(old), range(3))
    adapted, _ = fse.adapt_state(TX, state, params, grown(params))
    want = steps(grown(params), adapted, range(3, 5))

    first, second = (jax.make_mesh((n,), ("a",), axis_types=(AxisType.Auto,)) for n in (2, 4))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "before", (params, state))
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(tmp_path / "before", sharded(first, (params, state)))
        adapted, _ = fse.adapt_state(TX, state, params, grown(params))
        checkpointer.save(tmp_path / "after", (grown(params), adapted))
        checkpointer.wait_until_finished()
        shapes, _ = fse.adapt_state(TX, *map(shapes_of, (state, params, new)))
        found = checkpointer.restore(tmp_path / "after", sharded(second, (shapes_of(new), shapes)))
    assert_same_bits(jax.device_get(steps(*found, range(3, 5))), jax.device_get(want))


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(("old", "new"), [("rowwise", 32), ("rowwise", "bf16"), (32, "rowwise"), ("bf16", "rowwise")])
def test_another_storage_by_a_rename_is_a_conversion(old, new):
    before, after = (fse.adam8bit(1e-2, rules=((".*", bits),)) for bits in (old, new))
    params, state = trained(before, {"old": jnp.ones((64, 32))})
    adapted, _ = fse.adapt_state(before, state, params, {"new": params["old"]}, new_tx=after, renames={"old": "new"})
    want = fse.convert_state(before, after, params, state)
    for found, wanted in ((adapted[0].mu["new"], want[0].mu["old"]), (adapted[0].nu["new"], want[0].nu["old"])):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=2.0**-7)


@pytest.mark.parametrize(("old", "new"), [(24, 32), (32, 24)])
def test_remainders_of_other_bits_are_converted(old, new):
    before, after = (fse.split_weights(fse.adamw8bit(1e-2), bits) for bits in (old, new))
    params, state = trained(before, {"kernel": jnp.full((64, 64), 0.1, jnp.bfloat16)})
    adapted, _ = fse.adapt_state(before, state, params, params, new_tx=after)
    assert_same_bits(adapted, fse.convert_state(before, after, params, state))


def test_hyper_parameters_and_counts_belong_to_no_parameter():
    tx = optax.inject_hyperparams(fse.adamw8bit)(learning_rate=1e-3)
    params, state = trained(tx, {"b1": jnp.ones(8), "b2": jnp.ones(8)})
    adapted, _ = fse.adapt_state(tx, state, params, params, renames={"b1": "b2", "b2": "b1"})
    assert_same_bits(adapted.hyperparams, state.hyperparams)
    state.hyperparams["b1"] = jnp.float32(0.8)
    assert float(fse.reset_moments(tx, state, params, ["b1"]).hyperparams["b1"]) == pytest.approx(0.8)
    plain = optax.adam(1e-3)
    params, state = trained(plain, {"kernel": jnp.ones((8, 8))})
    adapted, _ = fse.adapt_state(plain, state, params, params | {"count": jnp.ones(3)})
    assert int(adapted[0].count) == 3


def test_records_of_a_table_that_is_renamed_and_grown_are_up_to_date():
    tx = fse.row_sparse(fse.adamw8bit(1e-2, state_format=SMALL), "catch_up")
    params = {"wte": {"embedding": jnp.ones((8, 64))}}
    rows = {"wte": {"embedding": fse.SparseRows.of_lookups(jnp.array([0, 1]), jnp.ones((2, 64)), 8)}}
    state = tx.init(params)
    for _ in range(5):
        _, state = tx.update(rows, state, params)
    new = {"tokens": {"embedding": jnp.ones((10, 64))}}
    adapted, _ = fse.adapt_state(tx, state, params, new, renames={"wte": "tokens"})
    np.testing.assert_array_equal(adapted.last["tokens"]["embedding"], [5, 5, 0, 0, 0, 0, 0, 0, 5, 5])
