"""Tests that a state restored into an optimizer with other rules or formats is refused or harmless, never wrong.

Orbax checks shapes and casts dtypes silently. Pickles and `flax.serialization` return what was saved. So the sweeps
below try every ordered pair of ways to store the same parameters. If the second one accepts the state of the first
after a cast, it must be the state that `convert_state` makes. If it accepts the state as saved, the updates must be
those of the optimizer that made it.
"""

import functools
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import flax_stable_embed as fse
from tests.tools import SMALL, assert_same_bits, gradients, is_codes, kinds, parameters, run

SHAPES = {
    "kernel": (64, 96),
    "square": (64, 64),
    "odd": (768,),
    "row": (1, 64),  # its one scale has the shape of the scale of an fp32 moment
    "column": (64, 1),
    "vector": (48,),
    "scalar": (),
}


def small(*args, **options):
    return {"state_format": fse.StateFormat(*args, **{"min_size": 0} | options)}


def rule(pattern, value):
    return small() | {"rules": ((pattern, value),)}


def codec_of(**codecs):
    """Rules in this order: a codec for each parameter."""
    rules = ((f"^{name}$", fse.Rule(8, fse.StateFormat(codec, min_size=0))) for name, codec in codecs.items())
    return small() | {"rules": tuple(rules)}


WAYS = {
    "root": small(),
    "dynamic": small("dynamic"),
    "linear": small("linear"),
    "stochastic": small(rounding="stochastic"),
    **{f"blocks of {n}": small(block_size=n) for n in (16, 32, 64, 128, 256, 384, 512, 1024)},
    "axis 0": small(block_axis=0),
    "axis -1": small(block_axis=-1),
    **{f"{n} shards": small(shards=n) for n in (1, 2)},
    **{f"at least {n} elements": small(min_size=n) for n in (50, 5000)},
    **{f"all {bits}": rule(".*", bits) for bits in (32, "bf16", "rowwise")},
    **{f"kernel {bits}": rule("kernel", bits) for bits in (32, "bf16", "rowwise")},
    **{f"{name} 32": rule(name, 32) for name in ("row", "column", "vector", "scalar")},
    "row bf16": rule("row", "bf16"),
    "column rowwise": rule("column", "rowwise"),
    "vector 8 by a rule": rule("vector", 8),
    "kernel dynamic": codec_of(kernel="dynamic"),
    "square dynamic": codec_of(square="dynamic"),
    "kernel linear": codec_of(kernel="linear"),
    "square linear": codec_of(square="linear"),
    "kernel dynamic, square root": codec_of(kernel="dynamic", square="root"),
    "square dynamic, kernel root": codec_of(square="dynamic", kernel="root"),
}
ADAM, ADAGRAD = fse.scale_by_adam8bit, fse.scale_by_adagrad8bit  # adagrad's codes are uint8 with every codec
FEW = ["root", "stochastic", "dynamic", "blocks of 16", "all 32", "all bf16", "all rowwise"]
FEW += ["row 32", "vector 8 by a rule", "kernel dynamic", "square dynamic"]
every_method = pytest.mark.parametrize(
    ("method", "ways"),
    [
        pytest.param(ADAM, FEW, id="adam-few"),
        pytest.param(ADAM, [*WAYS], marks=pytest.mark.slow, id="adam-all"),
        pytest.param(ADAGRAD, [*WAYS], marks=pytest.mark.slow, id="adagrad-all"),
    ],
)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


@functools.cache
def made(method, way):
    """The optimizer and a state with codes, scales and values of all sizes."""
    tx, rng = method(**WAYS[way]), np.random.default_rng(0)
    state = tx.init(params())

    def values(x):
        low, high = (-127 if x.dtype == jnp.int8 else 0, jnp.iinfo(x.dtype).max + 1) if is_codes(x) else (0.1, 1.0)
        return jnp.asarray(rng.uniform(low, high, x.shape), x.dtype)

    for name in state._fields:
        if f"{name}_absmax" in state._fields:
            moment, scales = getattr(state, name), getattr(state, f"{name}_absmax")
            scales = {k: values(x) if is_codes(moment[k]) else x for k, x in scales.items()}
            state = state._replace(**{name: jax.tree.map(values, moment), f"{name}_absmax": scales})
    return tx, state


def same_storage(state, other):
    """Returns whether the checksums in `format` are equal."""
    return np.array_equal(state.format[8:12], other.format[8:12])


