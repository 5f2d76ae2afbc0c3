"""Tests the format code in the state of every optimizer, and the step over a tree of parameters."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.optim.storage.format_code import format_code
from tests.tools import SMALL, assert_same_bits, gradients, jitted, parameters, types


def test_the_length_of_a_format_code_differs_for_every_sequence_of_codecs():
    codecs = ("root", "dynamic", "linear")
    sequences = [s for n in (1, 2, 3) for s in itertools.product(codecs, repeat=n)]
    lengths = [format_code([fse.StateFormat(codec) for codec in s]).shape for s in sequences]
    assert len(set(lengths)) == len(sequences) == 39
    assert max(lengths) == (468,)


def test_a_format_code_differs_for_every_setting_that_codes_depend_on():
    formats = [
        fse.StateFormat(),
        fse.StateFormat(block_size=256),
        fse.StateFormat(block_size=512),
        fse.StateFormat(block_axis=-1),
        fse.StateFormat(block_axis=0),
        fse.StateFormat(block_axis=1),
        fse.StateFormat(shards=16),
    ]
    for same in (fse.StateFormat(rounding="stochastic"), fse.StateFormat(min_size=0)):
        np.testing.assert_array_equal(format_code([same]), format_code([fse.StateFormat()]))
    vectors = {bytes(np.asarray(format_code([f]))) for f in formats}
    assert len(vectors) == len(formats)
    for f in formats:
        vector = format_code([f])
        assert vector.dtype == jnp.uint8 and vector.shape == (12,)


def test_the_format_code_lists_the_default_format_and_then_those_of_the_rules():
    dynamic, linear = (fse.StateFormat(codec, min_size=0) for codec in ("dynamic", "linear"))
    rules = (("kernel", fse.Rule(8, dynamic)), ("norm", 32), ("scale", fse.Rule(state_format=linear)))
    params = {name: jnp.ones((64, 64)) for name in ("kernel", "norm", "scale")}
    state = fse.scale_by_adam8bit(rules=rules, state_format=SMALL).init(params)
    named, found = (
        np.asarray(x)[: 3 * 12].reshape(3, 12) for x in (format_code([SMALL, dynamic, linear]), state.format)
    )
    np.testing.assert_array_equal(found[:, :8], named[:, :8])
    assert (found[:, 8:] == found[0, 8:]).all() and (found[0, 8:] != named[0, 8:]).any()  # the checksum of the layout


@pytest.mark.parametrize(
    "made_with",
    [
        {"state_format": fse.StateFormat("linear", min_size=0)},
        {"rules": (("kernel", fse.Rule(8, fse.StateFormat("linear", min_size=0))),)},
    ],
    ids=["codec", "rule"],
)
def test_a_state_of_another_codec_is_refused_even_if_shapes_and_dtypes_agree(made_with):
    params = {"kernel": jnp.ones((64, 64))}
    ours, theirs = (fse.adamw8bit(1e-3, **{"state_format": SMALL} | options) for options in ({}, made_with))
    with pytest.raises(ValueError, match=r"`format`.*Make the optimizer with those that made the state"):
        ours.update(params, theirs.init(params), params)


def test_a_step_keeps_the_format_code():
    tx, params = fse.adamw8bit(1e-3, state_format=SMALL), parameters()
    state = tx.init(params)
    _, after, _ = jitted(tx)(gradients(), state, params)
    assert_same_bits(after[0].format, state[0].format)
    assert int(after[0].count) == 1


def test_a_mask_can_be_none_where_the_parameters_are_none():
    """A mask that is made by `jax.tree.map` over parameters has None where they have None."""
    params = {"absent": None, "bias": jnp.ones(8), "kernel": jnp.ones((64, 64)), "zone": None}
    mask = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    zero = jax.tree.map(jnp.zeros_like, params)
    for m in (mask, mask(params)):
        tx = fse.adamw8bit(1.0, weight_decay=0.5, mask=m, state_format=SMALL)
        theirs = optax.adamw(1.0, weight_decay=0.5, mask=m)
        updates, _ = tx.update(zero, tx.init(params), params)
        expected, _ = theirs.update(zero, theirs.init(params), params)
        assert_same_bits(updates, expected)
        assert float(updates["kernel"][0, 0]) == -0.5 and float(updates["bias"][0]) == 0.0


def test_every_parameter_has_its_own_random_numbers():
    """Stochastic rounding hashes the path and the step, so equal parameters with equal gradients get other codes."""
    state_format = fse.StateFormat(rounding="stochastic", min_size=0)
    tx = fse.scale_by_adam8bit(state_format=state_format)
    kernel = parameters()["kernel"]
    params = {"a": kernel, "b": kernel}
    step = jax.jit(tx.update)
    _, first = step(params, tx.init(params), params)
    _, second = step(params, first, params)
    assert_same_bits(first.mu["a"], first.mu["b"])
    differ = lambda x, y: np.mean(np.asarray(x) != np.asarray(y))  # noqa: E731
    assert 0.1 < differ(first.nu["a"], first.nu["b"]) < 0.9
    again = step(params, tx.init(params), params)[1]
    assert_same_bits(again, first)
    assert types(second) == types(first)


WRONG_CALLS = {
    "a state of optax": (
        lambda tx, p, s: tx.update(p, optax.adamw(1e-3).init(p), p),
        "must hold a ScaleByAdam8bitState",
    ),
    "another optimizer": (lambda tx, p, s: tx.update(p, fse.lion8bit(1e-3).init(p), p), "must hold a ScaleByAdam8bit"),
    "swapped": (lambda tx, p, s: tx.update(p, p, s), "`state` must be a tuple of 3.*update.grads, state, params"),
    "fused, swapped": (lambda tx, p, s: fse.fused_update(tx, p, p, s), "`state` must be a tuple of 3"),
    "a gradient of another shape": (
        lambda tx, p, s: tx.update(p | {"kernel": p["kernel"][:32]}, s, p),
        "'kernel' has the shape .64, 64., but its gradient .32, 64.",
    ),
    "a state of another shape": (
        lambda tx, p, s: tx.update(p | {"kernel": p["kernel"][:32]}, s, p | {"kernel": p["kernel"][:32]}),
        "'kernel' is float32 of shape .32, 64., but its `mu` in the state is int8 of shape .64, 64.",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_raises_an_error_that_says_what_is_wrong(name):
    call, message = WRONG_CALLS[name]
    tx, params = fse.adamw8bit(1e-3, state_format=SMALL), parameters()
    with pytest.raises((TypeError, ValueError), match=message):
        call(tx, params, tx.init(params))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((".*", 8), r"`rules` must be a tuple of pairs, got a single pair .* Use rules=\(\('\.\*', 8\),\)"),
        (None, r"`rules` must be a tuple of pairs .*or \(\) for the defaults, got None"),
        ("kernel", r"`rules` must be a tuple of pairs"),
        ((("kernel", "bf32"),), r"must give 8, 32, 'bf16', 'rowwise' or a Rule for each pattern, got 'bf32'"),
    ],
    ids=["one pair", "None", "text", "bits"],
)
def test_invalid_rules_raise_an_error_that_says_what_is_wrong(rules, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fse.adamw8bit(1e-3, rules=rules)


def test_a_dict_with_a_pattern_as_a_key_is_refused():
    tx = fse.adamw8bit(1e-3, rules={"kern.*": 8})
    message = r"'kern\.\*' \(the path of a label; to use it as a pattern, write a pair: \(\('kern"
    with pytest.raises(ValueError, match=message):
        tx.init(parameters())


def test_a_predicate_of_one_argument_is_refused():
    with pytest.raises(TypeError, match=r"must be a function of a path and a shape.*Try lambda path, shape"):
        fse.where(lambda path: True)


MASKED = {
    "adamw8bit": ("mask", lambda mask: fse.adamw8bit(0.1, mask=mask)),
    "lamb8bit": ("mask", lambda mask: fse.lamb8bit(0.1, weight_decay=0.1, mask=mask)),
    "lars8bit decay": ("weight_decay_mask", lambda mask: fse.lars8bit(0.1, 0.1, weight_decay_mask=mask)),
    "lars8bit ratio": ("trust_ratio_mask", lambda mask: fse.lars8bit(0.1, trust_ratio_mask=mask)),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("mask", [{"kernel": True}, [True, False, True], "kernel", {"kernel": "no"}], ids=str)
@pytest.mark.parametrize("called", [False, True], ids=["a tree", "a function"])
def test_a_mask_of_another_structure_or_without_booleans_is_refused(name, mask, called):
    argument, make = MASKED[name]
    params = parameters()
    if mask == {"kernel": "no"}:
        mask = {key: "no" for key in params}
    tx = make((lambda _: mask) if called else mask)
    with pytest.raises(ValueError, match=f"`{argument}` must"):
        tx.update(params, tx.init(params), params)


def test_a_mask_can_be_a_prefix_and_hold_numbers_or_arrays():
    params = {"a": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}, "b": jnp.ones(8)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for mask in ({"a": True, "b": False}, {"a": 1, "b": 0}, {"a": np.bool_(True), "b": jnp.asarray(False)}):
        tx = fse.adamw8bit(0.1, weight_decay=0.5, mask=mask)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert all(x.all() for x in jax.tree.leaves(updates["a"])) and not updates["b"].any()


@pytest.mark.parametrize(
    ("made_by", "given_to", "message"),
    [
        (fse.sgd8bit(0.1, momentum=0.9), fse.sgd8bit(0.1), "has a `trace`, but this optimizer keeps no moments"),
        (fse.sgd8bit(0.1), fse.sgd8bit(0.1, momentum=0.9), "has no `trace`, but this optimizer keeps trace"),
        (fse.rmsprop8bit(0.1, centered=True), fse.rmsprop8bit(0.1), "has a `mu`, but this optimizer keeps nu"),
        (fse.rmsprop8bit(0.1), fse.rmsprop8bit(0.1, centered=True), "has no `mu`, but this optimizer keeps "),
    ],
)
def test_a_state_with_other_moments_is_refused(made_by, given_to, message):
    params = {"kernel": jnp.ones((64, 64))}
    with pytest.raises(ValueError, match=message):
        given_to.update(params, made_by.init(params), params)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("learning_rate", lambda: fse.lamb8bit("1e-3")),
        ("learning_rate", lambda: fse.sgd8bit(None)),
        ("b1", lambda: fse.adamw8bit(0.1, b1=None)),
        ("b1", lambda: fse.scale_by_lion8bit(b1=lambda count: 0.9)),
        ("b3", lambda: fse.ademamix8bit(0.1, b3=None)),
        ("eps", lambda: fse.adagrad8bit(0.1, eps="small")),
        ("decay", lambda: fse.rmsprop8bit(0.1, decay=None)),
        ("momentum", lambda: fse.sgd8bit(0.1, momentum="0.9")),
        ("b1", lambda: fse.adamw8bit(0.1, (0.9, 0.99))),
        ("learning_rate", lambda: fse.adamw8bit({"kernel": jnp.ones(3)}, 0.1)),
        ("max_unorm", lambda: fse.lamb8bit(0.1, max_unorm="1")),
        ("max_unorm", lambda: fse.lars8bit(0.1, max_unorm="1")),
        ("trust_coefficient", lambda: fse.lars8bit(0.1, trust_coefficient="x")),
    ],
)
def test_a_hyperparameter_that_is_not_a_number_is_refused_when_the_optimizer_is_made(argument, make):
    with pytest.raises(TypeError, match=f"`{argument}` must be a number"):
        make()


def test_parameters_with_other_names_than_the_gradients_are_refused():
    tx, grads = fse.adamw8bit(0.1), {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}
    with pytest.raises(ValueError, match="a leaf 'a' where the parameters have 'b'"):
        tx.update(grads, tx.init(grads), {"b": jnp.ones((64, 64)), "c": jnp.ones((64, 64))})


def test_integer_parameters_are_updated_as_in_optax():
    params, grads = {"n": jnp.full((4,), 5, jnp.int32)}, {"n": jnp.zeros((4,), jnp.int32)}
    tx, theirs = fse.adamw8bit(1e-3), optax.adamw(1e-3)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    assert updates["n"].dtype == expected["n"].dtype
    expected = optax.apply_updates(params, expected)["n"]
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["n"], expected)
    np.testing.assert_array_equal(fse.fused_update(tx, grads, tx.init(params), params)[0]["n"], expected)


def test_block_sizes_can_be_numpy_integers():
    assert fse.StateFormat(block_size=np.int64(64)) == fse.StateFormat(block_size=64)
    fse.adamw8bit(0.1, state_format=fse.StateFormat(block_size=np.int64(64))).init({"kernel": jnp.ones((64, 64))})


def test_a_fused_chain_refuses_a_state_of_another_length():
    long = fse.chain(optax.clip(1.0), optax.trace(0.9), fse.adamw8bit(0.1))
    params = {"kernel": jnp.ones((64, 64))}
    with pytest.raises(TypeError, match="`state` must be a tuple of 2"):
        fse.fused_update(fse.chain(optax.clip(1.0), fse.adamw8bit(0.1)), params, long.init(params), params)
