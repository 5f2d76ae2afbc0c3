"""Tests the report of the state of an optimizer, also inside optax's wrappers."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flax_stable_embed as fse

SMALL = fse.StateFormat(min_size=0)
PARAMS = {
    "block": {"kernel": jnp.ones((64, 64)), "norm": {"scale": jnp.ones(64)}},
    "wte": {"embedding": jnp.ones((32, 64))},
    "scalar": jnp.ones(()),
    "empty": jnp.ones((0, 3)),
}


def adamw(**options):
    return fse.adamw8bit(1e-3, **{"state_format": SMALL} | options)


def labels(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "theirs" if "norm" in jax.tree_util.keystr(path) else "ours", tree
    )


def only_matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


TRANSFORMS = {
    "itself": lambda: adamw(),
    "half": lambda: fse.scale_by_adam8bit(state_format=SMALL),
    "fse.chain": lambda: fse.chain(optax.clip_by_global_norm(1.0), adamw()),
    "chain": lambda: optax.chain(optax.clip(1.0), adamw(), optax.ema(0.9)),
    "masked": lambda: optax.masked(adamw(), only_matrices),
    "partition": lambda: optax.partition({"ours": adamw(), "theirs": optax.adam(1e-3)}, labels),
    "multi_steps": lambda: optax.MultiSteps(adamw(), 4),
    "inject": lambda: optax.inject_hyperparams(fse.adamw8bit)(1e-3, state_format=SMALL),
    "schedules": lambda: adamw(weight_decay=optax.constant_schedule(0.1), mask=only_matrices),
    "everything": lambda: optax.MultiSteps(
        optax.chain(
            optax.masked(optax.inject_hyperparams(fse.adamw8bit)(optax.constant_schedule(1e-3)), only_matrices)
        ),
        2,
    ),
    "stochastic": lambda: adamw(state_format=fse.StateFormat("dynamic", "stochastic", min_size=0)),
    "all in 8 bits": lambda: adamw(rules=((".*", 8),)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_totals_equal_the_bytes_of_the_state(name):
    tx = TRANSFORMS[name]()
    report = fse.describe(tx, PARAMS)
    assert report.total_bytes == sum(x.nbytes for x in jax.tree.leaves(tx.init(PARAMS)))
    assert sum(row.bytes for row in report.rows) + report.other_bytes == report.total_bytes
    assert report.other_bytes >= 0
    rows = {row.path: row for row in report.rows}
    assert rows["block/kernel"].bits == 8
    assert rows["block/kernel"].shape == (64, 64)
    hidden = {"masked", "partition", "everything"}
    assert ("block/norm/scale" in rows) == (name not in hidden)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_second_report_and_one_for_shapes_are_the_same(name):
    """A cached trace would leave the second report without rows."""
    tx = TRANSFORMS[name]()
    shapes = jax.eval_shape(lambda: PARAMS)
    first = fse.describe(tx, PARAMS)
    assert first.rows
    assert fse.describe(tx, PARAMS) == first
    jax.eval_shape(tx.init, PARAMS)
    assert fse.describe(tx, shapes) == first
    assert fse.describe(tx, shapes) == first


def test_a_transform_with_a_jitted_init_has_the_same_rows():
    tx = adamw()
    jitted = optax.GradientTransformation(jax.jit(tx.init), tx.update)
    jitted.init(PARAMS)
    assert fse.describe(jitted, PARAMS) == fse.describe(tx, PARAMS)


def test_the_table_shows_how_every_parameter_is_stored():
    tx = adamw(rules=(("wte", fse.Rule(8, fse.StateFormat("dynamic", block_size=16, min_size=0))), ("kernel", 8)))
    report = fse.describe(tx, PARAMS | {"complex": jnp.ones(3, jnp.complex64)})
    rows = {row.path: row for row in report.rows}
    assert rows["wte/embedding"] == (
        "wte/embedding",
        (32, 64),
        8,
        "16 on axis 1, dynamic",
        "rule 'wte'",
        "xla",
        2 * (32 * 64 + 4 * 32 * 4),
        2 * 4 * 32 * 64,
        "",
        "mu nearest, nu dither",
        None,
        "",
    )
    assert rows["block/kernel"].block == "32 on axis 1, root"
    assert rows["block/norm/scale"][2:5] == (32, "", "norm or bias")
    assert rows["complex"][2:5] == (32, "", "complex")
    assert rows["empty"][4] == "empty"
    text = str(report)
    for row in report.rows:
        (line,) = [line for line in text.splitlines() if line.startswith(row.path + " ")]
        assert f"{row.bytes:,}" in line and row.reason in line
    assert f"total: {report.total_bytes:,} bytes" in text
    assert f"other state: {report.other_bytes:,} bytes" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_nnx_parameters_have_the_same_rows():
    class Model(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
            self.wte = nnx.Embed(32, 64, rngs=nnx.Rngs(0))

    params = nnx.state(Model(), nnx.Param)
    assert fse.describe(adamw(), params).rows == fse.describe(adamw(), nnx.to_pure_dict(params)).rows
    assert [row.path for row in fse.describe(adamw(), params).rows] == ["up/bias", "up/kernel", "wte/embedding"]


def test_bytes_are_exact_under_x64_and_for_every_dtype():
    for dtype in ("bfloat16", "float32", "float64", "complex64", "complex128"):
        with jax.enable_x64(True):
            params = {"kernel": jnp.ones((64, 64), dtype), "bias": jnp.ones(8, dtype)}
            report = fse.describe(adamw(), params)
            assert report.total_bytes == sum(x.nbytes for x in jax.tree.leaves(adamw().init(params)))


def test_a_report_says_that_there_is_no_8bit_transform():
    report = fse.describe(optax.adam(1e-3), {"kernel": jnp.ones((4, 4))})
    assert report.rows == ()
    assert str(report) == "No 8-bit transform of this library in it; the state has 132 bytes."


def test_an_empty_tree_has_an_empty_report():
    report = fse.describe(adamw(), {})
    assert report.rows == () and report.total_bytes == 16


def test_nothing_is_recorded_after_an_error():
    tx = adamw(rules=(("nothing", 8),))
    with pytest.raises(ValueError, match="match no parameter"):
        fse.describe(tx, PARAMS)
    report = fse.describe(adamw(), PARAMS)
    adamw().init(PARAMS)
    assert len(report.rows) == len(jax.tree.leaves(PARAMS))


def test_layers_that_differ_only_in_their_number_share_a_line():
    layer = {"kernel": jnp.ones((64, 64)), "norm": {"scale": jnp.ones(64)}}
    params = {f"layers_{i}": layer for i in range(12)} | {"head": {"kernel": jnp.ones((64, 64))}}
    report = fse.describe(adamw(), params)
    assert len(report.rows) == 25
    table = str(report).split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["head/kernel", "layers_0..11/kernel", "layers_0..11/norm/scale"]
    assert "12 x (64, 64)" in table[1] and f"{12 * report.rows[0].bytes:,}" in table[1]


def test_layers_of_different_shapes_or_with_gaps_have_separate_lines():
    params = {
        "a_0": jnp.ones((64, 64)),
        "a_1": jnp.ones((64, 128)),
        "b_0": jnp.ones((64, 64)),
        "b_2": jnp.ones((64, 64)),
    }
    table = str(fse.describe(adamw(), params)).split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["a_0", "a_1", "b_0", "b_2"]


def test_a_table_fits_88_columns():
    path = {"a_module_with_a_long_name": {"and_another_one": {"self_attention": {"kernel": jnp.ones((512, 512))}}}}
    text = str(fse.describe(adamw(), path | PARAMS))
    assert max(map(len, text.splitlines())) <= 88
    assert re.search(r"^a_module_wi\w*\.\.\.[\w/]*tion/kernel  ", text, re.MULTILINE)


def test_the_total_in_fp32_equals_that_of_the_optax_optimizer():
    report = fse.describe(adamw(), PARAMS)
    theirs = sum(x.nbytes for x in jax.tree.leaves(optax.adamw(1e-3).init(PARAMS)))
    moments = sum(row.bytes_in_fp32 for row in report.rows)
    assert moments == theirs - 4  # their step count
    assert f"{report.total_bytes_in_fp32:,} in fp32" in str(report)


def test_bytes_per_device_equal_those_of_the_shards():
    mesh = jax.make_mesh((8,), ("a",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    params = {"kernel": jax.device_put(jnp.ones((512, 64)), sharded), "bias": jnp.ones(64)}
    params["bias"] = jax.device_put(params["bias"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    report = fse.describe(adamw(), params)
    state = jax.jit(adamw().init, out_shardings=jax.tree.map(lambda x: x.sharding, fse.abstract_state(adamw(), params)))
    arrays = jax.tree.leaves(state(params))
    assert report.bytes_per_device == sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert f"per device: {report.bytes_per_device:,} bytes" in str(report)
    assert fse.describe(adamw(), PARAMS).bytes_per_device is None


def test_parameters_on_several_single_devices_have_no_bytes_per_device():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    devices = {name: jax.sharding.SingleDeviceSharding(device) for name, device in zip(params, jax.devices())}
    assert fse.describe(adamw(), params, shardings=devices).bytes_per_device is None


def test_a_report_warns_once():
    mesh = jax.make_mesh((8,), ("a",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    params = {"vocab_weights": jax.device_put(jnp.ones((512, 64)), sharded)}
    with pytest.warns(UserWarning, match="might be embeddings by another name") as warned:
        assert fse.describe(adamw(), params).bytes_per_device
    assert len(warned) == 1


def test_moments_of_other_shapes_than_the_parameter_count_their_own_bytes_in_fp32():
    tx, params = optax.novograd(1e-2), {"kernel": jnp.ones((64, 128))}
    report = fse.describe(fse.quantize_state(tx), params)
    theirs = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert report.total_bytes_in_fp32 - report.other_bytes <= theirs
