"""Tests that `describe` reports straddling blocks exactly if the compiled step moves data."""

import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.tools import SMALL, assert_same_bits

FORMAT = fse.StateFormat(min_size=0)
MESH = {"a": 2, "b": 4}
CASES = {
    "whole blocks": ((256, 32), P(("a", "b")), FORMAT),
    "a piece shorter than a block": ((64, 48), P("b"), FORMAT),
    "the same, the other axis cut": ((64, 48), P(None, "b"), FORMAT),
    "too few shards promised": ((512, 64), P(("a", "b")), fse.StateFormat(shards=2, min_size=0)),
    "the same, cut as promised": ((512, 64), P("a"), fse.StateFormat(shards=2, min_size=0)),
    "blocks of the user's that do not fit": ((256, 96), P("b"), fse.StateFormat(block_size=48, min_size=0)),
    "blocks of the user's that fit": ((384, 96), P("b"), fse.StateFormat(block_size=48, block_axis=0, min_size=0)),
    "a short last block": ((300, 64), P("b"), fse.StateFormat(block_size=256, block_axis=0, min_size=0)),
    "a short last block, the other axis cut": ((300, 64), P(None, "b"), fse.StateFormat(block_axis=0, min_size=0)),
    "a vector": ((512,), P(("a", "b")), FORMAT),
    "a short vector": ((96,), P(("a", "b")), FORMAT),
    "a vector in pieces of 24": ((192,), P(("a", "b")), FORMAT),
    "three axes": ((4, 256, 24), P("a", "b"), FORMAT),
    "a matrix of one block": ((32, 40), P("a"), FORMAT),
}


def mesh_of(kind):
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind,) * len(MESH))


def moves_data(tx, params) -> bool:
    """Whether a compiled step has a collective."""
    step = jax.jit(lambda g, s, p: fse.fused_update(tx, g, s, p), donate_argnums=(1, 2))
    text = step.lower(params, tx.init(params), params).compile().as_text()
    return bool(re.search(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(", text))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(7)
def test_a_step_moves_data_if_blocks_straddle_and_the_suggested_format_avoids_it(name, kind):
    shape, spec, state_format = CASES[name]
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = {"kernel": jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))}
        tx = fse.adamw8bit(1e-3, state_format=state_format)
        (row,) = fse.describe(tx, params).rows
        assert row.bits == 8
        with pytest.warns(UserWarning, match="on several devices") if row.straddles else nullcontext():
            moves = moves_data(tx, params)
        assert moves is bool(row.straddles)
        if row.straddles and "StateFormat" in row.straddles:
            better = eval(re.search(r"Use (StateFormat\(.*?\))", row.straddles)[1], {"StateFormat": fse.StateFormat})
            tx = fse.adamw8bit(1e-3, rules=(("kernel", fse.Rule(8, better)),))
            (row,) = fse.describe(tx, params).rows
            assert row.bits == 8 and row.straddles == "" and not moves_data(tx, params)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_reference_gives_the_same_bits_if_blocks_straddle_on_an_explicit_mesh(rounding):
    """Under vmap the reference runs, here on shards of 16 rows with blocks of 32."""
    tx = fse.adamw8bit(1e-3, state_format=fse.StateFormat(rounding=rounding, min_size=0))
    g, p = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, 64, 48)), jnp.float32) for seed in (0, 1))
    step = jax.jit(jax.vmap(lambda g, s, p: fse.fused_update(tx, g, s, p)))
    expected = step(g, jax.vmap(tx.init)(p), p)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        g, p = (jax.device_put(x, NamedSharding(mesh, P(None, "b"))) for x in (g, p))
        found = step(g, jax.vmap(tx.init)(p), p)
    assert found[0].sharding.spec[1] == "b" and found[1][0].mu.sharding.spec[1] == "b"
    assert_same_bits(jax.device_get(found), jax.device_get(expected))


