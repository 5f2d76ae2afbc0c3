"""Tests hyper-parameters that a rule sets, and that rules still match if the parameters are copied or moved."""

import copy
import io

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import flax_stable_embed as fse
from tests.tools import (
    SMALL,
    as_pure,
    assert_nearly,
    assert_same_bits,
    gradients,
    is_codes,
    jitted,
    jitted_fused,
    parameters,
)

EVERY = {
    "adamw8bit": (fse.adamw8bit, {"b1": 0.5, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3}),
    "adam8bit": (fse.adam8bit, {"b1": 0.5, "b2": 0.9, "eps": 1e-2}),
    "lamb8bit": (fse.lamb8bit, {"b1": 0.5, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3}),
    "lion8bit": (fse.lion8bit, {"b1": 0.5, "b2": 0.9, "weight_decay": 0.3}),
    "ademamix8bit": (fse.ademamix8bit, {"b1": 0.5, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3}),
    "adagrad8bit": (fse.adagrad8bit, {"eps": 1e-2}),
    "rmsprop8bit": (fse.rmsprop8bit, {"b2": 0.5, "eps": 1e-2}),
    "sgd8bit": (lambda lr, **hyper: fse.sgd8bit(lr, 0.9, **hyper), {"b1": 0.5}),
    "lars8bit": (fse.lars8bit, {"b1": 0.5, "weight_decay": 0.3}),
}
THEIR_NAMES = {("rmsprop8bit", "b2"): "decay", ("sgd8bit", "b1"): "momentum", ("lars8bit", "b1"): "momentum"}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused_update"])
@pytest.mark.one_in(13)
def test_a_rule_sets_hyperparameters_of_the_parameters_that_it_matches(name, fused):
    """These parameters step as with an optimizer that has the values for all, the others as without the rule."""
    make, overrides = EVERY[name]
    renamed = {THEIR_NAMES.get((name, key), key): value for key, value in overrides.items()}
    if name == "sgd8bit":
        special = fse.sgd8bit(0.005, renamed["momentum"], state_format=SMALL)
    else:
        special = make(0.005, **renamed, state_format=SMALL)
    plain = make(0.01, state_format=SMALL)
    tx = make(0.01, rules=(("^(kernel|wte)", fse.Rule(lr_scale=0.5, **overrides)),), state_format=SMALL)
    results = []
    for one in (tx, special, plain):
        params, state = parameters(), one.init(parameters())
        for i in range(2):
            grads = gradients(i)
            params, state = jitted_fused(one)(grads, state, params) if fused else jitted(one)(grads, state, params)[:2]
        results.append(params)
    found, with_all, without = results
    for key in ("kernel", "wte"):
        assert_nearly(found[key], with_all[key])
        assert not np.allclose(jax.tree.leaves(found[key])[0], jax.tree.leaves(without[key])[0], rtol=0, atol=1e-6)
    assert_nearly(found["norm"], without["norm"])


def test_the_weight_decay_of_a_rule_overrides_the_mask():
    rules = (("kernel", fse.Rule(weight_decay=0.5)),)
    tx = fse.adamw8bit(1.0, weight_decay=0.1, mask=False, rules=rules, state_format=SMALL)
    zero = jax.tree.map(jnp.zeros_like, parameters())
    updates, _ = tx.update(zero, tx.init(parameters()), parameters())
    assert_nearly(updates["kernel"], -0.5 * parameters()["kernel"])
    assert not np.any(np.asarray(updates["norm"]["scale"]))
    none = fse.adamw8bit(1.0, weight_decay=0.1, rules=(("kernel", fse.Rule(weight_decay=0.0)),), state_format=SMALL)
    updates, _ = none.update(zero, none.init(parameters()), parameters())
    assert not np.any(np.asarray(updates["kernel"]))


def test_the_first_rule_that_matches_is_the_only_one():
    rules = (("kernel", fse.Rule(lr_scale=0.0)), (".*", fse.Rule(32)))
    tx = fse.adam8bit(1.0, rules=rules, state_format=SMALL)
    updates, state = jitted(tx)(gradients(), tx.init(parameters()), parameters())[2::-1][:2]
    assert not np.any(np.asarray(updates["kernel"]))
    assert is_codes(state[0].mu["kernel"])  # the defaults decide what the first rule does not set


def test_lr_scale_works_in_scale_by_transforms():
    tx = fse.scale_by_adam8bit(rules=(("kernel", fse.Rule(lr_scale=0.25)),), state_format=SMALL)
    plain = fse.scale_by_adam8bit(state_format=SMALL)
    updates, _ = jax.jit(tx.update)(gradients(), tx.init(parameters()))
    expected, _ = jax.jit(plain.update)(gradients(), plain.init(parameters()))
    assert_nearly(updates, expected | {"kernel": 0.25 * expected["kernel"]})


