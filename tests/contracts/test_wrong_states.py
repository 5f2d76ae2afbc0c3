"""Tests that a state which a loader has cast or reordered is an error in every optimizer, and never an update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
@pytest.mark.one_in(3)
def test_float16_in_a_state_is_an_error(name, where, jitted):
    tx, params, state = trained(name)
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(ValueError, match="is float16 in the state, where `init` makes float32"):
        update(gradients(5), cast(state, jnp.float16, where), params)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(3, start=1)
def test_scales_in_bfloat16_are_widened(name):
    tx, params, state = trained(name)
    want, _ = tx.update(gradients(5), state, params)
    found, after = tx.update(gradients(5), cast(state, jnp.bfloat16, "absmax"), params)
    np.testing.assert_allclose(found["kernel"], want["kernel"], atol=0.02 * float(jnp.abs(want["kernel"]).max()))
    assert not any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.one_in(4)
def test_convert_state_returns_the_dtypes_of_its_target(name, dtype):
    tx, params, state = trained(name)
    found = fse.convert_state(tx, tx, params, cast(state, dtype, ""))
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(3, start=2)
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
@pytest.mark.one_in(2)
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
