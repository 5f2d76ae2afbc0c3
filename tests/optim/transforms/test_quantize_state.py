"""Tests `quantize_state`: equality with adamw8bit, fields that are not quantized, frameworks, and errors."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed.optim.transforms.state_fields import MOMENTS
from tests.tools import (
    ALL_FP32,
    SMALL,
    as_pure,
    assert_nearly,
    assert_same_bits,
    gradients,
    is_codes,
    jitted,
    may_straddle,
    parameters,
    run,
    types,
)

STOCHASTIC = fse.StateFormat(rounding="stochastic", min_size=0)
DYNAMIC = fse.StateFormat("dynamic", min_size=0)


@functools.cache
def adamw(**options):
    return fse.quantize_state(optax.adamw(0.01, weight_decay=0.1), **{"state_format": SMALL} | options)


def assert_8bit(state):
    """Checks that moments of kernels are codes and nothing else is. Returns the QuantizedState inside the state."""
    is_ours = lambda x: isinstance(x, fse.QuantizedState)  # noqa: E731
    (found,) = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    leaves = jax.tree_util.tree_leaves_with_path(found.inner)
    assert any(is_codes(x) for _, x in leaves)
    assert all("kernel" in jax.tree_util.keystr(path) for path, x in leaves if is_codes(x))
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_format", [SMALL, DYNAMIC, STOCHASTIC, fse.StateFormat("linear", min_size=0)], ids=str)
@pytest.mark.one_in(4)
def test_quantized_adamw_equals_adamw8bit(state_format):
    params = parameters()
    ours, theirs = adamw(state_format=state_format), fse.adamw8bit(0.01, weight_decay=0.1, state_format=state_format)
    (new, state), (expected, expected_state) = run(ours, params, 5), run(theirs, params, 5)
    found = assert_8bit(state)
    mine = found.inner[0].mu, found.inner[0].nu, found.absmax["0.mu"], found.absmax["0.nu"]
    reference = expected_state[0]
    assert_nearly(mine, (reference.mu, reference.nu, reference.mu_absmax, reference.nu_absmax))
    for a, b in zip(jax.tree.leaves(mine[:2]), jax.tree.leaves((reference.mu, reference.nu)), strict=True):
        assert not is_codes(a) or np.mean(np.asarray(a) != np.asarray(b)) <= 1e-3
    assert_nearly(jax.tree.map(jnp.subtract, new, params), jax.tree.map(jnp.subtract, expected, params), rtol=1e-5)
    np.testing.assert_array_equal(found.format, reference.format)


def test_fp32_moments_equal_those_of_the_transform_bit_for_bit():
    params = parameters()
    theirs = optax.adamw(0.01, weight_decay=0.1)
    (new, state), (expected, expected_state) = run(adamw(rules=ALL_FP32), params), run(theirs, params)
    assert_same_bits((new, state.inner), (expected, expected_state))


def test_half_precision_updates_are_computed_in_float32():
    params = parameters("bfloat16")
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    tx, theirs = adamw(), optax.adamw(0.01, weight_decay=0.1)
    state, expected_state = tx.init(params), theirs.init(wide(params))
    assert state.inner[0].mu["norm"]["scale"].dtype == jnp.float32
    for i in range(3):
        grads = gradients(i, params)
        _, expected_state, expected = jitted(theirs)(wide(grads), expected_state, wide(params))
        params, state, updates = jitted(tx)(grads, state, params)
        assert_same_bits(updates["norm"], jax.tree.map(lambda u: u.astype(jnp.bfloat16), expected["norm"]))
    assert_8bit(state)


def test_a_rule_stores_moments_in_bfloat16():
    tx, params = adamw(rules=(("kernel", "bf16"),)), parameters()
    state = tx.init(params)
    _, after, _ = jitted(tx)(gradients(), state, params)
    assert after.inner[0].nu["kernel"].dtype == jnp.bfloat16
    assert types(after) == types(state)
    assert fse.describe(tx, params).rows[0].bits == "bf16"


def test_float64_parameters_keep_float64_moments():
    with jax.enable_x64(True):
        params = parameters("float64")
        tx = fse.quantize_state(optax.apply_if_finite(optax.novograd(0.1), 2), state_format=SMALL)
        state = tx.init(params)
        found = assert_8bit(state)
        assert found.inner.inner_state[0].mu["norm"]["scale"].dtype == jnp.float64
        assert types(jax.eval_shape(tx.update, params, state, params)) == types((params, state))


@pytest.mark.parametrize("state_format", [SMALL, DYNAMIC, STOCHASTIC], ids=str)
def test_moments_that_a_step_does_not_change_keep_their_codes(state_format):
    """For example, between the steps of MultiSteps codes are decoded and encoded again, and must not drift."""
    params = parameters()
    multi = optax.MultiSteps(optax.adamw(0.01), 3).gradient_transformation()
    tx = fse.quantize_state(multi, state_format=state_format)
    params, state = run(tx, params, 3)
    assert_8bit(state)
    _, after = run(tx, params, 2, state=state)
    assert_same_bits(after.inner.inner_opt_state, state.inner.inner_opt_state)
    assert_same_bits(after.absmax, state.absmax)


def test_moments_of_an_element_that_overflows_are_reset():
    params = {"kernel": jnp.ones((64, 64))}
    tx = adamw()
    grads = {"kernel": jnp.ones((64, 64)).at[0, 0].set(1e30)}
    _, state, _ = jitted(tx)(grads, tx.init(params), params)
    assert [x["kernel"][0, 0] for x in (state.inner[0].mu, state.inner[0].nu)] == [0, 0]
    assert state.inner[0].mu["kernel"][0, 1] != 0


def test_stochastic_rounding_needs_a_step_count():
    with pytest.raises(ValueError, match=r"state of `tx` has no field count, step_count, t\. A schedule"):
        fse.quantize_state(optax.rmsprop(0.1), state_format=STOCHASTIC)
    params = {"kernel": jnp.ones((64, 64)) * jnp.linspace(0.1, 1.0, 64)[None]}
    tx = fse.quantize_state(optax.rmsprop(optax.constant_schedule(0.1)), state_format=STOCHASTIC)
    _, state, _ = jitted(tx)(params, tx.init(params), params)
    plain = fse.quantize_state(optax.rmsprop(optax.constant_schedule(0.1)), state_format=SMALL)
    _, nearest, _ = jitted(plain)(params, plain.init(params), params)
    difference = np.abs(np.asarray(state.inner[0].nu["kernel"], int) - np.asarray(nearest.inner[0].nu["kernel"], int))
    assert difference.max() == 1


# --- fields that are not quantized -----------------------------------------------------------------------------------


def test_parameters_in_a_state_are_not_quantized():
    params = parameters()
    for tx, name in ((optax.contrib.schedule_free_adamw(0.1), "z"), (optax.contrib.prodigy(1.0), "params0")):
        state = fse.quantize_state(tx, state_format=SMALL).init(params)
        assert_8bit(state)
        assert_same_bits(getattr(state.inner, name), params)
    state = fse.quantize_state(optax.adan(0.1), state_format=SMALL).init(params)
    assert state.inner[0].g["kernel"].dtype == jnp.float32
    ours = optax.lookahead(fse.quantize_state(optax.adam(0.1), state_format=SMALL), 2, 0.5)
    assert_8bit(ours.init(optax.LookaheadParams(params, params)).fast_state)


def test_lookahead_cannot_be_wrapped():
    params = optax.LookaheadParams.init_synced(parameters())
    with pytest.raises(ValueError, match="has no moments to store"):
        fse.quantize_state(optax.lookahead(optax.adam(0.1), 2, 0.5)).init(params)


def test_describe_lists_fields_that_are_not_quantized_and_the_reasons():
    params = parameters()
    report = fse.describe(fse.quantize_state(optax.contrib.schedule_free_adamw(0.1), state_format=SMALL), params)
    assert report.stayed == (("z", 4 * (64 * 64 + 8 + 128), "parameters"),)
    assert "stayed as it is: z, 16,928 bytes, parameters" in str(report).splitlines()
    assert [row.path for row in report.rows] == ["kernel", "norm/scale", "wte/embedding"]
    assert report.rows[0].implementation == "decoded for base_optimizer_state.0.nu"
    novograd = fse.quantize_state(optax.novograd(0.1), {"mu": "signed", "nu": "unsigned"}, state_format=SMALL)
    assert fse.describe(novograd, params).stayed == ()  # scalars
    sm3 = fse.describe(fse.quantize_state(optax.sm3(0.1), state_format=SMALL), params)
    assert [(field.field, field.reason) for field in sm3.stayed] == [("0.mu", "not in `moments`")]
    around = fse.describe(optax.masked(adamw(), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), params)
    assert [row.path for row in around.rows] == ["kernel", "wte/embedding"]


def test_a_field_can_be_named_by_its_state():
    tx = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    moments = {"trace": "keep", "ScaleByAdamState.mu": "signed", "nu": "unsigned"}
    state = fse.quantize_state(tx, moments, state_format=SMALL).init(parameters())
    assert list(state.absmax) == ["1.mu", "1.nu"]
    assert state.inner[0].trace["kernel"].dtype == jnp.float32


def test_parameters_can_have_the_names_of_moments():
    params = {"mu": {"kernel": jnp.ones((64, 64))}, "kernel": jnp.ones((64, 64)), "trace": {"nu": jnp.ones((32, 64))}}
    tx = fse.quantize_state(optax.contrib.schedule_free_adamw(0.1), state_format=SMALL)
    state = tx.init(params)
    assert list(state.absmax) == ["base_optimizer_state.0.nu"]
    _, after, _ = jitted(tx)(params, state, params)
    assert types(after) == types(state)
    assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)


@pytest.mark.parametrize("params", [jnp.ones((64, 64)), [jnp.ones((64, 64)), jnp.ones(())], {}, {"a": None}], ids=str)
def test_every_tree_of_parameters_works(params):
    tx = adamw()
    state = tx.init(params)
    _, after, _ = jitted(tx)(params, state, params)
    assert types(after) == types(state)
    assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)


def test_complex_integer_and_missing_leaves_are_not_quantized():
    params = {"complex": jnp.ones((64, 64), jnp.complex64), "kernel": jnp.ones((64, 64)), "none": None}
    tx, theirs = adamw(), optax.adamw(0.01, weight_decay=0.1)
    state = tx.init(params)
    assert_8bit(state)
    _, after, updates = jitted(tx)(params, state, params)
    assert types(after) == types(state)
    assert_same_bits(updates["complex"], jitted(theirs)(params, theirs.init(params), params)[2]["complex"])
    numbers = {"kernel": jnp.ones((64, 64)), "int8": jnp.ones((64, 64), jnp.int8)}
    momentum = fse.quantize_state(optax.trace(0.5), state_format=SMALL)
    assert momentum.init(numbers).absmax["trace"]["int8"].shape == (1, 1)


# --- optax and frameworks --------------------------------------------------------------------------------------------


def test_masked_and_partition_work_outside_and_inside():
    params, grads = parameters(), gradients()
    labels = {"kernel": "ours", "norm": {"scale": "theirs"}, "wte": {"embedding": "ours"}}
    around = optax.partition({"ours": adamw(), "theirs": optax.sgd(0.1)}, labels)
    inside = fse.quantize_state(
        optax.partition({"ours": optax.adamw(0.01, weight_decay=0.1), "theirs": optax.sgd(0.1)}, labels),
        state_format=SMALL,
    )
    results = []
    for tx in (around, inside, optax.masked(adamw(), jax.tree.map(lambda label: label == "ours", labels))):
        state = tx.init(params)
        _, after, updates = jitted(tx)(grads, state, params)
        assert_8bit(after)
        assert types(after) == types(state)
        specs = jax.tree.map(lambda _: P("x"), params)
        is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        optax.tree.map_params(tx, lambda _, spec: spec, state, specs, is_leaf=is_masked)
        results.append(updates)
    assert_nearly(*results[:2])
    assert_same_bits(results[2]["norm"], grads["norm"])


def test_hyperparameters_inside_can_be_changed():
    params = parameters()
    tx = fse.quantize_state(optax.inject_hyperparams(optax.adamw)(0.01), state_format=SMALL)
    state = tx.init(params)
    state.inner.hyperparams["learning_rate"] = jnp.zeros_like(state.inner.hyperparams["learning_rate"])
    new, after, _ = jitted(tx)(gradients(), state, params)
    assert_8bit(after)
    assert_same_bits(new, params)
    rules = ((fse.where(lambda path, shape: len(shape) == 2), 8),)
    around = optax.inject_hyperparams(fse.quantize_state)(optax.adam(0.1), None, rules=rules, state_format=SMALL)
    assert not around.init(params).hyperparams


def test_extra_arguments_are_passed_on():
    tx = fse.quantize_state(optax.contrib.momo(1.0), state_format=SMALL)
    params = parameters()
    updates, _ = tx.update(gradients(), tx.init(params), params, value=1.0, unheard_of=2)
    assert types(updates) == types(params)
    plain = adamw()
    plain.update(gradients(), plain.init(params), params, unheard_of=2)


def test_update_works_without_params():
    tx = fse.quantize_state(optax.scale_by_adam(), state_format=SMALL)
    params, grads = parameters(), gradients()
    with_params, without = (
        jax.jit(tx.update)(grads, tx.init(params), params),
        jax.jit(tx.update)(grads, tx.init(params)),
    )
    assert_8bit(without[1])
    assert_same_bits(with_params, without)


def test_scan_vmap_and_donation_work():
    members = [parameters(seed=i) for i in range(2)]
    params, grads = (
        jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (members, [gradients(i) for i in range(2)])
    )
    tx = adamw()
    state = jax.vmap(tx.init)(params)

    @jax.jit
    def scanned(state):
        return jax.lax.scan(lambda s, _: (jax.vmap(tx.update)(grads, s, params)[1], None), state, None, 2)[0]

    after = scanned(state)
    for i, member in enumerate(members):
        expected = tx.init(member)
        for _ in range(2):
            expected = jitted(tx)(gradients(i), expected, member)[1]
        assert_nearly(jax.tree.map(lambda x, i=i: x[i], after), expected)
    state, params = tx.init(members[0]), jax.tree.map(jnp.copy, members[0])
    jax.jit(tx.update, donate_argnums=(0, 1))(jax.tree.map(jnp.copy, gradients()), state, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_init_accepts_shapes_instead_of_arrays():
    params = parameters()
    tx = adamw()
    assert_same_bits(tx.init(jax.eval_shape(lambda: params)), tx.init(params))
    assert_same_bits(jax.jit(tx.init)(params), tx.init(params))
    assert types(jax.eval_shape(tx.init, params)) == types(tx.init(params))


class Model(nnx.Module):
    def __init__(self, names=None):
        self.kernel = nnx.Param(jnp.ones((64, 96)), **({} if names is None else {"out_sharding": names}))
        self.bias = nnx.Param(jnp.ones(96))
        self.fixed = nnx.Param(jnp.ones((96, 64)), optim_bits=32)


@nnx.jit
def nnx_step(model, optimizer):
    loss = lambda m: jnp.mean((jnp.ones((4, 64)) @ m.kernel @ m.fixed) ** 2) + jnp.mean(m.bias**2)  # noqa: E731
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def nnx_leaves(optimizer):
    leaves = jax.tree_util.tree_leaves_with_path(as_pure(optimizer.opt_state).inner)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


@pytest.mark.parametrize("make", [optax.adamw, optax.contrib.schedule_free_adamw, optax.contrib.muon])
def test_an_nnx_optimizer_trains(make):
    model = Model()
    optimizer = nnx.Optimizer(model, fse.quantize_state(make(0.01), state_format=SMALL), wrt=nnx.Param)
    values = [nnx_step(model, optimizer) for _ in range(4)]
    assert values[-1] < values[0]
    codes = [name for name, x in nnx_leaves(optimizer).items() if is_codes(x)]
    assert codes and all("kernel" in name for name in codes)


def test_an_nnx_optimizer_keeps_its_shardings_on_a_mesh():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = Model((None, "model"))
        optimizer = nnx.Optimizer(model, adamw(), wrt=nnx.Param)
        before = {name: x.sharding for name, x in nnx_leaves(optimizer).items() if "kernel" in name}
        nnx_step(model, optimizer)
        nnx_step(model, optimizer)
        after = nnx_leaves(optimizer)
        assert before["0.mu.kernel"].spec == P(None, "model")
        for name, sharding in before.items():
            assert after[name].sharding.is_equivalent_to(sharding, 2), name


def test_linen_boxes_keep_axis_names_that_divide():
    boxed = {
        "kernel": meta.Partitioned(jnp.ones((64, 96)), names=(None, "model")),
        "bias": nn.LogicallyPartitioned(jnp.ones(96), names=("model",)),
    }
    tx = adamw()
    state = tx.init(boxed)
    assert isinstance(state.inner[0].mu["kernel"], meta.Partitioned)
    assert state.inner[0].mu["kernel"].value.dtype == jnp.int8
    own = fse.adamw8bit(0.01, state_format=SMALL).init(boxed)[0]
    specs = nn.get_partition_spec(state)
    assert specs.absmax["0.mu"] == nn.get_partition_spec(own.mu_absmax)
    _, after, _ = jitted(tx)(boxed, state, boxed)
    assert types(after) == types(state)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.one_in(4)
def test_the_state_is_sharded_like_the_parameter_and_stays_so(kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        place = lambda tree: jax.tree.map(  # noqa: E731
            lambda x: jax.device_put(x, NamedSharding(mesh, P("a", "b") if x.shape[-1] == 256 else P())), tree
        )
        params = place(parameters(kernel=(64, 256)))
        tx = adamw()
        step = jax.jit(lambda *args: jitted(tx)(*args))
        for init in (tx.init, jax.jit(tx.init)) if kind == AxisType.Explicit else (tx.init,):
            state = init(params)
            assert_8bit(state)
            new, after, _ = step(place(gradients(like=params)), state, params)
            for s in (state, after):
                for x in (s.inner[0].mu, s.inner[0].nu):
                    assert x["kernel"].sharding.is_equivalent_to(params["kernel"].sharding, 2)
                assert s.absmax["0.mu"]["kernel"].sharding.shard_shape((64, 8)) == (32, 2)
            if kind == AxisType.Explicit:
                assert types(after) == types(state) and types(new) == types(params)
        expected, expected_state = run(tx, parameters(kernel=(64, 256)), 1)
        assert_nearly(jax.device_get((new, after)), jax.device_get((expected, expected_state)))


@pytest.mark.parametrize("around", ["jit", "scan", "cond"])
@may_straddle
def test_codes_stay_sharded_if_blocks_straddle_devices(around):
    """Three blocks of 256 are sharded over four devices, and array types have no shardings."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    cut = NamedSharding(mesh, P("a", "b"))
    tx = adamw(state_format=fse.StateFormat(block_size=256, block_axis=-1, min_size=0))
    params = {"kernel": jax.device_put(jnp.ones((64, 768)), cut)}
    update = {
        "jit": lambda state: tx.update(params, state, params)[1],
        "scan": lambda state: jax.lax.scan(lambda s, _: (tx.update(params, s, params)[1], None), state, None, 2)[0],
        "cond": lambda state: jax.lax.cond(
            state.inner[0].count >= 0, lambda s: tx.update(params, s, params)[1], lambda s: s, state
        ),
    }[around]
    state = jax.jit(update)(tx.init(params))
    for moment in (state.inner[0].mu, state.inner[0].nu):
        assert is_codes(moment["kernel"]) and moment["kernel"].sharding.is_equivalent_to(cut, 2)