def test_the_cases_cover_every_suggestion():
    mesh = AbstractMesh(tuple(MESH.values()), tuple(MESH))
    answers = set()
    for shape, spec, state_format in CASES.values():
        cut = {"kernel": NamedSharding(mesh, spec)}
        params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        (row,) = fse.describe(fse.adamw8bit(1e-3, state_format=state_format), params, shardings=cut).rows
        answers.add(re.split(r"[(=:]", row.straddles.partition(". ")[2])[1] if row.straddles else "none needed")
    fp32 = " shard another axis, or keep fp32 moments with a rule "
    assert answers == {"none needed", "shards", "block_axis", "block_size", "min_size", fp32}


PARAMS = {
    "up": {"kernel": jax.ShapeDtypeStruct((64, 128), jnp.float32), "bias": jax.ShapeDtypeStruct((128,), jnp.float32)},
    "wte": {"embedding": jax.ShapeDtypeStruct((64, 64), jnp.float32)},
}
SPECS = {"up": {"kernel": P("b", "a"), "bias": P("b")}, "wte": {"embedding": P(("a", "b"), None)}}


def test_every_way_to_pass_shardings_gives_the_same_report():
    tx, mesh = fse.adamw8bit(1e-3, state_format=SMALL), mesh_of(AxisType.Auto)
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=is_spec)
    abstract = jax.tree.map(lambda spec: NamedSharding(mesh.abstract_mesh, spec), SPECS, is_leaf=is_spec)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), PARAMS, named)
    arrays = jax.tree.map(lambda x, s: jax.device_put(jnp.ones(x.shape), s), PARAMS, named)
    with jax.set_mesh(mesh):
        report = fse.describe(tx, PARAMS, shardings=SPECS)
    assert report == fse.describe(tx, PARAMS, shardings=named) == fse.describe(tx, PARAMS, shardings=abstract)
    assert report == fse.describe(tx, shapes) == fse.describe(tx, arrays)
    assert [(row.path, row.shards, bool(row.straddles)) for row in report.rows] == [
        ("up/bias", (4,), False),  # in fp32
        ("up/kernel", (4, 2), False),
        ("wte/embedding", (8, 1), False),
    ]
    lines = str(report).splitlines()
    assert lines[0].endswith("shards") and lines[2].endswith("4 x 2") and lines[3].endswith("8 x 1")
    assert fse.describe(tx, jax.eval_shape(lambda: arrays)).rows[0].shards is None


def test_the_printed_report_names_parameters_whose_blocks_straddle():
    tx, mesh = fse.adamw8bit(1e-3, state_format=SMALL), AbstractMesh((8,), ("a",))
    params = {"head": {"kernel": jax.ShapeDtypeStruct((64, 40), jnp.float32)}}
    report = fse.describe(tx, params, shardings={"head": {"kernel": NamedSharding(mesh, P("a"))}})
    text = str(report)
    assert "8 x 1, straddles" in text
    assert (
        "straddles devices: head/kernel: axis 0 of 64 is sharded over 8 devices, 8 on each, and blocks have 32. "
        "Use StateFormat(block_axis=1, shards=1, min_size=0), for all parameters or in a rule." in text
    )


def test_the_suggestion_for_an_embedding_keeps_scales_per_row():
    mesh, rules = AbstractMesh((8,), ("a",)), (("embedding", 8),)
    params = {"embedding": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
    cut = {"embedding": NamedSharding(mesh, P(None, "a"))}
    (row,) = fse.describe(fse.adamw8bit(1e-3, rules=rules, state_format=SMALL), params, shardings=cut).rows
    assert "Use StateFormat(block_size=16, block_axis=1, min_size=0)" in row.straddles


def test_the_mean_of_a_sharded_row_needs_communication():
    mesh, tx = AbstractMesh((8,), ("a",)), fse.adamw8bit(1e-3, rules=((".*", "rowwise"),))
    params = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    for spec, straddles in ((P(None, "a"), True), (P("a"), False)):
        (row,) = fse.describe(tx, params, shardings={"kernel": NamedSharding(mesh, spec)}).rows
        assert bool(row.straddles) is straddles
        real = mesh_of(AxisType.Auto)
        spec = P(*(name and ("a", "b") for name in spec))
        placed = jax.tree.map(lambda x: jax.device_put(jnp.ones(x.shape), NamedSharding(real, spec)), params)  # noqa: B023
        with pytest.warns(UserWarning, match="kernel: axis 1 of 64 is sharded over 8") if straddles else nullcontext():
            assert moves_data(tx, placed) is straddles


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"up": {"kernel": True, "bias": False}, "wte": {"embedding": True}}),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "quantize_state": lambda tx: fse.quantize_state(optax.adamw(1e-3), state_format=SMALL),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_parameters_inside_wrappers_have_the_same_shards(name):
    tx = WRAPPED[name](fse.adamw8bit(1e-3, state_format=SMALL))
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        rows = {row.path: row for row in fse.describe(tx, PARAMS, shardings=SPECS).rows}
    assert rows["up/kernel"].shards == (4, 2) and rows["up/kernel"].straddles == ""


