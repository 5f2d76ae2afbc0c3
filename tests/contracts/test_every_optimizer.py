"""Tests every optimizer of tests/cases.py: optax's contract, and optax's numbers if nothing is in 8 bits."""

import dataclasses
import functools
import inspect
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.codecs import table
from flax_stable_embed.optim.engine.options import Options
from tests.cases import OPTIMIZERS
from tests.tools import (
    ALL_FP32,
    SMALL,
    UNUSUAL_OPTIONS,
    assert_8bit,
    assert_equal,
    assert_nearly,
    assert_same_bits,
    build,
    build_theirs,
    core,
    every_kind_of_optimizer,
    every_optimizer,
    first_moment,
    gradients,
    halves,
    is_codes,
    jitted,
    jitted_fused,
    moments,
    parameters,
    run,
    takes,
    their_moment,
    types,
)
from tests.tools import options_of_engines as options_of_engines

STORAGES = [*itertools.product(("root", "dynamic", "linear"), ("nearest", "stochastic"))]


def with_every_storage(cases):
    """Every optimizer in every storage. `make test` runs one of the six for each optimizer, and all six in total."""
    return pytest.mark.parametrize(
        ("case", "codec", "rounding"),
        [
            pytest.param(case, *storage, marks=[] if (k - n) % 6 == 0 else pytest.mark.slow)
            for n, case in enumerate(cases)
            for k, storage in enumerate(STORAGES)
        ],
        ids=lambda value: getattr(value, "name", value),
    )


every_optimizer_and_storage = with_every_storage(OPTIMIZERS)
with_weight_decay = pytest.mark.parametrize(
    "case", [case for case in OPTIMIZERS if takes(case, "weight_decay")], ids=lambda case: case.name
)


@functools.cache
def without_decay(case, **options):
    """The case's optimizer without weight decay, because decay also moves parameters whose gradient is zero."""
    hyper = case.hyper | ({"weight_decay": 0.0} if takes(case, "weight_decay") else {})
    return case.ours(**hyper, **{"state_format": SMALL} | options)


def test_every_public_optimizer_is_swept():
    public = {name for name in dir(fse) if name.endswith("8bit")}
    swept = {case.ours.__name__ for case in OPTIMIZERS} | {case.half.__name__ for case in OPTIMIZERS}
    assert public == swept


# --- the contract of an optax transform ----------------------------------------------------------------------------


@every_optimizer
def test_order_and_defaults_of_arguments_equal_those_of_optax(case):
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (case.ours, case.theirs))
    kinds = [[(p.name, p.default, p.kind) for p in parameters] for parameters in (ours, theirs)]
    assert kinds[0][: len(theirs)] == kinds[1]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@every_optimizer
def test_the_state_has_the_structure_of_the_optax_state(case):
    ours, theirs = build(case).init(parameters()), build_theirs(case).init(parameters())
    found = assert_8bit(case, ours)
    assert isinstance(ours, tuple) and len(ours) == len(theirs)
    at = [i for i, x in enumerate(ours) if x is found]
    assert len(at) == 1
    rest = lambda state: tuple(x for i, x in enumerate(state) if i != at[0])  # noqa: E731
    assert_same_bits(rest(ours), rest(theirs))
    assert set(type(theirs[at[0]])._fields) <= {*found._fields}
    for name in moments(case):
        assert jax.tree.map(jnp.shape, getattr(found, name)) == jax.tree.map(jnp.shape, parameters())
        assert jax.tree.map(jnp.ndim, getattr(found, f"{name}_absmax")) == jax.tree.map(jnp.ndim, parameters())


@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_extra_arguments_are_ignored(case):
    params, grads = parameters(), gradients()
    tx = build(case)
    expected = jitted(tx)(grads, tx.init(params), params)
    updates, state = jax.jit(lambda *args: tx.update(*args, value=1.0, unheard_of=2))(grads, tx.init(params), params)
    assert_8bit(case, state)
    assert_nearly((optax.apply_updates(params, updates), state, updates), expected)
    new, state = jax.jit(lambda *args: fse.fused_update(tx, *args, value=1.0, unheard_of=2))(
        grads, tx.init(params), params
    )
    assert_nearly((new, state), expected[:2])
    ours, _ = halves(case)
    with_extra = jax.jit(lambda g, s, p: optax.with_extra_args_support(ours).update(g, s, p, value=1.0))
    assert_8bit(case, with_extra(grads, ours.init(params), params)[1])


@every_kind_of_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.one_in(7)
def test_a_second_call_compiles_nothing(case, dtype):
    params = parameters(dtype)
    tx = build(case)
    # New functions, because `jax.jit` of the same function shares its cache with other tests.
    step, fused = jax.jit(lambda *args: tx.update(*args)), jax.jit(lambda *args: fse.fused_update(tx, *args))
    grads, state = gradients(like=params), tx.init(params)
    for _ in range(3):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert step._cache_size() <= 1
    assert_8bit(case, state)
    state = tx.init(params)
    for _ in range(3):
        params, state = fused(grads, state, params)
    assert fused._cache_size() <= 1


@every_optimizer
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.one_in(5)
def test_types_do_not_change(case, dtype):
    params = parameters(dtype)
    for tx in (build(case), halves(case)[0]):
        state = tx.init(params)
        if dtype != "complex64":
            assert_8bit(case, state)
        updates, new = jax.eval_shape(tx.update, params, state, params)
        assert types(new) == types(state)
        assert types(updates) == types(params)
    new, state = jax.eval_shape(
        functools.partial(fse.fused_update, build(case)), params, build(case).init(params), params
    )
    assert (types(new), types(state)) == (types(params), types(build(case).init(params)))