def without_format(state):
    return state._replace(format=None)


@every_method
def test_a_cast_to_the_same_shapes_gives_the_state_of_convert_state(method, ways):
    through = set()
    for a, b in itertools.permutations(ways, 2):
        (before, state), after = made(method, a), made(method, b)[0]
        want = after.init(params())
        if any(x.shape != y.shape for x, y in zip(*map(jax.tree.leaves, (state, want)), strict=True)):
            continue
        cast = jax.tree.map(lambda x, y: x.astype(y.dtype), state, want)
        if not same_storage(state, want):  # two lengths of `format` agree by chance
            with pytest.raises(ValueError, match=r"`format` says|was the state made by"):
                after.update(params(), cast, params())
            continue
        through.add((a, b))
        converted = fse.convert_state(before, after, params(), state)
        assert_same_bits(without_format(cast), without_format(converted))
        jax.eval_shape(after.update, params(), cast, params())
    # Accepted pairs differ in later rounding, in two descriptions of the same storage, or in dtypes of equal values.
    assert ("root", "stochastic") in through and ("root", "vector 8 by a rule") in through
    assert ("all 32", "all bf16") in through and ("all bf16", "all 32") in through
    assert not any("dynamic" in a or "linear" in a for pair in through for a in pair)


@pytest.mark.slow
@every_method
def test_a_saved_state_that_another_optimizer_accepts_gives_the_same_updates(method, ways):
    grads = gradients(1, params())
    step = {
        way: functools.cache(lambda w: made(method, w)[0].update(grads, made(method, w)[1], params())) for way in ways
    }
    through = set()
    for a, b in itertools.permutations(ways, 2):
        state, after = made(method, a)[1], made(method, b)[0]
        try:
            jax.eval_shape(after.update, grads, state, params())
        except ValueError as error:
            assert "those that made the state" in str(error) or "the rules that made the state" in str(error)
            continue
        through.add((a, b))
        updates, _ = after.update(grads, state, params())
        assert_same_bits(updates, step[a](a)[0])
    # Without a user rule, the state decides about its bits, because NNX metadata may have set them.
    assert ("all 32", "root") in through and ("root", "all 32") not in through
    assert ("root", "dynamic") not in through and ("root", "blocks of 16") not in through


@pytest.mark.slow
@every_method
def test_a_cast_to_or_from_codes_is_refused_even_if_shapes_are_not_checked(method, ways):
    for a, b in itertools.permutations(ways, 2):
        state, after = made(method, a)[1], made(method, b)[0]
        cast = jax.tree.map(lambda x, y: x.astype(y.dtype), state, after.init(params()))
        if all(is_codes(x) == is_codes(y) for x, y in zip(*map(jax.tree.leaves, (state, cast)), strict=True)):
            continue
        with pytest.raises(ValueError, match=r"convert_state|was the state made by"):
            after.update(params(), cast, params())


# --- real checkpoints ------------------------------------------------------------------------------------------------


def adamw(way):
    return fse.adamw8bit(0.01, **WAYS[way])