def test_nnx_variables_and_their_specs_are_accepted():
    class Model(nnx.Module):
        def __init__(self):
            init = nnx.with_partitioning(nnx.initializers.ones, ("b", "a"))
            self.up = nnx.Linear(64, 128, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))

    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        params = nnx.state(Model(), nnx.Param)
        tx = fse.adamw8bit(1e-3, state_format=SMALL)
        assert fse.describe(tx, params).rows[0].shards == (4, 2)
        shapes = nnx.to_pure_dict(jax.eval_shape(lambda: params))
        assert fse.describe(tx, shapes, shardings=nnx.get_partition_spec(params)).rows[0].shards == (4, 2)


AXES = NamedSharding(AbstractMesh((8,), ("a",)), P("a"))
BAD = {
    "no mesh": (SPECS, ValueError, r"has \w+\('b',\) for parameter 'up/bias', which needs a mesh.*set_mesh"),
    "a leaf that is missing": ({"up": SPECS["up"]}, ValueError, "the parameters have 'wte/embedding' and the `shard"),
    "a leaf too many": (SPECS | {"b": AXES}, ValueError, "the `shardings` have 'b' and the parameters do not"),
    "a single spec for all": (AXES, ValueError, "a pytree like the parameters"),
    "names": ({"up": {"kernel": "a", "bias": "a"}}, TypeError, "PartitionSpec or NamedSharding.*got 'a' at 'up/"),
    "more axes than there are": (
        {"up": {"kernel": None, "bias": AXES.update(spec=P(None, "a"))}, "wte": {"embedding": None}},
        ValueError,
        r"'up/bias' of shape \(128,\) cannot be sharded as given",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_shardings_that_do_not_fit_are_refused(name):
    shardings, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        fse.describe(fse.adamw8bit(1e-3), PARAMS, shardings=shardings)


def test_unknown_mesh_axes_and_unequal_shards_are_refused():
    tx, params = fse.adamw8bit(1e-3), {"kernel": jax.ShapeDtypeStruct((300, 64), jnp.float32)}
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        with pytest.raises(ValueError, match=r"has \w+\('model',\) for parameter 'kernel': .*not found in mesh"):
            fse.describe(tx, params, shardings={"kernel": P("model")})
        with pytest.raises(ValueError, match=r"'kernel' of shape \(300, 64\) cannot be sharded as given"):
            fse.describe(tx, params, shardings={"kernel": P(("a", "b"))})


def test_parameters_on_one_device_are_one_shard_and_unknown_shardings_are_none():
    tx, params = fse.adamw8bit(1e-3, state_format=SMALL), {"kernel": jnp.ones((64, 64)), "empty": np.ones((0, 3))}
    one = SingleDeviceSharding(jax.devices()[0])
    rows = {row.path: row for row in fse.describe(tx, params, shardings={"kernel": one, "empty": None}).rows}
    assert rows["kernel"].shards == (1, 1) and rows["empty"].shards is None
    assert "shards" not in str(fse.describe(tx, params))
    reports = []
    jax.jit(lambda params: reports.append(fse.describe(tx, params)))(params)
    assert reports == [fse.describe(tx, params)]