@every_kind_of_optimizer
def test_gradients_may_have_another_dtype_than_parameters(case):
    params = parameters()
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients())
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), half)
    tx = build(case)
    low, high = (jitted(tx)(g, tx.init(params), params) for g in (half, wide))
    assert_8bit(case, low)
    assert_nearly(low, high)
    params = parameters("bfloat16")
    updates, state = jax.eval_shape(tx.update, wide, tx.init(params), params)
    assert_8bit(case, state)
    assert types(updates) == types(params)


@pytest.mark.parametrize("case", [case for case in OPTIMIZERS if not case.sums], ids=lambda case: case.name)
@pytest.mark.one_in(7)
def test_scale_by_transforms_work_without_params(case):
    ours, _ = halves(case)
    params, grads = parameters(), gradients()
    with_params = jax.jit(ours.update)(grads, ours.init(params), params)
    without = jax.jit(ours.update)(grads, ours.init(params))
    assert_8bit(case, without[1])
    assert_same_bits(with_params, without)


@every_kind_of_optimizer
@pytest.mark.parametrize("which", ["whole", "half"])
@pytest.mark.one_in(7)
def test_hyperparameters_can_be_injected(case, which):
    """Static options are passed on unchanged, including a predicate in the rules. Numbers can be changed later."""
    rules = ((fse.where(lambda path, shape: shape == (64, 64)), fse.Rule(8, fse.StateFormat("dynamic", min_size=0))),)
    hyper = case.hyper if which == "whole" else {k: v for k, v in case.hyper.items() if k not in case.only_whole}
    options = {"state_format": SMALL, "rules": rules, "implementation": "xla", "skip_nonfinite": False}
    factory = case.ours if which == "whole" else case.half
    plain, injected = factory(**hyper, **options), optax.inject_hyperparams(factory)(**hyper, **options)
    params, grads = parameters(), gradients()
    state = jax.jit(injected.init)(params)
    assert set(options).isdisjoint(state.hyperparams)
    expected, expected_state = jax.jit(plain.update)(grads, plain.init(params), params)
    step = jax.jit(lambda *args: injected.update(*args))
    updates, state = step(grads, state, params)
    assert first_moment(case, state)["kernel"].dtype == jnp.uint8  # the codec of the rule, so the rule was passed on
    assert_8bit(case, state)
    # 1 - b has an error of one rounding of float32, which is 6e-5 of 1 - 0.999.
    assert_nearly(updates, expected, rtol=1e-4)
    assert_nearly(core(case, state), core(case, expected_state), rtol=1e-4)
    for _ in range(2):
        updates, state = step(grads, state, params)
    assert step._cache_size() <= 1
    if which == "whole" and case.name != "lars8bit":  # its trace contains the rates of earlier steps
        state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
        updates, state = step(grads, state, params)
        assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.one_in(7)
def test_decay_rates_in_16_bits_are_refused_and_float32_is_the_way_out(case, dtype):
    params = parameters(dtype)
    sixteen = {name: jnp.asarray(0.9, dtype) for name in ("b1", "b2", "b3", "decay", "momentum") if takes(case, name)}
    for name, value in sixteen.items():
        with pytest.raises(TypeError, match=rf"`{name}` is {value.dtype}.*hyperparam_dtype=jnp\.float32"):
            case.ours(**case.hyper | {name: value})
    if sixteen:
        with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
            optax.inject_hyperparams(case.ours)(**case.hyper).init(params)
    tx = optax.inject_hyperparams(case.ours, hyperparam_dtype=jnp.float32)(**case.hyper, state_format=SMALL)
    plain = case.ours(**case.hyper, state_format=SMALL)
    grads = gradients(like=params)
    ours, theirs = (jax.jit(t.update)(grads, t.init(params), params)[0] for t in (tx, plain))
    assert_nearly(ours, theirs, rtol=2e-2)


@every_kind_of_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.one_in(5, start=1)
def test_multi_steps_waits_and_then_takes_one_step(case, dtype):
    params = parameters(dtype)
    tx = build(case)
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    state = multi.init(params)
    before, step, grads = types(state), jax.jit(multi.update), gradients(like=params)
    updates, state = step(grads, state, params)
    assert not any(np.any(np.asarray(u, np.float32)) for u in jax.tree.leaves(updates))
    assert_same_bits(core(case, state), core(case, tx.init(params)))
    updates, state = step(grads, state, params)  # the mean of twice the same gradient is that gradient
    assert_8bit(case, state)
    assert types(state) == before and types(updates) == types(params)
    _, expected_state, expected = jitted(tx)(grads, tx.init(params), params)
    assert_nearly((updates, core(case, state)), (expected, core(case, expected_state)))


@every_kind_of_optimizer
def test_update_runs_in_a_conditional(case):
    params, grads = parameters(), gradients()
    tx = build(case)

    @jax.jit
    def maybe(flag, grads, state, params):
        return jax.lax.cond(flag, lambda: tx.update(grads, state, params), lambda: (params, state))

    assert_same_bits(maybe(False, grads, tx.init(params), params), (params, tx.init(params)))
    _, state = maybe(True, grads, tx.init(params), params)
    assert_8bit(case, state)
    assert_nearly(state, jitted(tx)(grads, tx.init(params), params)[1])


@every_kind_of_optimizer
@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused_update"])
def test_a_scan_equals_a_loop(case, fused):
    params = parameters()
    tx = build(case)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *(gradients(i) for i in range(3)))

    def body(carry, grads):
        params, state = carry
        if fused:
            return fse.fused_update(tx, grads, state, params), None
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned = jax.jit(lambda carry: jax.lax.scan(body, carry, batches)[0])((params, tx.init(params)))
    assert_8bit(case, scanned)
    assert_nearly(scanned, run(tx, params))


