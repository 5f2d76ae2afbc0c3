"""Helpers for tests of optimizers: small parameters, steps, and checks of states."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import flax_stable_embed as fse
from benchmarks.counted import collectives
from flax_stable_embed.optim.engine.engine import Engine
from tests.cases import OPTIMIZERS

# For tests on purpose of small blocks that straddle devices, of which `init` warns.
may_straddle = pytest.mark.filterwarnings("ignore:Some parameters are sharded so that blocks")

SMALL = fse.StateFormat(min_size=0)  # 8 bits for every size, because the parameters of tests are small
ALL_FP32 = ((".*", 32),)
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # `pure`: Flax 0.12.6 and earlier


# AdamW has two moments and decays after the rule. LARS has one moment, sums over parameters and decays before the rule.
# The others differ from these only in their formulas.
REPRESENTATIVE = ("adamw8bit", "lars8bit")
every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
# For tests that do not depend on the formula. `make test-all` adds the other optimizers.
every_kind_of_optimizer = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in REPRESENTATIVE else pytest.mark.slow, id=c.name) for c in OPTIMIZERS],
)


def parameters(dtype=jnp.float32, kernel=(64, 64), seed=0):
    """An 8-bit parameter, `kernel`, and two that the default rules keep in fp32."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": kernel, "norm": {"scale": (8,)}, "wte": {"embedding": (16, 8)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def gradients(step=0, like=None, dtype=None):
    """Gradients of widely differing sizes. Every step has other ones."""
    rng = np.random.default_rng(100 + step)
    like = parameters() if like is None else like
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape) * 10 ** rng.uniform(-4, 0, p.shape), dtype or p.dtype), like
    )


@functools.cache
def build(case, **options):
    """The case's optimizer for small parameters. It is built once, so that tests share its compiled updates."""
    return case.ours(**case.hyper, **{"state_format": SMALL} | options)


@functools.cache
def build_theirs(case):
    return case.theirs(**case.hyper)


@functools.cache
def halves(case, **options):
    """Our scale_by transform and that of optax."""
    hyper = {key: value for key, value in case.hyper.items() if key not in case.only_whole}
    return case.half(**hyper, **{"state_format": SMALL} | options), case.their_half(**hyper)


@functools.cache
def jitted(tx):
    """A compiled step that returns new parameters, new state and updates."""

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


@functools.cache
def jitted_fused(tx):
    return jax.jit(lambda grads, state, params: fse.fused_update(tx, grads, state, params))


def run(tx, params, steps=3, step=None, state=None):
    """Parameters and state after some steps."""
    state = tx.init(params) if state is None else state
    for i in range(steps):
        params, state, _ = (step or jitted(tx))(gradients(i, params), state, params)
    return params, state


# A value for every option of an optimizer that is not its default.
UNUSUAL_OPTIONS = {
    "rules": (("kernel", fse.Rule(lr_scale=0.5)),),
    "state_format": fse.StateFormat("linear", block_size=64),
    "implementation": "xla",
    "partition_specs": {"kernel": PartitionSpec("data")},
    "skip_nonfinite": True,
}


@pytest.fixture
def options_of_engines(monkeypatch):
    """Collects the options of every engine that is built."""
    found, build = [], Engine.__init__

    def init(self, method, options):
        found.append(options)
        build(self, method, options)

    monkeypatch.setattr(Engine, "__init__", init)
    return found


def takes(case, name):
    return name in inspect.signature(case.ours).parameters


def core(case, state):
    """Finds the state of the 8-bit transform inside the states of other transforms."""
    is_core = lambda x: isinstance(x, case.state)  # noqa: E731
    (found,) = [x for x in jax.tree.leaves(state, is_leaf=is_core) if is_core(x)]
    return found


def moments(case):
    """The names of the state's moments."""
    return case.moments


def first_moment(case, state):
    """The tree of the state's first moment."""
    return getattr(core(case, state), case.moments[0])


def their_moment(state, name):
    """Finds a moment in a state of optax."""
    (found,) = [getattr(x, name) for x in state if hasattr(x, name)]
    return found


def is_codes(x):
    return x.dtype in (jnp.int8, jnp.uint8)


def assert_8bit(case, state):
    """Checks that moments of kernels are codes and no others are. Returns the state of the 8-bit transform."""
    found = core(case, state)
    for name in moments(case):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(found, name))
        kernels = [x for path, x in leaves if "kernel" in jax.tree_util.keystr(path)]
        assert kernels and all(map(is_codes, kernels))
        assert not any(is_codes(x) for path, x in leaves if "kernel" not in jax.tree_util.keystr(path))
    return found


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(_bits(a), _bits(b))


def _bits(x):
    """Returns the bytes of an array, so that -0.0 and 0.0 differ and a NaN equals itself."""
    x = np.asarray(x)
    return np.frombuffer(x.tobytes(), np.uint8)


def assert_nearly(ours, theirs, rtol=2e-6):
    """Checks equality except for rounding: codes may differ by one, floats by a few ulps of the largest element."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        wide_a, wide_b = np.asarray(a, wide), np.asarray(b, wide)
        atol = 1 if is_codes(a) else rtol * np.abs(wide_b).max(initial=0)
        np.testing.assert_allclose(wide_a, wide_b, rtol=rtol, atol=atol)


def assert_equal(case, ours, theirs):
    """Checks equal bits. Norms may differ in rounding, because the compiler chooses the order of their sums."""
    (assert_nearly if case.sums else assert_same_bits)(ours, theirs)


def types(tree):
    """Shapes, dtypes, weak types and, under an explicit mesh, shardings."""
    return jax.tree.map(jax.typeof, tree)


def kinds(tree):
    """Shapes and dtypes."""
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)


def public_names():
    """Yields every public name of the package and its value."""
    for module in (fse, fse.linen, fse.nnx, fse.ops, fse.interop, fse.interop.bitsandbytes, fse.experimental):
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith("flax_stable_embed")
            if ours and not name.startswith("_") and not inspect.ismodule(value):
                yield f"{module.__name__}.{name}", value


def assert_an_embedding_adds_nothing(rows):
    """StableEmbed moves no more arrays and bytes than `nn.Embed` and `nn.LayerNorm`, except for sums over tokens."""
    plain, ours = collectives.MODULES
    moved = {(row["table"], row["module"]): row["all"] for row in rows}
    assert moved.keys() == {(table, module) for table in collectives.TABLES for module in (plain, ours)}
    for table in collectives.TABLES:
        assert sum(moved[table, ours]["arrays"].values()) <= sum(moved[table, plain]["arrays"].values())
        assert 0 < moved[table, ours]["bytes"] <= 1.001 * moved[table, plain]["bytes"]