def test_describe_shows_hyperparameters_of_rules():
    rules = (("kernel", fse.Rule(8, lr_scale=0.1, b2=0.99, weight_decay=0.0)), ("wte", fse.Rule(lr_scale=2.0)))
    report = fse.describe(fse.adamw8bit(1e-3, rules=rules, state_format=SMALL), parameters())
    found = {row.path: row.overrides for row in report.rows}
    assert found == {
        "kernel": "lr_scale=0.1, b2=0.99, weight_decay=0",
        "norm/scale": "",
        "wte/embedding": "lr_scale=2",
    }
    assert "lr_scale=0.1, b2=0.99, weight_decay=0" in str(report)


@pytest.mark.parametrize(
    ("make", "rule", "message"),
    [
        (lambda r: fse.lion8bit(1e-3, rules=r), fse.Rule(eps=1e-3), r"sets eps, but lion has no such .*b1, b2, weight"),
        (lambda r: fse.adam8bit(1e-3, rules=r), fse.Rule(weight_decay=0.1), r"sets weight_decay, but adam has no"),
        (lambda r: fse.scale_by_adam8bit(rules=r), fse.Rule(weight_decay=0.1), r"sets weight_decay, but adam has no"),
        (lambda r: fse.sgd8bit(1e-3, rules=r), fse.Rule(b1=0.5), r"sets b1, but sgd has no such"),
        (lambda r: fse.sgd8bit(1e-3, 0.9, rules=r), fse.Rule(b1=0.5, b2=0.1, eps=1), r"sets b2, eps, but sgd"),
        (lambda r: fse.rmsprop8bit(1e-3, rules=r), fse.Rule(b1=0.5), r"sets b1, but rmsprop has no such"),
        (lambda r: fse.lion8bit(1e-3, rules=r), fse.Rule("rowwise"), r"lion has no second moment. Use 'bf16' or 8"),
    ],
)
def test_a_hyperparameter_that_the_optimizer_does_not_have_is_refused(make, rule, message):
    with pytest.raises(ValueError, match=message):
        make((("kernel", rule),))


@pytest.mark.parametrize("value", ["0.1", None, True, optax.constant_schedule(0.1), jnp.float32(0.1)], ids=type)
def test_an_lr_scale_that_is_not_a_number_is_refused(value):
    with pytest.raises(TypeError, match="`lr_scale` of a Rule must be a number"):
        fse.Rule(lr_scale=value)


def test_lr_scale_can_be_a_numpy_number_but_not_nan():
    assert fse.Rule(lr_scale=np.float32(0.5)) == fse.Rule(lr_scale=0.5)
    with pytest.raises(ValueError, match="`lr_scale` of a Rule must be finite, got nan"):
        fse.Rule(lr_scale=float("nan"))


# --- cases that break overrides by identity or by position, as in bitsandbytes ---------------------------------------

HEAD = (("head", fse.Rule(32, lr_scale=0.5)),)


def tree(**leaves):
    return {name: {"kernel": jnp.full((64, 64), value)} for name, value in leaves.items()}


def bits(state):
    return {name: x["kernel"].dtype for name, x in state[0].mu.items()}


def test_two_optimizers_in_one_process_have_separate_rules():
    first, second = fse.adam8bit(1e-3, rules=HEAD), fse.adam8bit(1e-3)
    params = tree(body=1.0, head=2.0)
    first.init(params)
    assert bits(second.init(params)) == {"body": jnp.int8, "head": jnp.int8}
    assert bits(first.init(params)) == {"body": jnp.int8, "head": jnp.float32}
    other = tree(head=1.0, neck=2.0)  # the same positions, other names
    assert bits(first.init(other)) == {"head": jnp.float32, "neck": jnp.int8}


def test_copies_and_restored_checkpoints_keep_the_rule(tmp_path):
    tx, params = fse.adam8bit(1e-3, rules=HEAD), tree(body=1.0, head=2.0)
    state = tx.init(params)
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    expected = jitted(tx)(grads, state, params)
    assert not np.allclose(expected[2]["head"]["kernel"], expected[2]["body"]["kernel"])
    copied = copy.deepcopy(tx)
    assert_same_bits(jitted(copied)(grads, copy.deepcopy(state), copy.deepcopy(params)), expected)
    again = fse.adam8bit(1e-3, rules=HEAD)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: (params, again.init(params))))
    assert_same_bits(jitted(again)(grads, restored[1], restored[0]), expected)
    buffer = io.BytesIO(flax.serialization.to_bytes(state))
    state = flax.serialization.from_bytes(again.init(params), buffer.getvalue())
    assert_same_bits(jitted(again)(grads, jax.tree.map(jnp.asarray, state), params), expected)