def test_orbax_restores_every_bit(tmp_path):
    _, state = run(adamw(), parameters(), 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert_same_bits(restored, assert_8bit(state))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_moments_must_be_signed_unsigned_or_keep():
    roundings = {f"{sign}, {rounding}" for sign in ("signed", "unsigned") for rounding in ("nearest", "dither")}
    assert set(MOMENTS.values()) == {"keep", *roundings}
    with pytest.raises(ValueError, match="'mu': 'sign'"):
        fse.quantize_state(optax.adam(0.1), {"mu": "sign"})


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"mu": "signed", "velocity": "signed"}, "`moments` names velocity, but the fields"),
        ({"ScaleByLionState.mu": "signed"}, "`moments` names ScaleByLionState.mu, but"),
        ({"count": "signed"}, "no moments to store"),
        ({"mu": "keep"}, "no moments to store"),
    ],
    ids=str,
)
def test_moments_that_name_no_field_or_store_nothing_are_refused(moments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fse.quantize_state(optax.adam(0.1), moments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fse.adamw8bit(0.1),
        lambda: optax.chain(optax.clip(1.0), fse.scale_by_lion8bit(rules=(("lm_head", 32),))),
        lambda: optax.MultiSteps(fse.adam8bit(0.1), 2).gradient_transformation(),
        adamw,
    ],
)
def test_8bit_optimizers_are_refused(make):
    with pytest.raises(ValueError, match="is an 8-bit optimizer of this library"):
        fse.quantize_state(make())


