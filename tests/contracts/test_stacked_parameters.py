"""Tests `Rule(stacked=...)`: parameters that a scan over layers has stacked step like the layers one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import assert_same_bits, build, is_codes, jitted, jitted_fused, may_straddle

NEAREST = fse.StateFormat(rounding="nearest")  # dither depends on the path and the index of an element
LAYERS = 6
STACKS = {"first": 1, "second": (1,), "two": 2}


def layers(seed=0):
    """Makes layers that differ a lot in size. In a stack, `gate` would be large enough for 8 bits."""
    rng = np.random.default_rng(seed)

    def layer(i):
        arrays = {
            "kernel": rng.normal(size=(64, 96)) * 2.0**i,
            "gate": rng.normal(size=1024) * 3.0**i,
            "scale": np.ones(8) + i,
        }
        return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}

    return [layer(i) for i in range(LAYERS)]


def stack(trees, how):
    def stacked(*xs):
        x = jnp.stack(xs, axis=how[0] if isinstance(how, tuple) else 0)
        return x.reshape(2, LAYERS // 2, *x.shape[1:]) if how == 2 else x

    return jax.tree.map(stacked, *trees)


def unstack(tree, how):
    def layer(x, i):
        if how == 2:
            x = x.reshape(LAYERS, *x.shape[2:])
        return jnp.take(x, i, axis=how[0] if isinstance(how, tuple) else 0)

    return [jax.tree.map(lambda x, i=i: layer(x, i), tree) for i in range(LAYERS)]


def pairs(case, how, **options):
    ours = {"state_format": NEAREST, **options}
    return build(case, **ours), build(case, rules=((".*", fse.Rule(stacked=how)),), **ours)


def steps(tx, params, grads, fused):
    state = tx.init(params)
    for g in grads:
        params, state = jitted_fused(tx)(g, state, params) if fused else jitted(tx)(g, state, params)[:2]
    return params, state


def assert_layers_equal(case, found, expected):
    """Norms are sums, whose last bits depend on the order in which the compiler adds."""
    for name, x in found.items():
        if case.sums:
            np.testing.assert_allclose(x, expected[name], rtol=2e-6, atol=1e-7 * np.abs(expected[name]).max())
        else:
            assert_same_bits(x, expected[name])


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize("how", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused_update"])
@pytest.mark.one_in(14)
def test_stacked_layers_step_like_the_layers(case, how, fused):
    one_by_one, stacked = pairs(case, how)
    grads = [layers(seed) for seed in (1, 2)]
    expected, _ = steps(one_by_one, layers(), grads, fused)
    found, state = steps(stacked, stack(layers(), how), [stack(g, how) for g in grads], fused)
    for ours, theirs in zip(unstack(found, how), expected):
        assert_layers_equal(case, ours, theirs)
    bits = {x.path: x.bits for x in fse.describe(stacked, stack(layers(), how)).rows}
    assert bits == {"kernel": 8, "gate": 32, "scale": 32}
    assert sum(map(is_codes, jax.tree.leaves(state))) == len(case.moments) + 1  # and `format`


@pytest.mark.parametrize("case", [c for c in OPTIMIZERS if c.sums], ids=lambda case: case.name)
@pytest.mark.parametrize("bits", [8, 32, "bf16"])
@pytest.mark.parametrize("options", [{}, {"max_unorm": 0.1}, {"skip_nonfinite": True}], ids=["ratio", "clip", "skip"])
@pytest.mark.one_in(10)
def test_norms_are_those_of_the_layers_to_the_bit_if_their_sums_are_exact(case, bits, options):
    """Small integers have exact sums of squares, in any order. Only bfloat16 moments are rounded by the element."""
    rng = np.random.default_rng(0)
    params, grads = (
        [{"kernel": jnp.asarray(rng.integers(-4, 5, size=(64, 96)) * 2.0**i, jnp.float32)} for i in range(LAYERS)]
        for _ in range(2)
    )
    case = dataclasses.replace(case, hyper=case.hyper | {"weight_decay": 0.5})
    one_by_one = build(case, state_format=NEAREST, rules=((".*", bits),), **options)
    stacked = build(case, state_format=NEAREST, rules=((".*", fse.Rule(bits, stacked=1)),), **options)
    for fused in (False, True):
        expected = [steps(one_by_one, p, [g], fused)[0]["kernel"] for p, g in zip(params, grads)]
        found = steps(stacked, stack(params, 1), [stack(grads, 1)], fused)[0]["kernel"]
        if case.name == "lars8bit":  # LAMB's direction is not an integer, so the last bit of its norm may differ
            assert_same_bits(found, jnp.stack(expected))
        else:
            np.testing.assert_allclose(found, np.stack(expected), rtol=1e-6)


def test_without_the_rule_the_norm_of_a_stack_is_one_norm():
    """Otherwise these tests could not fail."""
    tx = fse.lamb8bit(0.01, state_format=NEAREST)
    expected, _ = steps(tx, layers(), [layers(1)], False)
    found, _ = steps(tx, stack(layers(), 1), [stack(layers(1), 1)], False)
    assert np.abs(found["kernel"][0] / expected[0]["kernel"] - 1).max() > 0.1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS if c.name in ("adamw8bit", "lamb8bit", "lars8bit")], ids=lambda case: case.name
)
@pytest.mark.one_in(5)
@may_straddle
def test_stacked_layers_step_alike_on_a_mesh(case, kind):
    """The stack is sharded over its layers, as in a pipeline, and over an axis of the layers."""
    _, tx = pairs(case, 1)
    params, grads = stack(layers(), 1), [stack(layers(1), 1)]
    expected, _ = steps(tx, params, grads, True)
    mesh = jax.make_mesh((2, 4), ("layer", "fsdp"), axis_types=(kind, kind))
    specs = {"kernel": P("layer", "fsdp"), "gate": P("layer", "fsdp"), "scale": P("layer")}
    place = lambda tree: {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()}  # noqa: E731
    with jax.set_mesh(mesh):
        found, _ = steps(tx, place(params), [place(g) for g in grads], True)
    assert_layers_equal(case, jax.device_get(found), expected)


def test_a_scanned_model_of_nnx_steps_like_its_layers():
    from flax import nnx

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(64, 96, rngs=nnx.Rngs(params=key))

    model = make(jax.random.split(jax.random.key(0), LAYERS))
    tx = fse.lamb8bit(0.1, state_format=NEAREST, rules=((".*", fse.Rule(stacked=1)),))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.sin, before)
    expected, alone = [], fse.lamb8bit(0.1, state_format=NEAREST)
    for i in range(LAYERS):
        p, g = (jax.tree.map(lambda x, i=i: x[i], t) for t in (before, grads))
        expected.append(optax.apply_updates(p, alone.update(g, alone.init(p), p)[0]))
    optimizer.update(model, grads)
    found = nnx.state(model, nnx.Param)
    for i in range(LAYERS):
        for ours, theirs in zip(*(jax.tree.leaves(t) for t in (jax.tree.map(lambda x, i=i: x[i], found), expected[i]))):
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("how", STACKS.values(), ids=STACKS)
def test_blocks_are_those_of_a_slice(how):
    shapes = {"gate": (8192,), "kernel": (256, 64), "conv": (3, 3, 64, 128), "embedding": (1024, 96)}
    tx = fse.adamw8bit(1e-3, rules=((".*", fse.Rule(8, stacked=how)),))
    alone = {x.path: x for x in fse.describe(fse.adamw8bit(1e-3, rules=((".*", 8),)), _of(shapes)).rows}
    trees = [_of(shapes)] * LAYERS
    for row in fse.describe(tx, jax.eval_shape(lambda: stack([_zeros(t) for t in trees], how))).rows:
        size, axis = _blocks(row)
        assert (size, axis) == _stacked_blocks(*_blocks(alone[row.path]), how)


def _of(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _blocks(row):
    size, axis = row.block.split(",")[0].split(" on axis ")
    return int(size), int(axis)


def _stacked_blocks(size, axis, how):
    if isinstance(how, tuple):
        return size, axis + (axis >= how[0])
    return size, axis + how


def test_the_block_axis_is_an_axis_of_the_slice():
    state_format = fse.StateFormat(block_axis=0, min_size=0)
    tx = fse.adamw8bit(1e-3, rules=((".*", fse.Rule(8, state_format, stacked=1)),))
    (row,) = fse.describe(tx, _of({"kernel": (6, 128, 96)})).rows
    assert row.block.startswith("32 on axis 1")
    assert row.overrides == "stacked=1"


def test_a_stack_of_scalars_can_be_in_8_bits():
    tx = fse.adamw8bit(0.1, rules=((".*", fse.Rule(8, fse.StateFormat(min_size=0, rounding="nearest"), stacked=1)),))
    params = {"gain": jnp.arange(1.0, 7.0)}
    params, state = steps(tx, params, [params], True)
    assert state[0].mu_absmax["gain"].shape == (6,)
    np.testing.assert_allclose(params["gain"], np.arange(1, 7) - 0.1, rtol=1e-5, atol=2e-4)


def test_row_moments_of_a_stack_are_those_of_the_slices():
    rules = (("gate", fse.Rule("rowwise", stacked=1)), ("kernel", fse.Rule("rowwise", stacked=(2,))))
    rows = {x.path: x for x in fse.describe(fse.adamw8bit(1e-3, rules=rules), stack(layers(), 1)).rows}
    assert rows["gate"].bits == "rowwise"
    assert (rows["kernel"].bits, rows["kernel"].reason) == (32, "rows are along the last axis, which stacks parameters")


def test_a_wrapped_transform_has_the_blocks_and_sizes_of_slices():
    tx = fse.quantize_state(optax.adamw(0.01), state_format=NEAREST, rules=((".*", fse.Rule(stacked=1)),))
    alone = fse.quantize_state(optax.adamw(0.01), state_format=NEAREST)
    expected, _ = steps(alone, layers(), [layers(1), layers(2)], False)
    found, _ = steps(tx, stack(layers(), 1), [stack(layers(1), 1), stack(layers(2), 1)], False)
    for ours, theirs in zip(unstack(found, 1), expected):
        for name, x in ours.items():
            assert_same_bits(x, theirs[name])


@pytest.mark.parametrize("how", STACKS.values(), ids=STACKS)
@pytest.mark.one_in(5)
def test_percentile_clipping_has_norms_of_slices(how):
    make = lambda **options: fse.percentile_clipping(40, 4, per_parameter=True, **options)  # noqa: E731
    tx, alone = make(rules=((".*", fse.Rule(stacked=how)),)), make()
    state, expected = tx.init(stack(layers(), how)), alone.init(layers())
    assert state.squared_norms.shape == expected.squared_norms.shape == (4, 3 * LAYERS)
    for seed in range(4):
        grads = jax.tree.map(lambda x, seed=seed: x * (1 + seed), layers(seed))
        updates, state = tx.update(stack(grads, how), state)
        theirs, expected = alone.update(grads, expected)
        for x, y in zip(unstack(updates, how), theirs):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), x, y)
    assert not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), updates, stack(grads, how)))


def test_percentile_clipping_of_slices_on_a_mesh():
    tx = fse.percentile_clipping(40, 4, per_parameter=True, rules=((".*", fse.Rule(stacked=1)),))
    mesh = jax.make_mesh((2, 4), ("layer", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    grads = {"kernel": stack(layers(), 1)["kernel"]}
    _, state = tx.update(grads, tx.init(grads))
    with jax.set_mesh(mesh):
        placed = jax.device_put(grads, NamedSharding(mesh, P("layer", "fsdp")))
        found, sharded = jax.jit(tx.update)(placed, tx.init(placed))
        assert found["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 3)
    np.testing.assert_allclose(sharded.squared_norms, state.squared_norms, rtol=1e-6)


@pytest.mark.parametrize("stacked", [-1, 1.5, True, (0, 0), (-1,), "1", [0], None])
def test_an_invalid_stack_is_refused(stacked):
    with pytest.raises(ValueError, match=r"`stacked` of a Rule must be the number of axes"):
        fse.Rule(stacked=stacked)


def test_a_parameter_without_the_stacked_axes_is_refused_by_name():
    tx = fse.adamw8bit(1e-3, rules=((".*", fse.Rule(stacked=2)),))
    with pytest.raises(ValueError, match=r"stacked=2 for parameter 'gate', but its shape \(8192,\) has 1 axes"):
        tx.init(_zeros(_of({"gate": (8192,)})))


def test_percentile_clipping_refuses_rules_that_it_cannot_use():
    rules = (("layers", fse.Rule(stacked=1)),)
    with pytest.raises(ValueError, match="without `per_parameter=True`"):
        fse.percentile_clipping(rules=rules)
    with pytest.raises(ValueError, match="`stacked` for 'layers', which match none of the parameters: gate, kernel"):
        fse.percentile_clipping(per_parameter=True, rules=rules).init(layers()[0])
    rows = fse.SparseRows.of_lookups(jnp.array([1]), jnp.ones((1, 4)), num_rows=8)
    tx = fse.percentile_clipping(per_parameter=True, rules=((".*", fse.Rule(stacked=1)),))
    with pytest.raises(ValueError, match=r"'table', whose gradient is a fse\.SparseRows"):
        tx.update({"table": rows}, tx.init({"table": jnp.ones((8, 4))}))