def refuse(folder, names):
    """Checks that restores fail by a shape in orbax, or in the first update if orbax does not check shapes."""
    checkpointer, old = ocp.StandardCheckpointer(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    for name in names:
        checkpointer.save(Path(folder) / name, adamw(name).init(params()))
    checkpointer.wait_until_finished()
    for a, b in itertools.permutations(names, 2):
        tx = adamw(b)
        want = jax.eval_shape(tx.init, params())
        harmless = {a, b} in ({"all 32", "all bf16"}, {"row 32", "row bf16"})
        try:
            restored = checkpointer.restore(Path(folder) / a, want)
            assert harmless and kinds(restored) == kinds(want), f"{a} restored as {b}"
        except ValueError as error:
            assert "shape" in str(error) and not harmless, f"{a} as {b}: {error}"
        # With shapes without shardings, this handler casts dtypes but accepts every shape.
        casts = ocp.args.PyTreeRestore(want, restore_args=ocp.checkpoint_utils.construct_restore_args(want))
        restored = old.restore(Path(folder) / a, casts)
        try:
            jax.eval_shape(tx.update, params(), restored, params())
            assert harmless, f"{a} is accepted as {b}"
        except ValueError as error:
            assert "state" in str(error) and not harmless, f"{a} as {b}: {error}"


RESTORED = ["root", "dynamic", "all 32", "all bf16", "row 32", "square dynamic"]
MORE = ["all rowwise", "blocks of 384", "blocks of 512", "row bf16", "column rowwise", "kernel dynamic", "axis 0"]


@pytest.mark.parametrize(
    "names",
    [RESTORED, pytest.param([*RESTORED, *MORE, "1 shards"], marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_orbax_refuses_other_formats_because_shapes_differ(names, tmp_path):
    # This runs in its own process. If one array fails, orbax drops the reads of the others, which warn when they are
    # collected, possibly in a later test.
    code = f"from {__name__} import refuse; refuse({str(tmp_path)!r}, {names}); print('all refused')"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert "all refused" in done.stdout, done.stderr


LOADERS = {
    "flax.serialization": lambda state, like: serialization.from_bytes(like, serialization.to_bytes(state)),
    "pickle": lambda state, like: pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state))),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("dynamic", r"`state_format` had codec 'dynamic', here 'root'\)"),
        ("linear", r"`state_format` had codec 'linear', here 'root'\)"),
        ("kernel dynamic", "the rules' format 1 is missing here"),
        ("blocks of 384", "`state_format` had block_size 384, here None"),
        ("axis 0", r"'row' has int8 codes and scales of shape .*`state_format` had block_axis 0, here None"),
        ("kernel rowwise", None),
        ("all 32", None),
    ],
)
def test_the_first_update_raises_an_error_that_says_what_differs(loader, way, message):
    saved, loaded_by = adamw(way), adamw("root")
    state = LOADERS[loader](saved.init(params()), loaded_by.init(params()))
    if message is None:
        loaded_by.update(params(), state, params())  # it keeps the bits of the state
        return
    with pytest.raises(ValueError, match=message):
        loaded_by.update(params(), state, params())
    with pytest.raises(ValueError, match="convert_state"):
        jax.eval_shape(loaded_by.update, params(), state, params())


def test_errors_under_jit_name_the_codecs():
    state = adamw("square linear").init(params())
    with pytest.raises(ValueError, match="the rules' format 1 had codec 'linear', here 'dynamic'"):
        jax.eval_shape(adamw("kernel dynamic").update, params(), state, params())
    with pytest.raises(ValueError, match=r"says that other rules or another `state_format` made it, or that"):
        jax.eval_shape(adamw("square linear").update, params(), adamw("kernel linear").init(params()), params())


@pytest.mark.parametrize("bits", [32, "bf16", "rowwise"])
def test_the_error_names_the_rule_that_the_state_contradicts(bits):
    state = adamw("root").init(params())
    for tx in (adamw(f"all {bits}"), adamw(f"kernel {bits}")):
        with pytest.raises(ValueError, match=rf"stored with bits 8, but `rules` has \('.*', {bits!r}\)"):
            tx.update(params(), state, params())


def test_a_gradient_of_a_parameter_without_a_state_is_refused():
    params = {"a": jnp.ones((64, 128)), "b": jnp.ones((64, 128))}
    tx = fse.adamw8bit(1e-3)
    state = tx.init({"a": None, "b": params["b"]})
    with pytest.raises(ValueError, match="Parameter 'a' has a gradient, but no `mu` in the state"):
        tx.update(params, state, params)


def test_rowwise_metadata_is_refused_by_an_optimizer_without_second_moments():
    params = nnx.State({"kernel": nnx.Param(jnp.ones((64, 128)), optim_bits="rowwise")})
    with pytest.raises(ValueError, match="metadata of parameter 'kernel' asks for one second moment per row, but sgd"):
        fse.sgd8bit(1e-2).init(params)


def test_float32_and_bfloat16_differ_in_one_rounding():
    """Orbax casts from one to the other. Each step with these bits rounds in the same way, so the run continues."""
    wide, half = (fse.adamw8bit(0.01, state_format=SMALL, rules=((".*", bits),)) for bits in (32, "bf16"))
    p, state = run(wide, parameters(), 3)
    cast = jax.tree.map(lambda x, y: x.astype(y.dtype), state, half.init(p))
    assert_same_bits(cast, fse.convert_state(wide, half, p, state))
    np.testing.assert_allclose(
        run(half, p, 1, state=cast)[0]["kernel"], run(wide, p, 1, state=state)[0]["kernel"], atol=1e-3
    )
    assert optax.tree.sum(jax.tree.map(jnp.size, cast)) == optax.tree.sum(jax.tree.map(jnp.size, state))
