"""Tests `quantize_state` around every transform of tests/cases.py, from optax and optax.contrib."""

import functools
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import NOT_WRAPPED, WRAPPED
from tests.tools import SMALL, assert_nearly, assert_same_bits, is_codes, types

every_transform = pytest.mark.parametrize("case", WRAPPED, ids=lambda case: case.name)
STEPS = 60
TARGET = {
    "kernel": np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32),
    "bias": np.random.default_rng(1).normal(size=8).astype(np.float32),
}
PARAMS = jax.tree.map(lambda x: np.full_like(x, 0.5), TARGET)


def loss(params):
    return sum(jnp.mean((params[name] - TARGET[name]) ** 2) for name in TARGET)


def updated(case, tx, state, params):
    value, grads = jax.value_and_grad(loss)(params)
    extra = {name: {"value": value, "obj_fn": loss}[name] for name in case.extra}
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, value


def wrapped(case, **options):
    return fse.quantize_state(case.make(**case.hyper), **{"state_format": SMALL} | options)


@functools.cache
def trained(name):
    """Trains with and without `quantize_state`. Returns the losses of both and the state."""
    case = next(case for case in WRAPPED if case.name == name)
    ours, theirs = wrapped(case), case.make(**case.hyper)

    def train(tx):
        def body(carry, _):
            params, state, value = updated(case, tx, carry[1], carry[0])
            return (params, state), value

        return jax.lax.scan(body, (jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)), None, STEPS)

    return jax.jit(lambda: (train(ours), train(theirs)[1]))()


def assert_in_bytes(case, state):
    """Checks that moments of the kernel are codes with scales, and that nothing else is."""
    assert isinstance(state, fse.QuantizedState)
    assert {name.split(".")[-1] for name in state.absmax} == set(case.moments.split())
    codes = [path for path, x in jax.tree_util.tree_leaves_with_path(state.inner) if is_codes(x)]
    named = {jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2] for path in codes}
    assert named == set(case.moments.split()) or (case.name == "muon" and named == {"mu"})  # its Adam updates the bias
    assert all("kernel" in jax.tree_util.keystr(path) for path in codes)
    return state


@every_transform
@pytest.mark.one_in(10)
def test_a_quantized_transform_trains_like_the_transform_in_fp32(case):
    ((params, state), losses), expected = trained(case.name)
    assert_in_bytes(case, state)
    assert types(params) == types(jax.tree.map(jnp.asarray, PARAMS))
    assert types(state) == types(jax.eval_shape(wrapped(case).init, PARAMS))
    assert losses[0] == expected[0]
    assert min(losses) < 0.5 * losses[0]
    # The losses agree in the first half; at the end both are small.
    np.testing.assert_allclose(losses[: STEPS // 2], expected[: STEPS // 2], rtol=0.25, atol=0.02 * losses[0])
    assert min(losses) < 1.5 * min(expected) + 0.01 * losses[0]


@every_transform
@pytest.mark.one_in(5, start=2)
def test_optax_wrappers_and_control_flow_keep_types(case):
    params = jax.tree.map(jnp.asarray, PARAMS)
    options = {"state_format": SMALL}
    plain = wrapped(case)
    inside = fse.quantize_state(optax.MultiSteps(case.make(**case.hyper), 2).gradient_transformation(), **options)
    around = optax.MultiSteps(plain, 2).gradient_transformation()

    def make(learning_rate):
        return fse.quantize_state(case.make(**case.hyper | {"learning_rate": learning_rate}), **options)

    injected = optax.inject_hyperparams(make)(case.hyper["learning_rate"])
    finite = fse.quantize_state(optax.apply_if_finite(case.make(**case.hyper), 3), **options)
    # MultiSteps calls update for shapes without the extra arguments.
    for tx in (plain, injected, finite, *([] if case.extra else [inside, around])):
        state = jax.eval_shape(tx.init, params)
        found = [
            x
            for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, fse.QuantizedState))
            if isinstance(x, fse.QuantizedState)
        ]
        assert_in_bytes(case, found[0])

        def maybe(flag, params, state, tx=tx):
            return jax.lax.cond(flag, lambda: updated(case, tx, state, params)[:2], lambda: (params, state))

        assert types(jax.eval_shape(maybe, True, params, state)) == types((params, state))


@every_transform
@pytest.mark.one_in(5, start=1)
def test_half_precision_parameters_keep_their_types_and_fp32_moments(case):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    tx = wrapped(case)
    state = jax.eval_shape(tx.init, params)
    assert_in_bytes(case, state)
    new, after, _ = jax.eval_shape(functools.partial(updated, case, tx), state, params)
    assert types((new, after)) == types((params, state))
    for path, x in jax.tree_util.tree_leaves_with_path(state.inner):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert name.removesuffix(".bias") not in state.absmax or x.dtype == jnp.float32