@pytest.mark.parametrize("rule", ["rowwise", fse.Rule(8, lr_scale=0.1), fse.Rule(b1=0.5)], ids=str)
def test_rules_that_only_8bit_optimizers_support_are_refused(rule):
    with pytest.raises(ValueError, match="a rule sets only the storage"):
        fse.quantize_state(optax.adam(0.1), rules=(("kernel", rule),))


def test_rules_that_match_nothing_and_unsupported_metadata_are_refused():
    with pytest.raises(ValueError, match="match no parameter: 'lm_head'"):
        adamw(rules=(("lm_head", 32),)).init(parameters())
    params = {"kernel": nnx.Param(jnp.ones((64, 64)), optim_bits="rowwise")}
    with pytest.raises(ValueError, match="asks for 'rowwise'"):
        adamw().init(params)


def test_a_transform_that_fits_only_its_own_parameters_is_checked_in_init():
    """A mask that is a tree fits only its own parameters, so the transform cannot be tried when it is wrapped."""
    mask = {"kernel": True, "norm": {"scale": False}, "wte": {"embedding": False}}
    demanding = lambda tx: optax.GradientTransformation(  # noqa: E731
        lambda p: (p["kernel"], tx.init(p))[1], tx.update
    )
    fse.quantize_state(optax.masked(optax.adam(0.1), mask))
    late = fse.quantize_state(demanding(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="has no moments to store"):
        late.init(parameters())


def test_states_of_other_transforms_are_refused():
    params, tx = parameters(), adamw()
    state = tx.init(params)
    with pytest.raises(TypeError, match="must be a QuantizedState"):
        tx.update(params, optax.adamw(0.01).init(params), params)
    with pytest.raises(ValueError, match="with those that made the state"):
        adamw(state_format=DYNAMIC).update(params, state, params)
    with pytest.raises(ValueError, match=r"scales of shape \(64, 2\), but rules"):
        adamw(state_format=fse.StateFormat(block_size=16, min_size=0)).update(params, state, params)
    with pytest.raises(ValueError, match="but `rules` has"):
        adamw(rules=(("kernel", 32),)).update(params, state, params)
    with pytest.raises(ValueError, match=r"of shape \(32, 64\)"):
        small = parameters(kernel=(32, 64))
        tx.update(small, state, small)
    with pytest.raises(ValueError, match="of the same parameters and `moments`"):
        adamw(moments=frozen({"mu": "signed"})).update(params, state, params)
    with pytest.raises(TypeError, match="must be an optax transform"):
        fse.quantize_state(optax.adamw)


def test_fused_update_refuses_a_quantized_transform():
    params, tx = parameters(), adamw()
    with pytest.raises(TypeError, match="'quantize_state' hides what is in it"):
        fse.fused_update(tx, params, tx.init(params), params)


class frozen(dict):
    """A dictionary that can be an argument of a cached function."""

    def __hash__(self):
        return hash(tuple(self.items()))


def test_parameters_can_be_python_numbers():
    params = {"kernel": jnp.ones((64, 64)), "scale": 1.0}
    tx = fse.quantize_state(optax.adamw(0.1), state_format=SMALL)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["scale"].shape == () and is_codes(state.inner[0].mu["kernel"])


def test_one_table_of_moments_works_for_several_transforms():
    table = {"mu": "signed", "trace": "signed", "nu": "unsigned"}
    for tx in (optax.adamw(0.1), optax.sgd(0.1, momentum=0.9)):
        fse.quantize_state(tx, moments=table).init(parameters())