@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_float64_parameters_keep_float64_moments(case):
    with jax.enable_x64(True):
        params = parameters("float64")
        tx, theirs = case.ours(**case.hyper, state_format=SMALL), case.theirs(**case.hyper)
        found = assert_8bit(case, tx.init(params))
        for name in moments(case):
            assert getattr(found, name)["norm"]["scale"].dtype == jnp.float64
            assert getattr(found, f"{name}_absmax")["kernel"].dtype == jnp.float32
        (new, state), (expected, _) = (run(t, params, step=jax.jit(jitted(t))) for t in (tx, theirs))
        assert types(state) == types(tx.init(params)) and types(new) == types(params)
        assert_equal(case, (new["norm"], new["wte"]), (expected["norm"], expected["wte"]))
        fused, _ = jitted_fused(tx)(gradients(like=params), tx.init(params), params)
        assert types(fused) == types(params)
        still, _ = jitted_fused(tx)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        if not takes(case, "weight_decay"):
            assert_same_bits(still, params)  # to the last digit of float64


@every_kind_of_optimizer
def test_numpy_numbers_work_like_python_numbers(case):
    """`np.float64` is an instance of Python's float, but it promotes float32 arrays under x64."""
    with jax.enable_x64(True):
        params = parameters("float32")
        hyper = {key: np.float64(x) if isinstance(x, float) else x for key, x in case.hyper.items()} | (
            {"b1": np.float64(0.9)} if takes(case, "b1") else {}
        )
        tx = case.ours(**hyper, state_format=SMALL)
        updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert_8bit(case, state)
        assert types(state) == types(tx.init(params)) and types(updates) == types(params)


@every_kind_of_optimizer
def test_init_accepts_shapes_instead_of_arrays(case):
    params = parameters()
    shapes = jax.eval_shape(lambda: params)
    tx = build(case)
    expected = tx.init(params)
    assert_8bit(case, expected)
    assert_same_bits(tx.init(shapes), expected)
    assert_same_bits(jax.jit(tx.init)(params), expected)
    assert types(jax.eval_shape(tx.init, shapes)) == types(expected)
    assert types(jax.eval_shape(tx.init, params)) == types(expected)


@every_kind_of_optimizer
def test_tree_map_params_finds_moments_and_scales(case):
    params = parameters()
    specs = jax.tree.map(lambda p: P("x") if p.ndim == 2 else P(), params)
    tx = build(case)
    state = tx.init(params)
    found = assert_8bit(case, state)
    mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())
    for name in moments(case):
        assert getattr(core(case, mapped), name) == specs
        assert getattr(core(case, mapped), f"{name}_absmax") == specs
    assert core(case, mapped).count == core(case, mapped).format == P()
    assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)
    assert found.count.shape == ()