@every_transform
@pytest.mark.one_in(5)
def test_tree_map_params_finds_moments_and_scales(case):
    state = trained(case.name)[0][0][1]
    tx = wrapped(case)
    assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)
    specs = {"kernel": P("x", "y"), "bias": P("x")}
    if case.name in ("sm3", "muon"):
        plain = case.make(**case.hyper)
        with pytest.raises(ValueError):  # optax itself cannot map lists or masks in place of parameters
            optax.tree.map_params(plain, lambda _, spec: spec, plain.init(PARAMS), specs)
        return
    mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())
    assert_in_bytes(case, state)
    assert mapped.absmax == dict.fromkeys(state.absmax, specs)
    assert mapped.format == P()


@every_transform
@pytest.mark.one_in(5)
def test_flax_serialization_restores_every_bit(case):
    state = trained(case.name)[0][0][1]
    like = jax.tree.map(jnp.zeros_like, state)
    restored = flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))
    assert_same_bits(jax.tree.map(jnp.asarray, restored), assert_in_bytes(case, state))


@every_transform
@pytest.mark.one_in(5)
def test_the_report_counts_every_byte(case):
    tx = wrapped(case)
    report = fse.describe(tx, PARAMS)
    assert report.total_bytes == sum(x.nbytes for x in jax.tree.leaves(trained(case.name)[0][0][1]))
    rows = {row.path: row for row in report.rows}
    assert rows["kernel"].bits == 8 and rows["kernel"].bytes > 0
    assert sum(field.bytes for field in report.stayed) <= report.other_bytes


@pytest.mark.slow
@every_transform
def test_wrappers_and_control_flow_do_not_change_the_result(case):
    """Two steps inside MultiSteps, with an injected learning rate, and in `lax.cond` equal two plain steps."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    plain = wrapped(case)

    def make(learning_rate):
        return wrapped(case.__class__(**case._asdict() | {"hyper": case.hyper | {"learning_rate": learning_rate}}))

    def two_steps(tx, repeats=1, conditional=False):
        def step(carry, _):
            take = lambda: updated(case, tx, carry[1], carry[0])[:2]  # noqa: E731
            return (jax.lax.cond(carry[0] is not None, take, lambda: carry) if conditional else take()), None

        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), None, 2 * repeats)[0][0])()

    expected = two_steps(plain)
    assert_nearly(two_steps(plain, conditional=True), expected)
    assert_nearly(two_steps(optax.inject_hyperparams(make)(case.hyper["learning_rate"])), expected)
    if not case.extra:  # MultiSteps calls update for shapes without the extra arguments
        assert_nearly(two_steps(optax.MultiSteps(plain, 2).gradient_transformation(), repeats=2), expected)


@pytest.mark.slow
@every_transform
def test_orbax_restores_every_bit(case, tmp_path):
    state = trained(case.name)[0][0][1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert_same_bits(restored, state)


# The first is deprecated for its v2, the second is a wrapper inside two of the cases, the third warns in optax.
EXCUSED = {"optimistic_adam", "schedule_free", "dpsgd"}


def test_every_optimizer_of_optax_is_tested_or_listed_as_an_exception():
    """An optimizer is a function in `optax` or `optax.contrib` that has a learning rate."""
    wrapped_names = {getattr(case.make, "__name__", "") for case in WRAPPED} | {case.name for case in WRAPPED}
    named = wrapped_names | {name for name, *_ in NOT_WRAPPED} | EXCUSED
    missing = []
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            takes = inspect.signature(value).parameters if inspect.isfunction(value) else {}
            if "learning_rate" in takes and not name.startswith(("scale_by", "_")) and name not in named:
                missing.append(name)
    assert not missing


@pytest.mark.parametrize(("make", "reason"), [x[1:] for x in NOT_WRAPPED], ids=[x[0] for x in NOT_WRAPPED])
def test_transforms_without_moments_are_refused_at_once(make, reason):
    assert reason
    with pytest.raises(ValueError, match="has no moments to store in 8 bits"):
        fse.quantize_state(make())


def test_the_docs_list_every_transform_without_moments():
    for name, *_ in NOT_WRAPPED:
        known = {"rmsprop_centered": "centered rmsprop", "schedule_free_sgd": "schedule_free"}
        assert known.get(name, name) in fse.quantize_state.__doc__, name


@pytest.mark.parametrize("bits", [8, "bf16"])
def test_a_derivative_through_wrapped_moments_raises(bits):
    tx = fse.quantize_state(optax.sgd(0.01, momentum=0.9), rules=((".*", bits),))

    def loss(w):
        params, state = {"kernel": w}, tx.init({"kernel": w})
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params["kernel"])

    with pytest.raises(TypeError, match="A derivative reaches the moments of parameter 'kernel'"):
        jax.grad(loss)(jnp.ones((64, 64)))
