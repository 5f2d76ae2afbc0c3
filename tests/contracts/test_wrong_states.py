"""Tests that a state which a loader has cast or reordered is an error in every optimizer, and never an update."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import build, gradients, is_codes, kinds, parameters

WRAPPED = {name: getattr(optax, name) for name in ("adamw", "lion", "adagrad")}
TRANSFORMS = {case.name: lambda case=case: build(case) for case in OPTIMIZERS} | {
    f"quantize_state({name})": lambda make=make: fse.quantize_state(
        make(1e-3), state_format=fse.StateFormat(min_size=0)
    )
    for name, make in WRAPPED.items()
}


def trained(name):
    tx, params = TRANSFORMS[name](), parameters()
    state = tx.init(params)
    for i in range(3):
        _, state = jax.jit(tx.update)(gradients(i), state, params)
    return tx, params, state


def cast(state, dtype, where):
    """Returns the state with some of its floating point arrays in another dtype."""

    def one(path, x):
        chosen = where in jax.tree_util.keystr(path) and jnp.issubdtype(x.dtype, jnp.floating) and x.ndim == 2
        return x.astype(dtype) if chosen else x

    changed = jax.tree_util.tree_map_with_path(one, state)
    assert kinds(changed) != kinds(state)
    return changed


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("where", ["absmax", "embedding"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.one_in(5)
def test_float16_in_a_state_is_an_error(name, where, jitted):
    tx, params, state = trained(name)
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(ValueError, match="is float16 in the state, where `init` makes float32"):
        update(gradients(5), cast(state, jnp.float16, where), params)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(5, start=1)
def test_scales_in_bfloat16_are_widened(name):
    tx, params, state = trained(name)
    want, _ = tx.update(gradients(5), state, params)
    found, after = tx.update(gradients(5), cast(state, jnp.bfloat16, "absmax"), params)
    np.testing.assert_allclose(found["kernel"], want["kernel"], atol=0.02 * float(jnp.abs(want["kernel"]).max()))
    assert not any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.one_in(7)
def test_convert_state_returns_the_dtypes_of_its_target(name, dtype):
    tx, params, state = trained(name)
    found = fse.convert_state(tx, tx, params, cast(state, dtype, ""))
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(5, start=2)
def test_codes_that_became_floats_are_an_error(name):
    tx, params, state = trained(name)
    floats = jax.tree.map(lambda x: x * 1.0 if is_codes(x) and x.ndim == 2 else x, state)
    with pytest.raises(ValueError, match="'kernel'"):
        jax.jit(tx.update)(gradients(5), floats, params)


def renamed(state, field):
    """Returns the state with another key in one of its fields."""

    def one(node):
        values = getattr(node, field)
        return node._replace(**{field: {("z" + k if k == "kernel" else k): v for k, v in values.items()}})

    is_ours = lambda x: hasattr(x, "_fields") and field in x._fields  # noqa: E731
    return jax.tree.map(lambda x: one(x) if is_ours(x) else x, state, is_leaf=is_ours)


FIELDS = [
    (case.name, field)
    for case in OPTIMIZERS
    for moment in case.moments
    for field in (moment, f"{moment}_absmax")
]  # fmt: skip


@pytest.mark.parametrize(("name", "field"), FIELDS)
@pytest.mark.one_in(4)
def test_every_field_is_compared_by_its_paths(name, field):
    tx, params, state = trained(name)
    with pytest.raises(ValueError, match=f"gradients have a leaf .* where `{field}` of the optimizer state has"):
        tx.update(gradients(5), renamed(state, field), params)


@pytest.mark.parametrize("field", ["mu", "nu"])
def test_every_field_of_a_wrapped_state_is_compared_by_its_paths(field):
    tx, params, state = trained("quantize_state(adamw)")
    with pytest.raises(ValueError, match="where `init` makes"):
        tx.update(gradients(5), renamed(state, field), params)
    scales = dict(state.absmax)
    name = next(k for k in scales if k.endswith(field))
    scales[name] = {("z" + k if k == "kernel" else k): v for k, v in scales[name].items()}
    with pytest.raises(ValueError, match=r"`absmax\[.*\]` of the state has a leaf .* where `init` makes"):
        tx.update(gradients(5), state._replace(absmax=scales), params)


# --- states that a loader has padded or truncated, as orbax does with strict=False ---

MADE_WITH = {
    "another codec": {"state_format": fse.StateFormat("dynamic", min_size=0)},
    "linear": {"state_format": fse.StateFormat("linear", min_size=0)},
    "another block size": {"state_format": fse.StateFormat(block_size=32, min_size=0)},
    "another axis": {"state_format": fse.StateFormat(block_axis=-1, min_size=0)},
    "32 bits": {"rules": ((".*", 32),)},
    "rules": {"rules": (("kernel", fse.Rule(8, fse.StateFormat("dynamic", min_size=0))),)},
}
INNER = {
    "split_weights": fse.split_weights,
    "stochastic_round_updates": fse.stochastic_round_updates,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "norm": {"scale": False}, "wte": True}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 1),
    "percentile_clipping": lambda tx: fse.chain(fse.percentile_clipping(50, history=4), tx),
}


def make(name, **options):
    """Makes a transform of `TRANSFORMS` or `INNER` with other options."""
    options = {"state_format": fse.StateFormat(min_size=0)} | options
    if name in INNER:
        return INNER[name](fse.adamw8bit(1e-3, **options))
    if name.startswith("quantize_state"):
        return fse.quantize_state(WRAPPED[name[15:-1]](1e-3), **options)
    (case,) = [case for case in OPTIMIZERS if case.name == name]
    return case.ours(**case.hyper, **options)


def padded_or_truncated(state, like):
    """Returns the arrays of a state with the shapes and dtypes of another one."""

    def one(x, want):
        x = np.asarray(x)
        if x.ndim != want.ndim:
            return np.zeros(want.shape, want.dtype)
        result = np.zeros(want.shape, want.dtype)
        both = tuple(slice(min(m, n)) for m, n in zip(x.shape, want.shape))
        result[both] = x[both].astype(want.dtype)
        return jnp.asarray(result)

    return jax.tree.map(one, state, like)


def wrong_state(name, made_with):
    """Returns a transform, parameters, and a state of another transform in the shapes of its own."""
    tx, other, params = make(name), make(name, **MADE_WITH[made_with]), parameters()
    state = other.init(params)
    for i in range(2):
        _, state = jax.jit(other.update)(gradients(i), state, params)
    return tx, params, padded_or_truncated(state, tx.init(params)), other


SWEPT = [(name, made_with) for name in (*TRANSFORMS, *INNER) for made_with in MADE_WITH]


@pytest.mark.parametrize(("name", "made_with"), SWEPT)
@pytest.mark.one_in(16)
def test_a_padded_or_truncated_state_is_an_error_and_under_jit_gives_nan(name, made_with):
    tx, params, state, other = wrong_state(name, made_with)
    if jax.tree.map(np.shape, tx.init(params)) == jax.tree.map(np.shape, other.init(params)):
        tx.update(gradients(3), state, params)  # the same storage under another name: both choose these blocks
        return
    if name not in ("MultiSteps", "apply_if_finite"):  # these trace their transform in every step
        with pytest.raises(ValueError, match="`format` says that other rules or another `state_format` made it"):
            tx.update(gradients(3), state, params)
    updates, after = jax.jit(tx.update)(gradients(3), state, params)
    for key, update in updates.items():
        masked = name == "masked" and key == "norm"
        assert masked or all(np.isnan(x).all() for x in jax.tree.leaves(update)), key
    again, _ = jax.jit(tx.update)(gradients(3), after, params)
    assert np.isnan(again["kernel"]).all()


@pytest.mark.parametrize(("name", "made_with"), SWEPT)
@pytest.mark.one_in(23)
def test_convert_state_refuses_a_padded_or_truncated_state(name, made_with):
    tx, params, state, other = wrong_state(name, made_with)
    if jax.tree.map(np.shape, tx.init(params)) == jax.tree.map(np.shape, other.init(params)):
        return
    with pytest.raises(ValueError, match=r"`state` was not made by `tx_from`: .*pads or truncates"):
        fse.convert_state(tx, tx, params, state)
    converted = jax.jit(lambda state: fse.convert_state(tx, tx, params, state))(state)
    updates, _ = jax.jit(tx.update)(gradients(3), converted, params)
    assert np.isnan(updates["kernel"]).all()


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(4)
def test_a_state_of_zeros_is_a_new_state(name):
    tx, params, state = trained(name)
    if "adagrad" in name:
        return  # its sums do not begin with zero
    fresh, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, state)
    for update in (tx.update, jax.jit(tx.update)):
        want, found = update(gradients(5), fresh, params), update(gradients(5), zeros, params)
        for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", (*TRANSFORMS, *INNER))
@pytest.mark.one_in(4)
def test_a_state_of_zeros_of_numpy_is_one_of_zeros_of_jax(name):
    tx, params = make(name), parameters()
    ours, theirs = (jax.tree.map(zeros_like, tx.init(params)) for zeros_like in (jnp.zeros_like, np.zeros_like))
    for update in (tx.update, jax.jit(tx.update)):
        want, found = update(gradients(5), ours, params), update(gradients(5), theirs, params)
        assert jax.tree.structure(found) == jax.tree.structure(want)
        for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        update(gradients(6), found[1], params)


def test_a_fused_step_from_a_wrong_state_gives_nan():
    tx, params, state, _ = wrong_state("adamw8bit", "another codec")
    with pytest.raises(ValueError, match="`format` says"):
        fse.fused_update(tx, gradients(3), state, params)
    after, _ = jax.jit(lambda *args: fse.fused_update(tx, *args))(gradients(3), state, params)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(after))
    skipping = fse.adamw8bit(1e-3, state_format=fse.StateFormat(min_size=0), skip_nonfinite=True)
    after, _ = jax.jit(lambda *args: fse.fused_update(skipping, *args))(gradients(3), state, params)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(after))


def test_a_chainable_transform_without_a_learning_rate_gives_nan_for_a_wrong_state():
    tx, other = (fse.scale_by_adam8bit(state_format=fse.StateFormat(c, min_size=0)) for c in ("root", "dynamic"))
    params = parameters()
    state = padded_or_truncated(other.init(params), tx.init(params))
    updates, _ = jax.jit(tx.update)(gradients(), state, params)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(updates))


def test_row_sparse_gives_nan_for_a_wrong_state():
    tx, other = (
        fse.row_sparse(fse.adamw8bit(1e-3, state_format=fse.StateFormat(c, min_size=0))) for c in ("root", "dynamic")
    )
    params = parameters()
    state = padded_or_truncated(other.init(params), tx.init(params))
    ids = jnp.array([1, 3])
    with pytest.raises(ValueError, match="`format` says"):
        tx.update(params, state, params, token_ids=ids)
    updates, _ = jax.jit(lambda g, s, p: tx.update(g, s, p, token_ids=ids))(params, state, params)
    assert np.isnan(optax.apply_updates(params, updates)["wte"]["embedding"][ids]).all()


def test_dump_optimizer_state_refuses_a_padded_or_truncated_state():
    tx, params, state, _ = wrong_state("adamw8bit", "another codec")
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0}
    with pytest.raises(
        ValueError, match="`state` was not made by `tx`: `state_format` had codec 'dynamic', here 'root'"
    ):
        fse.interop.bitsandbytes.dump_optimizer_state(
            tx, params, state, order=["kernel", "norm/scale", "wte/embedding"], param_groups=group
        )


def test_orbax_with_strict_false_cannot_change_a_codec_silently(tmp_path):
    other, params = make("adamw8bit", state_format=fse.StateFormat("dynamic", min_size=0)), parameters()
    _, state = jax.jit(other.update)(gradients(), other.init(params), params)
    tx = make("adamw8bit")
    wanted = ocp.checkpoint_utils.construct_restore_args(tx.init(params))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(**vars(x) | {"strict": False}), wanted)
        restored = checkpointer.restore(tmp_path / "state", item=tx.init(params), restore_args=arguments)
    with pytest.raises(ValueError, match="`format` says that other rules or another `state_format` made it"):
        tx.update(gradients(3), restored, params)


# --- what a loader or a user may make of single arrays ---------------------------------------------------------------

BAD_DTYPES = [jnp.int32, jnp.uint32, jnp.int16, jnp.bool_, jnp.float8_e4m3fn, jnp.complex64]


def changed(state, where, change, like=lambda x: True):
    """Returns the state with `change` applied to the arrays at paths that end with `where`."""
    found = []

    def one(path, x):
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith(where) or not like(x):
            return x
        found.append(path)
        return change(x)

    new = jax.tree_util.tree_map_with_path(one, state)
    assert found
    return new


def is_wide(x):
    return x.ndim == 2 and x.dtype == jnp.float32 and x.size > 1


def assert_refused(tx, state, params, match, errors=ValueError):
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(errors, match=match):
            update(gradients(5), state, params)


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(10)
def test_float32_moments_in_a_dtype_that_init_never_makes_are_an_error(name, dtype):
    tx, params, state = trained(name)
    bad = changed(state, "embedding", lambda x: x.astype(dtype), is_wide)
    assert_refused(tx, bad, params, f"{np.dtype(dtype).name} .*in the state|state.* is {np.dtype(dtype).name}")


@pytest.mark.parametrize("bits", ["rowwise", "bf16"])
@pytest.mark.parametrize("dtype", BAD_DTYPES[:-1], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.one_in(5)
def test_moments_of_a_rule_in_a_dtype_that_init_never_makes_are_an_error(bits, dtype):
    tx = fse.adamw8bit(1e-3, rules=((".*", bits),))
    params = parameters()
    for field in ("mu", "nu"):
        bad = changed(tx.init(params), f"{field}/kernel", lambda x: x.astype(dtype))
        assert_refused(tx, bad, params, f"{np.dtype(dtype).name} in the state")


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("made", "used"), [(32, "rowwise"), ("rowwise", 32)])
def test_a_restore_between_rows_and_elements_is_an_error_or_nan(made, used, jitted):
    """Orbax with strict=False pads and truncates. The shapes are then right, and the second moments are not."""
    params = {"kernel": jnp.ones((64, 96))}
    before, after = (fse.adamw8bit(1e-3, rules=((".*", bits),)) for bits in (made, used))
    state, like = before.init(params), after.init(params)
    for _ in range(2):
        _, state = before.update(params, state, params)

    def resized(x, want):
        x = np.asarray(x)
        if not x.ndim:
            return x
        cut = x[tuple(slice(n) for n in want.shape)]
        return jnp.asarray(np.pad(cut, [(0, n - m) for n, m in zip(want.shape, cut.shape)]))

    bad = jax.tree.map(resized, state, like)
    if jitted:
        assert jnp.isnan(jax.jit(after.update)(params, bad, params)[0]["kernel"]).all()
    else:
        with pytest.raises(ValueError, match="checkpoint loader padded or truncated"):
            after.update(params, bad, params)


def test_a_second_moment_that_lost_its_columns_is_not_taken_for_one_of_rows():
    tx, params, state = trained("adamw8bit")
    bad = changed(state, "nu/wte/embedding", lambda x: x[:, :1])
    with pytest.raises(ValueError, match="checkpoint loader padded or truncated"):
        tx.update(gradients(5), bad, params)
    updates, _ = jax.jit(tx.update)(gradients(5), bad, params)
    assert all(jnp.isnan(u).all() for u in jax.tree.leaves(updates))


def test_rows_without_a_gradient_are_still_in_the_format():
    params = {"a": jnp.ones((64, 96)), "b": jnp.ones((64, 96))}
    for make in (fse.adamw8bit, fse.rmsprop8bit, fse.adagrad8bit):
        tx = make(1e-3, rules=((".*", "rowwise"),))
        updates, _ = tx.update(params | {"b": None}, tx.init(params), params)
        assert updates["b"] is None and jnp.isfinite(updates["a"]).all()


@pytest.mark.parametrize("shape", [(1, 64), (96, 1), (48, 64)], ids=str)
def test_a_wrapped_state_with_arrays_of_other_shapes_is_an_error(shape):
    tx = fse.quantize_state(optax.adam(1e-3))
    params = {"a": jnp.ones((64, 64)), "embedding": jnp.ones((96, 64))}
    bad = changed(tx.init(params), "nu/embedding", lambda x: jnp.ones(shape))
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"`inner\.0\.nu\.embedding` of the state is float32 of shape"):
            update(params, bad, params)


@pytest.mark.parametrize("name", ["adamw8bit", "quantize_state(adamw)"])
@pytest.mark.parametrize("value", [None, 0.0], ids=["None", "a_float"])
@pytest.mark.parametrize("where", ["mu/kernel", "nu/norm/scale", "kernel", "format"])
@pytest.mark.one_in(5)
def test_a_state_in_which_an_array_is_missing_is_an_error(name, value, where):
    tx, params, state = trained(name)
    bad = changed(state, where, lambda x: value)
    with pytest.raises((ValueError, TypeError)) as error:
        tx.update(gradients(5), bad, params)
    assert not isinstance(error.value, AttributeError) and "init" in str(error.value)


BAD_FORMATS = {
    "int32": lambda x: x.astype(jnp.int32),
    "int8": lambda x: x.astype(jnp.int8),
    "bool": lambda x: x != 0,
    "float32": lambda x: x.astype(jnp.float32),
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "float8_e4m3fn": lambda x: x.astype(jnp.float8_e4m3fn),
    "of shape ()": lambda x: x[0],
    "of shape (2,": lambda x: jnp.stack([x, x]),
    "of shape (1,": lambda x: np.asarray(x)[None],
}


@pytest.mark.parametrize("name", (*TRANSFORMS, *INNER))
@pytest.mark.parametrize("found", BAD_FORMATS)
@pytest.mark.one_in(11)
def test_a_format_of_another_dtype_or_shape_is_an_error(name, found):
    tx, params = make(name), parameters()
    for zeros in (False, True):
        state = jax.tree.map(jnp.zeros_like, tx.init(params)) if zeros else tx.init(params)
        bad = changed(state, "format", BAD_FORMATS[found])
        assert_refused(tx, bad, params, rf"`format` of the state is .*{re.escape(found)}.*a vector of uint8.* `init`")


@pytest.mark.parametrize("found", BAD_FORMATS)
def test_a_bad_format_is_an_error_before_its_values_are_read(found):
    """It is the first error of a state with other scales, of `convert_state` and of `dump_optimizer_state`."""
    tx, params = make("adamw8bit"), parameters()
    bad = changed(tx.init(params), "format", BAD_FORMATS[found])
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0}
    order = ["kernel", "norm/scale", "wte/embedding"]
    dump = fse.interop.bitsandbytes.dump_optimizer_state
    for read in (
        lambda: tx.update(gradients(), changed(bad, "mu_absmax/kernel", lambda x: x[:, :1]), params),
        lambda: fse.convert_state(tx, tx, params, bad),
        lambda: dump(tx, params, bad, order=order, param_groups=group),
    ):
        with pytest.raises(ValueError, match=rf"`format` of the state is .*{re.escape(found)}.*a vector of uint8"):
            read()


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "change", [lambda x: x.astype(jnp.int8), lambda x: x.astype(jnp.float32), lambda x: x[None]], ids=["8", "f", "1d"]
)
@pytest.mark.one_in(8)
def test_a_count_that_cannot_count_is_an_error(case, change):
    tx, params, state = trained(case.name)
    bad = tuple(x._replace(count=change(x.count)) if "mu_absmax" in str(x._fields) or hasattr(x, "format") else x
                for x in state)  # fmt: skip
    assert_refused(tx, bad, params, "where `init` makes an int32 scalar")


def test_convert_state_refuses_moments_that_a_loader_made_integers():
    params = parameters()
    before, after = optax.adam(1e-3), fse.adam8bit(1e-3)
    bad = changed(before.init(params), "mu/kernel", lambda x: x.astype(jnp.int32))
    with pytest.raises(ValueError, match="mu/kernel is another kind of array of shape"):
        fse.convert_state(before, after, params, bad)