@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_vmap_of_init_and_update_equals_a_loop_over_members(case):
    members = [parameters(seed=i) for i in range(2)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    tx = build(case)
    params, grads = stack(members), stack([gradients(i) for i in range(2)])
    state = jax.vmap(tx.init)(params)
    assert_8bit(case, state)
    step = jax.jit(jax.vmap(tx.update))
    updates, state = step(grads, state, params)
    fused, _ = jax.jit(jax.vmap(functools.partial(fse.fused_update, tx)))(grads, jax.vmap(tx.init)(params), params)
    assert_nearly(fused, optax.apply_updates(params, updates))
    for i, member in enumerate(members):
        _, expected_state, expected = jitted(tx)(gradients(i), tx.init(member), member)
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
        assert_nearly((pick(updates), pick(state)), (expected, expected_state))


@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_parameters_after_a_step_are_differentiable(case):
    """Differentiates by the learning rate and by the gradients, as in meta-learning, and through remat."""
    params, grads = parameters(), gradients()
    state = build(case).init(params)
    assert_8bit(case, state)
    hyper = {key: x for key, x in case.hyper.items() if key != "learning_rate"}

    def loss(make, fused, rate, grads, state):
        tx = make(rate, **hyper)
        if fused:
            new, _ = fse.fused_update(tx, grads, state, params)
        else:
            updates, _ = tx.update(grads, state, params)
            new = optax.apply_updates(params, updates)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(new))

    ours = functools.partial(case.ours, state_format=SMALL)
    gradient = lambda make, fused: jax.jit(jax.grad(functools.partial(loss, make, fused), argnums=(0, 1)))  # noqa: E731
    expected = gradient(case.theirs, False)(0.01, grads, case.theirs(0.01, **hyper).init(params))
    # Sums run in another order. We use 1 / sqrt where optax uses rsqrt, and multiply m and sqrt(v) by 1 / c where optax
    # divides by c. Their derivatives by g are of the order of 1 / |g| and cancel, except for rounding.
    cancels = case.name in ("adam8bit", "adamw8bit", "ademamix8bit")
    rtol, atol = 1e-4, 1e-6
    if cancels or case.sums or case.name == "rmsprop8bit":
        rtol, atol = (2e-2, 1e-5) if cancels else (2e-3, 1e-6)
    for fused in (False, True):
        found = gradient(ours, fused)(0.01, grads, state)
        # At the first step the moments are zero in both states. Nothing is rounded, so the derivatives are equal.
        chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)
    rematerialized = jax.jit(jax.grad(jax.checkpoint(functools.partial(loss, ours, False)), argnums=(0, 1)))
    chex.assert_trees_all_close(rematerialized(0.01, grads, state), expected, rtol=rtol, atol=atol)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A pytree that is callable, as the modules of Equinox are."""

    embedding: Any
    kernel: Any

    def __call__(self, x):
        return x @ self.embedding @ self.kernel


MASKED = {
    **{f"{case.name}.{case.mask}": (case, case.mask) for case in OPTIMIZERS if takes(case, case.mask)},
    **{f"{case.name}.trust_ratio_mask": (case, "trust_ratio_mask") for case in OPTIMIZERS if case.name == "lars8bit"},
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_can_be_a_callable_pytree(name):
    case, argument = MASKED[name]
    params = Layer(jnp.ones((80, 64)), jnp.ones((64, 64)))
    masks = (Layer(False, True), lambda params: Layer(False, True))
    ours, theirs = (case.ours(**case.hyper, **{argument: mask}, state_format=SMALL) for mask in masks)
    found, want = (tx.update(params, tx.init(params), params)[0] for tx in (ours, theirs))
    assert_same_bits(found, want)


@pytest.mark.parametrize("wrap", [fse.row_sparse, fse.with_max_norm], ids=lambda f: f.__name__)
def test_a_mask_of_tables_can_be_a_callable_pytree(wrap):
    params = Layer(jnp.ones((80, 64)), jnp.ones((64, 64)))
    tables = Layer(jnp.ones((80, 64)), jnp.ones((64, 64)))
    options = {"max_norm": 1.0} if wrap is fse.with_max_norm else {}
    moved = []
    for mask in (Layer(True, False), lambda params: Layer(True, False)):
        tx = wrap(optax.sgd(0.1), mask=mask, **options)
        updates, _ = tx.update(tables, tx.init(params), params, token_ids={"embedding": jnp.arange(3)})
        moved.append(optax.apply_updates(params, updates))
    assert_same_bits(*moved)
    assert np.any(moved[0].embedding != params.embedding)


def unrolled(tx_of, steps, w, rate):
    tx, params = tx_of(rate), {"kernel": w}
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(lambda p: p * jnp.cos(p), params), state, params)
        params = optax.apply_updates(params, updates)
    return jnp.sum(params["kernel"] ** 2)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize("bits", [8, "bf16", 32])
@pytest.mark.one_in(13)
def test_a_derivative_through_moments_that_are_not_in_32_bits_raises(case, bits):
    w = parameters()["kernel"]
    hyper = {key: x for key, x in case.hyper.items() if key != "learning_rate"}
    ours = lambda rate: case.ours(rate, **hyper, state_format=SMALL, rules=((".*", bits),))  # noqa: E731
    theirs = lambda rate: case.theirs(rate, **hyper)  # noqa: E731
    for transform in (jax.grad, lambda f: lambda w: jax.jvp(f, (w,), (jnp.ones_like(w),))[1]):
        along = transform(lambda w: unrolled(ours, 3, w, 0.01))
        if bits == 32:
            assert_nearly(along(w), transform(lambda w: unrolled(theirs, 3, w, 0.01))(w), rtol=2e-2)
            continue
        with pytest.raises(TypeError, match="A derivative reaches the moments of parameter 'kernel'"):
            jax.jit(along)(w)
    jax.grad(lambda rate: unrolled(ours, 1, w, rate))(0.01)  # one step does not read what it stores
    if bits != 32:
        with pytest.raises(TypeError, match=r"use rules=\(\(\"\.\*\", 32\),\)"):
            jax.grad(lambda rate: unrolled(ours, 3, w, rate))(0.01)


def test_a_scan_of_one_step_raises_if_it_carries_the_state():
    """JAX cannot tell that no second step reads the moments."""
    w, tx = parameters()["kernel"], fse.adamw8bit(0.01, state_format=SMALL)
    state = tx.init(w)

    def step(carry, _):
        updates, state = tx.update(jnp.cos(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    with pytest.raises(TypeError, match="A derivative reaches the moments of parameter"):
        jax.grad(lambda w: jnp.sum(jax.lax.scan(step, (w, state), None, 1)[0][0]))(w)
    jax.grad(lambda w: jnp.sum(step((w, state), None)[0][0]))(w)


@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_donated_buffers_are_used_in_place(case):
    """JAX warns if it cannot use a donated buffer, and warnings are errors in these tests."""
    for fused in (False, True):
        tx, params = build(case), jax.tree.map(jnp.copy, parameters())
        state, grads = tx.init(params), gradients()
        assert_8bit(case, state)
        if fused:
            step = jax.jit(functools.partial(fse.fused_update, tx), donate_argnums=(1, 2))
        else:
            step = jax.jit(tx.update, donate_argnums=(0, 1))
        compiled = step.lower(grads, state, params).compile()
        donated = (state, params) if fused else (grads, state)
        size = sum(x.nbytes for x in jax.tree.leaves(donated))
        assert compiled.memory_analysis().alias_size_in_bytes >= size
        step(grads, state, params)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))


# --- numbers -------------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.one_in(5)
def test_fp32_moments_equal_optax_bit_for_bit(case):
    params = parameters()
    ours, theirs = build(case, rules=ALL_FP32), build_theirs(case)
    (new, state), (expected, expected_state) = run(ours, params), run(theirs, params)
    assert not any(map(is_codes, jax.tree.leaves(first_moment(case, state))))
    assert_equal(case, new, expected)
    found = core(case, state)
    for name in moments(case):
        assert_equal(case, getattr(found, name), their_moment(expected_state, name))


@every_optimizer
@pytest.mark.one_in(13, start=1)
def test_fp32_moments_next_to_8bit_ones_equal_optax_bit_for_bit_with_and_without_jit(case):
    params, grads = parameters(), gradients()
    ours, theirs = build(case), build_theirs(case)
    for step in (jitted(ours), ours.update):
        state = ours.init(params)
        expected_state = theirs.init(params)
        for _ in range(2):
            out = step(grads, state, params)
            expected = (jitted(theirs) if step is not ours.update else theirs.update)(grads, expected_state, params)
            state, expected_state = out[1], expected[1]
            updates, expected_updates = (o[2] if len(o) == 3 else o[0] for o in (out, expected))
            for name in ("norm", "wte"):
                assert_equal(case, updates[name], expected_updates[name])
        assert_8bit(case, state)


@every_optimizer
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.one_in(13)
def test_half_precision_parameters_equal_optax_on_float32_copies(case, dtype):
    params = parameters(dtype)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    tx, theirs = build(case), build_theirs(case)
    state, expected_state = tx.init(params), theirs.init(wide(params))
    assert_8bit(case, state)
    for i in range(3):
        grads = gradients(i, params)
        _, expected_state, expected = jitted(theirs)(wide(grads), expected_state, wide(params))
        new, state, updates = jitted(tx)(grads, state, params)
        expected = jax.tree.map(lambda u, p: u.astype(p.dtype), expected, params)
        assert_equal(case, (updates["norm"], updates["wte"]), (expected["norm"], expected["wte"]))
        params = new
    found = core(case, state)
    for name in moments(case):
        assert getattr(found, name)["wte"]["embedding"].dtype == jnp.float32


@every_optimizer
@pytest.mark.one_in(7)
def test_complex_parameters_keep_the_state_of_optax(case):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(64, 64)) + 1j * rng.normal(size=(64, 64)), jnp.complex64)}
    ours, theirs = build(case, rules=((".*", 8),)), build_theirs(case)
    state, expected_state = ours.init(params), theirs.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: p.conj() * 0.1, params)
        params_, state, updates = jitted(ours)(grads, state, params)
        _, expected_state, expected = jitted(theirs)(grads, expected_state, params)
        assert_equal(case, updates, expected)
        params = params_
    (row,) = fse.describe(ours, params).rows
    assert (row.bits, row.reason) == (32, "complex")
    for name in moments(case):
        assert_equal(case, getattr(core(case, state), name), their_moment(expected_state, name))


@every_optimizer_and_storage
@pytest.mark.one_in(5)
def test_the_first_step_equals_optax_in_every_storage(case, codec, rounding):
    """The update uses the new moments before they are rounded. Only the next step uses their codes."""
    params, grads = parameters(), gradients()
    tx = without_decay(case, state_format=fse.StateFormat(codec, rounding, min_size=0))
    theirs = case.theirs(**case.hyper | ({"weight_decay": 0.0} if takes(case, "weight_decay") else {}))
    _, state, updates = jitted(tx)(grads, tx.init(params), params)
    assert_8bit(case, state)
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2])


@every_optimizer_and_storage
@pytest.mark.one_in(5, start=1)
def test_a_zero_gradient_changes_nothing(case, codec, rounding):
    tx = without_decay(case, state_format=fse.StateFormat(codec, rounding, min_size=0))
    params = parameters()
    if case.name != "lars8bit":  # its trace starts at 0.0, and -0.0 + 0.0 is 0.0, in optax too
        params["kernel"] = params["kernel"].at[0].set(-0.0)
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    new, after, _ = jitted(tx)(zero, state, params)
    assert_same_bits(new, params)
    fused, fused_after = jitted_fused(tx)(zero, state, params)
    assert_same_bits(fused, params)
    found = assert_8bit(case, after)
    for name in moments(case):
        assert_same_bits(getattr(found, name), getattr(core(case, state), name))
        assert_same_bits(getattr(found, f"{name}_absmax"), getattr(core(case, state), f"{name}_absmax"))
    assert_same_bits(fused_after, after)


@every_optimizer_and_storage
def test_elements_without_a_gradient_do_not_change(case, codec, rounding):
    """Covers rows that fill their blocks, and single elements of blocks with other gradients."""
    tx = without_decay(case, state_format=fse.StateFormat(codec, rounding, min_size=0))
    params = parameters()
    untouched = np.zeros((64, 64), bool)
    untouched[5] = untouched[:, 7] = untouched[11, 3::5] = True
    new, state = params, tx.init(params)
    zero_codes = {name: np.asarray(getattr(core(case, state), name)["kernel"]) for name in moments(case)}
    for i in range(3):
        grads = gradients(i) | {"kernel": jnp.where(untouched, 0.0, gradients(i)["kernel"])}
        new, state, _ = jitted(tx)(grads, state, new)
    found = assert_8bit(case, state)
    moved = np.asarray(new["kernel"]) != np.asarray(params["kernel"])
    assert not moved[untouched].any()
    assert moved[~untouched].mean() > 0.9
    for name in moments(case):
        if not np.any(getattr(core(case, tx.init(params)), f"{name}_absmax")["kernel"]):  # it starts with zeros
            codes = np.asarray(getattr(found, name)["kernel"])
            np.testing.assert_array_equal(codes[untouched], zero_codes[name][untouched])


BAD = [jnp.nan, jnp.inf, -jnp.inf]


def with_bad_elements(grads):
    where = np.zeros((64, 64), bool)
    for i, bad in enumerate(BAD):
        where[3 * i, 5 + i] = True
        grads = grads | {"kernel": grads["kernel"].at[3 * i, 5 + i].set(bad)}
    where_scale = np.zeros(8, bool)
    where_scale[2] = True
    return grads | {"norm": {"scale": grads["norm"]["scale"].at[2].set(jnp.nan)}}, where, where_scale


@every_optimizer_and_storage
def test_a_nonfinite_gradient_element_changes_no_other_element(case, codec, rounding):
    """Compared with zeros in place of the bad elements, all others have the same bits, now and one step later."""
    tx = without_decay(case, state_format=fse.StateFormat(codec, rounding, min_size=0))
    params = parameters()
    bad, where, where_scale = with_bad_elements(gradients(1))
    # The bad elements have no moments yet, so they do not contribute to the scales.
    before = gradients(0) | {"kernel": jnp.where(where, 0.0, gradients(0)["kernel"])}
    _, warm, _ = jitted(tx)(before, tx.init(params), params)
    clean = bad | {
        "kernel": jnp.where(where, 0.0, bad["kernel"]),
        "norm": {"scale": jnp.where(where_scale, 0.0, bad["norm"]["scale"])},
    }
    (new, state, _), (expected, expected_state, _) = (jitted(tx)(grads, warm, params) for grads in (bad, clean))
    found, reference = assert_8bit(case, state), core(case, expected_state)
    for name in moments(case):
        at = lambda state, field, key="kernel": np.asarray(getattr(state, field)[key])  # noqa: E731
        assert_same_bits(at(found, name)[~where], at(reference, name)[~where])
        assert_same_bits(at(found, f"{name}_absmax"), at(reference, f"{name}_absmax"))
        assert_same_bits(getattr(found, name)["wte"], getattr(reference, name)["wte"])
    assert_same_bits(np.asarray(new["kernel"])[~where], np.asarray(expected["kernel"])[~where])
    assert_same_bits(new["wte"], expected["wte"])
    if not case.sums:  # there the zero element has a moment and contributes to the norm
        scale, expected_scale = (np.asarray(x["norm"]["scale"]) for x in (new, expected))
        assert_same_bits(scale[~where_scale], expected_scale[~where_scale])
    # One step later the state is finite again, and only the bad elements of the parameters are NaN.
    (later, state, _), (_, expected_state, _) = (jitted(tx)(gradients(2), s, new) for s in (state, expected_state))
    for name in moments(case):
        codes, expected = (np.asarray(getattr(core(case, s), name)["kernel"]) for s in (state, expected_state))
        if case.name == "adagrad8bit":  # a sum that was reset is smaller than one that was not
            codes, expected = codes[~where], expected[~where]
        assert_same_bits(codes, expected)
    if case.name == "lion8bit":  # the sign of an infinite gradient gives a finite step
        where = where & np.isnan(bad["kernel"])
    np.testing.assert_array_equal(np.isfinite(later["kernel"]), ~where)
    np.testing.assert_array_equal(np.isfinite(later["norm"]["scale"]), ~where_scale)


@with_every_storage([case for case in OPTIMIZERS if case.bounded])
@pytest.mark.parametrize("spike", [1e20, 1e30])
@pytest.mark.one_in(5)
def test_a_gradient_whose_square_overflows_does_not_move_its_parameter_far(case, codec, rounding, spike):
    tx = without_decay(case, state_format=fse.StateFormat(codec, rounding, min_size=0))
    params = parameters()
    state = tx.init(params)
    for i in range(4):
        grads = gradients(i)
        if i == 1:
            grads = grads | {"kernel": grads["kernel"].at[3, 5].set(spike)}
        params, state, _ = jitted(tx)(grads, state, params)
    assert abs(params["kernel"][3, 5] - parameters()["kernel"][3, 5]) < 0.1


@every_kind_of_optimizer
def test_a_state_of_renamed_parameters_is_refused(case):
    tx = build(case)
    state = tx.init({"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))})
    renamed = {"a": jnp.ones((64, 64)), "c": jnp.ones((64, 64))}
    with pytest.raises(ValueError, match=r"gradients have a leaf 'c' where .* of the optimizer state has 'b'"):
        tx.update(renamed, state, renamed)


@every_optimizer
@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused_update"])
@pytest.mark.one_in(13)
def test_skip_nonfinite_does_not_update_elements_with_a_nonfinite_gradient(case, fused):
    tx = build(case, skip_nonfinite=True)
    params = parameters()
    params["kernel"] = params["kernel"].at[0, 5].set(-0.0)  # under a NaN: -0.0 + 0.0 would be 0.0
    _, warm, _ = jitted(tx)(gradients(0), tx.init(params), params)
    bad, where, where_scale = with_bad_elements(gradients(1))
    if fused:
        new, state = jitted_fused(tx)(bad, warm, params)
    else:
        new, state, updates = jitted(tx)(bad, warm, params)
        assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    found, before = assert_8bit(case, state), core(case, warm)
    assert_same_bits(np.asarray(new["kernel"])[where], np.asarray(params["kernel"])[where])
    assert_same_bits(np.asarray(new["norm"]["scale"])[where_scale], np.asarray(params["norm"]["scale"])[where_scale])
    assert (np.asarray(new["kernel"]) != np.asarray(params["kernel"]))[~where].mean() > 0.9
    for name in moments(case):
        scale, old_scale = (np.asarray(getattr(s, name)["norm"]["scale"]) for s in (found, before))
        assert_same_bits(scale[where_scale], old_scale[where_scale])
        # In 8 bits the block has a new scale, so the code is one of the two whose values are next to the old value.
        (value, scale), (old_value, _) = (kernel_moment(s, name) for s in (found, before))
        for v, old, unit in zip(value[where], old_value[where], scale[where]):
            grid = np.sort(table("root", signed=bool((value < 0).any()))) * unit
            assert grid[grid <= old * (1 + 1e-6)].max() <= v <= grid[grid >= old * (1 - 1e-6)].min()


def kernel_moment(state, name):
    """The decoded moment of the kernel and the scale of each element, (64, 64). Blocks are along the last axis."""
    codes, absmax = getattr(state, name)["kernel"], getattr(state, f"{name}_absmax")["kernel"]
    size = codes.shape[1] // absmax.shape[1]
    value = fse.ops.dequantize(codes, absmax, signed=codes.dtype == jnp.int8, block_size=size)
    return np.asarray(value), np.repeat(np.asarray(absmax), size, axis=1)


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.one_in(10)
def test_fused_update_equals_update_and_apply_updates(case, dtype):
    tx, params = build(case), parameters(dtype)
    _, state, _ = jitted(tx)(gradients(0, params), tx.init(params), params)
    new, after, updates = jitted(tx)(gradients(1, params), state, params)
    fused, fused_after = jitted_fused(tx)(gradients(1, params), state, params)
    assert_8bit(case, fused_after)
    assert_same_bits(fused_after, after)
    assert types(fused) == types(params)
    for f, n, p, u in zip(*map(jax.tree.leaves, (fused, new, params, updates))):
        f, n, p, u = (np.asarray(x, np.float32) for x in (f, n, p, u))
        # The sum can be in the next binade, where one ulp is two ulps of the summands.
        ulp = np.spacing(np.max(np.abs([p, u, n]), axis=0)) * (1 if dtype == "float32" else 2**16)
        assert np.all(np.abs(f - n) <= ulp)


@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_chain_keeps_the_fused_path(case):
    params, grads = parameters(), gradients()
    tx = fse.chain(optax.adaptive_grad_clip(0.5), build(case))
    theirs = optax.chain(optax.adaptive_grad_clip(0.5), build(case))
    new, state, _ = jitted(theirs)(grads, theirs.init(params), params)
    assert_same_bits(jitted(tx)(grads, tx.init(params), params)[:2], (new, state))
    fused, fused_state = jitted_fused(tx)(grads, tx.init(params), params)
    assert_8bit(case, fused_state)
    assert_nearly((fused, fused_state), (new, state))
    again = fse.chain(optax.clip(1.0), tx)
    assert_8bit(case, jitted_fused(again)(grads, again.init(params), params)[1])


@every_kind_of_optimizer
def test_the_error_names_a_wrapper_that_hides_the_optimizer(case):
    params = parameters()
    wrappers = {
        "chain": optax.chain(build(case)),
        "masked": optax.masked(build(case), True),
        "MultiSteps": optax.MultiSteps(build(case), 2),
        "inject_hyperparams": optax.inject_hyperparams(case.ours)(**case.hyper),
        case.half.__name__: halves(case)[0],
    }
    for name, tx in wrappers.items():
        with pytest.raises(TypeError, match=rf"`tx` must be an 8-bit optimizer.*'{name}"):
            fse.fused_update(tx, params, build(case).init(params), params)
    with pytest.raises(TypeError, match="last member of `chain` must be an 8-bit optimizer"):
        fse.chain(build(case), optax.clip(1.0))


# --- every kind of tree --------------------------------------------------------------------------------------------

KERNEL = lambda seed=0: parameters(seed=seed)["kernel"]  # noqa: E731
TREES = {
    "array": lambda: KERNEL(),
    "tuple": lambda: (KERNEL(), KERNEL(1)),
    "list": lambda: [KERNEL(), {"bias": jnp.ones(8)}],
    "namedtuple": lambda: optax.MaskedState({"kernel": KERNEL()}),
    "frozen": lambda: freeze({"a": {"kernel": KERNEL()}}),
    "none": lambda: {"kernel": KERNEL(), "absent": None},
    "empty": lambda: {"kernel": KERNEL(), "empty": jnp.zeros((0, 64)), "sub": {}},
    "scalar": lambda: {"kernel": KERNEL(), "temperature": jnp.float32(0.5)},
    "vector": lambda: {"kernel": KERNEL(), "gate": jnp.linspace(-1, 1, 100)},
    "deep": lambda: {"kernel": jnp.ones((2, 3, 4, 5, 32))},
}


@every_kind_of_optimizer
@pytest.mark.parametrize("kind", TREES)
def test_every_kind_of_tree_keeps_its_structure_and_types(case, kind):
    params = TREES[kind]()
    tx = build(case)
    state = tx.init(params)
    found = core(case, state)
    for name in moments(case):
        assert jax.tree.structure(getattr(found, name)) == jax.tree.structure(params)
        assert any(map(is_codes, jax.tree.leaves(getattr(found, name))))
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert types((updates, after)) == types((params, state))
    fused = jax.eval_shape(functools.partial(fse.fused_update, tx), params, state, params)
    assert types(fused) == types((params, state))


@every_optimizer
@pytest.mark.one_in(19)
def test_every_kind_of_tree_gets_its_first_step_as_in_optax(case):
    params = {kind: TREES[kind]() for kind in ("tuple", "none", "empty", "scalar", "vector", "deep")}
    grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
    tx, theirs = build(case), build_theirs(case)
    _, state, updates = jitted(tx)(grads, tx.init(params), params)
    assert is_codes(first_moment(case, state)["scalar"]["temperature"])
    rtol = 2e-5 if case.sums else 2e-6
    assert_nearly(updates, jitted(theirs)(grads, theirs.init(params), params)[2], rtol=rtol)


@every_kind_of_optimizer
def test_parameters_can_be_numpy_arrays_and_python_numbers(case):
    """A checkpoint can hold float64 without x64, and a temperature that is a Python number."""
    params = {"kernel": np.ones((64, 64)), "scale": np.ones(8, np.float16), "a": 1.0, "b": np.float32(2.0)}
    grads = {"kernel": np.full((64, 64), 0.5), "scale": np.ones(8, np.float16), "a": 0.25, "b": np.float32(2.0)}
    tx = build(case, rules=(("kernel", 8), ("^(a|b)$", 32)))
    state = tx.init(params)
    assert_8bit(case, state)
    as_jax = jax.tree.map(jnp.asarray, params)
    assert types(state) == types(tx.init(as_jax))
    updates, after = tx.update(grads, state, params)
    expected, _ = tx.update(jax.tree.map(jnp.asarray, grads), state, as_jax)
    assert_same_bits(updates, expected)
    assert types(after) == types(state)
    new, _ = fse.fused_update(tx, grads, state, params)
    assert_nearly(new, optax.apply_updates(params, updates))


@every_kind_of_optimizer
def test_parameters_can_be_8bit_floats(case):
    params = {"kernel": jnp.ones((64, 64), jnp.float8_e4m3fn), "scale": jnp.ones(8, jnp.float8_e5m2)}
    tx = build(case)
    state = tx.init(params)
    assert_8bit(case, state)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert types((updates, after)) == types((params, state))


@every_kind_of_optimizer
def test_a_parameter_can_have_no_gradient(case):
    params = {"kernel": parameters()["kernel"], "frozen": jnp.ones((32, 32)), "absent": None}
    grads = {"kernel": gradients()["kernel"], "frozen": None, "absent": None}
    tx = build(case)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert updates["frozen"] is None and types(after) == types(state)
    new, fused_after = jax.jit(functools.partial(fse.fused_update, tx))(grads, state, params)
    assert_same_bits(new["frozen"], params["frozen"])
    assert_same_bits(fused_after, after)
    found = core(case, after)
    for name in moments(case):
        assert is_codes(getattr(found, name)["kernel"])
        assert_same_bits(getattr(found, name)["frozen"], getattr(core(case, state), name)["frozen"])


@every_kind_of_optimizer
def test_a_state_of_fewer_parameters_or_of_another_block_size_is_refused(case):
    tx, params = build(case), parameters()
    assert_8bit(case, tx.init(params))
    with pytest.raises(ValueError, match="The gradients have 3 leaves, the parameters 3 and the optimizer state 1"):
        tx.update(params, tx.init({"kernel": params["kernel"]}), params)
    other = build(case, state_format=fse.StateFormat(block_size=64, min_size=0))
    with pytest.raises(ValueError, match=r"'kernel' has u?int8 codes and scales of shape"):
        tx.update(params, other.init(params), params)


# --- schedules, weight decay, masks --------------------------------------------------------------------------------


@every_kind_of_optimizer
@pytest.mark.one_in(5)
def test_learning_rates_can_follow_a_schedule(case):
    schedule = optax.linear_schedule(0.1, 0.0, 4)  # a power of two, because count / 3 * 3 can differ from count
    hyper = case.hyper | {"learning_rate": schedule}
    tx, theirs = case.ours(**hyper, state_format=SMALL), case.theirs(**hyper)
    params = parameters()
    new, state = run(tx, params, 2)
    expected, expected_state = run(theirs, params, 2)
    assert_8bit(case, state)
    assert_equal(case, (new["norm"], new["wte"]), (expected["norm"], expected["wte"]))
    schedules = [[x for x in s if isinstance(x, optax.ScaleByScheduleState)] for s in (state, expected_state)]
    assert len(schedules[0]) == 1
    assert_same_bits(*schedules)
    assert_nearly(jitted_fused(tx)(gradients(), state, new), jitted(tx)(gradients(), state, new)[:2])
    if case.name != "lars8bit":  # its trace contains the rates of earlier steps
        new, state = run(tx, new, 2, state=state)  # the schedule has ended
        assert_same_bits(run(tx, new, 1, state=state)[0], new)


MASKS = {
    "none": None,
    "tree": {"kernel": True, "norm": {"scale": False}, "wte": {"embedding": True}},
    "prefix": {"kernel": False, "norm": True, "wte": False},
    "all": True,
    "nothing": False,
    "callable": lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
}


@with_weight_decay
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.one_in(17)
def test_weights_decay_as_in_optax(case, mask, scheduled):
    decay = optax.linear_schedule(0.5, 0.0, 4) if scheduled else 0.5
    hyper = case.hyper | {"weight_decay": decay, case.mask: MASKS[mask]}
    tx, theirs = case.ours(**hyper, state_format=SMALL, rules=(("kernel", 8),)), case.theirs(**hyper)
    params = parameters()
    grads, state, expected_state = gradients(), tx.init(params), theirs.init(params)
    fused = fse.fused_update(tx, grads, state, params)
    for i in range(2):
        updates, state = tx.update(grads, state, params)
        expected, expected_state = theirs.update(grads, expected_state, params)
        rest = lambda whole: tuple(x for x in whole if not hasattr(x, moments(case)[0]))  # noqa: E731
        assert_same_bits(rest(state), rest(expected_state))
        assert_nearly((updates["norm"], updates["wte"]), (expected["norm"], expected["wte"]), rtol=1e-6)
        if i == 0:
            assert_nearly(updates, expected)
            assert_nearly(fused, (optax.apply_updates(params, updates), state))
    assert_8bit(case, state)


@with_weight_decay
def test_the_error_for_missing_params_names_the_argument(case):
    tx, params = build(case), parameters()
    state = tx.init(params)
    assert_8bit(case, state)
    with pytest.raises(ValueError, match="needs `params`"):
        tx.update(params, state)


@every_optimizer
@pytest.mark.one_in(7, start=1)
def test_8bit_follows_fp32_on_a_small_regression(case):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 32)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(32, 32)), jnp.float32)
    y = jnp.tanh(x @ target)

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["kernel"]) + params["bias"] - y) ** 2)

    start = {"kernel": jnp.asarray(0.1 * rng.normal(size=(32, 32)), jnp.float32), "bias": jnp.zeros((1, 32))}
    hyper = case.hyper | (case.teaches or {})

    def train(tx):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=200))()

    (_, state), losses = train(case.ours(**hyper, state_format=SMALL))
    (_, _), expected = train(case.theirs(**hyper))
    assert_8bit(case, state)
    assert expected[-1] < 0.6 * expected[0]
    np.testing.assert_allclose(losses[-1], expected[-1], rtol=0, atol=0.005 * expected[0])


@pytest.mark.parametrize("half", [False, True], ids=["optimizer", "half"])
@every_optimizer
def test_every_option_reaches_the_engine(case, half, options_of_engines):
    """An option that a factory accepts but does not pass on would be ignored silently."""
    hyper = {key: value for key, value in case.hyper.items() if not half or key not in case.only_whole}
    (case.half if half else case.ours)(**hyper, **UNUSUAL_OPTIONS)
    assert options_of_engines == [Options(**UNUSUAL_OPTIONS)]