def test_a_tied_weight_is_one_parameter_with_one_rule():
    class Tied(nnx.Module):
        def __init__(self):
            self.wte = fse.nnx.Embed(64, 64, rngs=nnx.Rngs(0))
            self.head = self.wte  # the same variable under a second name

        def __call__(self, ids):
            return self.head.attend(self.wte(ids))

    def trained(**options):
        model = Tied()
        optimizer = nnx.Optimizer(model, fse.adam8bit(1e-3, **options), wrt=nnx.Param)
        before = model.wte.embedding[...]
        for _ in range(2):
            grads = nnx.grad(lambda model: jnp.mean(model(jnp.arange(8)) ** 2))(model)
            optimizer.update(model, grads)
        (moment,) = jax.tree.leaves(as_pure(optimizer.opt_state[0].mu))
        assert model.head.embedding[...] is model.wte.embedding[...]
        return moment.dtype, model.wte.embedding[...] - before

    dtype, moved = trained()
    assert dtype == jnp.float32  # it is found as an embedding under either name
    for pattern in ("embedding", "head"):  # NNX shows the first of the two paths of a variable
        dtype, half = trained(rules=((pattern, fse.Rule(8, lr_scale=0.5)),))
        assert dtype == jnp.int8
        assert abs(np.median(np.abs(half[:8])) / np.median(np.abs(moved[:8])) - 0.5) < 0.02
    with pytest.raises(ValueError, match=r"'wte'. The parameters are: head/embedding\. .* tied .* one path"):
        trained(rules=(("wte", 8),))


def test_a_rule_still_matches_if_parameters_are_nested_deeper():
    """The same leaf is stored in fp32 and has its own learning rate under every prefix of the paths."""
    tx = fse.adam8bit(1e-3, rules=(("(^|/)head/", fse.Rule(32, lr_scale=0.5)),))
    names = [lambda p: p, lambda p: {"params": p}, lambda p: {"lm": p}, lambda p: {"decoder": {"inner": p}}]
    results = []
    for wrap in names:
        params = wrap(tree(body=1.0, head=2.0))
        _, state, updates = jitted(tx)(params, tx.init(params), params)
        dtypes = {jax.tree_util.keystr(p): x.dtype for p, x in jax.tree_util.tree_leaves_with_path(state[0].mu)}
        assert all((dtype == jnp.float32) == ("head" in path) for path, dtype in dtypes.items())
        results.append(jax.tree.leaves(updates))
    for updates in results[1:]:
        assert_same_bits(updates, results[0])
    body, head = results[0]
    np.testing.assert_allclose(head.ravel()[0], 0.5 * body.ravel()[0], rtol=1e-5)


def test_a_rule_still_matches_in_a_deep_copy_of_a_module():
    class Model(nnx.Module):
        def __init__(self):
            self.body, self.head = (nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(2))

    model = Model()
    for one in (model, copy.deepcopy(model), nnx.clone(model)):
        optimizer = nnx.Optimizer(one, fse.adam8bit(1e-3, rules=(("head/kernel", 32),)), wrt=nnx.Param)
        mu = nnx.to_pure_dict(optimizer.opt_state[0].mu) if hasattr(nnx, "to_pure_dict") else optimizer.opt_state[0].mu
        assert (mu["head"]["kernel"].dtype, mu["body"]["kernel"].dtype) == (jnp.float32, jnp.int8)


def test_the_report_shows_everything_that_a_rule_sets():
    rule = fse.Rule(8, SMALL, lr_scale=0.5, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.25)
    row = fse.describe(fse.adamw8bit(1e-3, rules=(("head", rule),)), tree(body=1.0, head=2.0)).rows[1]
    assert (row.path, row.bits) == ("head/kernel", 8)
    assert row.overrides == "lr_scale=0.5, b1=0.8, b2=0.9, eps=1e-06, weight_decay=0.25"
    shown = fse.StateFormat("linear", block_size=16, block_axis=0, min_size=0)
    row = fse.describe(fse.adamw8bit(1e-3, rules=(("head", fse.Rule(8, shown)),)), tree(head=2.0)).rows[0]
    assert row.block == "16 on axis 0, linear"


def test_every_optimizer_with_a_rule_is_swept():
    assert EVERY.keys() == {name for name in vars(fse) if name.endswith("8bit") and not name.startswith("scale_by")}


def test_the_b3_schedule_of_bitsandbytes_ademamix_starts_from_the_b1_of_a_rule():
    make = lambda **options: fse.interop.bitsandbytes.ademamix8bit(1e-2, t_beta3=20, **options)  # noqa: E731
    special, ruled = make(b1=0.5), make(rules=(("kernel", fse.Rule(b1=0.5)),))
    results = []
    for tx in (special, ruled):
        params, state = parameters(), tx.init(parameters())
        for i in range(4):
            updates, state = jitted(tx)(gradients(i), state, params)[:2]
        results.append((updates["kernel"], state[0].m2["kernel"], state[0].m2_absmax["kernel"]))
    assert_same_bits(*results)
    zero = make(rules=((".*", fse.Rule(b1=0.0)),))
    with pytest.raises(ValueError, match="`b1` must be between 0 and 1"):
        zero.update(gradients(0), zero.init(parameters()), parameters())
