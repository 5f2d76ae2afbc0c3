"""State dicts that are not as ours: foreign maps and blocks, order and axes of parameters, wrappers; and refusals."""

import pathlib

import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_stable_embed as fse
from flax_stable_embed.interop import bitsandbytes
from tests.golden.make_optimizers import SAVED
from tests.golden.test_optimizers_formulas import code_values, decode
from tests.interop.bitsandbytes.state_dicts import ADAM, GROUP, assert_same, ours_as_saved, saved_of
from tests.interop.bitsandbytes.state_dicts import frozen as frozen
from tests.interop.bitsandbytes.tools import BLOCKS, our_optimizer

# --- maps and blocks of others ---------------------------------------------------------------------------------------


def one_vector(n=1024, **changes):
    """A state dict of Lion with one vector: codes 0..255 over and over, absmax 1, 2, ..."""
    tensors = {
        "state1": (np.arange(n) % 256).astype(np.uint8),
        "absmax1": 1 + np.arange(-(-n // 256), dtype=np.float32),
        "qmap1": code_values(True),
    }
    return {"state": {0: {"step": 4, **tensors, **changes}}, "param_groups": [{"params": [0]}]}


def load_vector(saved, n=1024):
    tx = bitsandbytes.lion8bit(state_format=BLOCKS)
    state, report = bitsandbytes.load_optimizer_state(saved, tx, {"kernel": jnp.zeros(n)}, order=["kernel"])
    return state[0], report.rows[0]


def test_a_map_that_differs_in_last_digits_keeps_its_codes():
    qmap = np.nextafter(code_values(True), np.float32(2))
    state, row = load_vector(one_vector(qmap1=qmap))
    assert row.how == "exact" and 0 < row.error <= 2**-23
    np.testing.assert_array_equal(state.mu["kernel"], one_vector()["state"][0]["state1"])


def test_another_map_is_decoded_by_itself():
    linear = np.linspace(-1, 1, 256, dtype=np.float32)
    saved = one_vector(qmap1=linear)
    state, row = load_vector(saved)
    assert row.how == "encoded" and 0 < row.error < 0.008
    values = linear[saved["state"][0]["state1"]] * np.repeat(saved["state"][0]["absmax1"], 256)
    ours = decode(np.asarray(state.mu["kernel"]), np.asarray(state.mu_absmax["kernel"]), code_values(True))
    np.testing.assert_allclose(ours, values, rtol=0, atol=0.008 * 4)


def test_blocks_of_2048_of_old_versions_are_read():
    codes = (np.arange(5000) % 256).astype(np.uint8)
    absmax = np.array([1, 2, 4], np.float32)
    state, row = load_vector(one_vector(5000, state1=codes, absmax1=absmax), 5000)
    assert row.how == "encoded"
    values = code_values(True)[codes] * np.repeat(absmax, 2048)[:5000]
    ours = decode(np.asarray(state.mu["kernel"]), np.asarray(state.mu_absmax["kernel"]), code_values(True))
    np.testing.assert_allclose(ours, values, rtol=0, atol=0.008 * 4)


def test_what_bitsandbytes_begins_with_is_zeros():
    """Bytes 0, which are -0.993 in the signed map, and scales 0."""
    saved = one_vector(state1=np.zeros(1024, np.uint8), absmax1=np.zeros(4, np.float32))
    state, row = load_vector(saved)
    assert row.how == "exact" and not state.mu["kernel"].any() and not state.mu_absmax["kernel"].any()
    tx, params = bitsandbytes.lion8bit(1.0, state_format=BLOCKS), {"kernel": jnp.ones(1024)}
    whole, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    updates, _ = tx.update({"kernel": jnp.zeros(1024)}, whole, params)
    assert not updates["kernel"].any()


def test_rows_of_whole_blocks_keep_their_codes():
    n = 8 * 512
    saved = one_vector(n)
    saved["state"][0]["state1"] = saved["state"][0]["state1"].reshape(8, 512)
    tx, params = bitsandbytes.lion8bit(), {"kernel": jnp.zeros((8, 512))}
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    assert report.rows[0].how == "exact" and state[0].mu_absmax["kernel"].shape == (8, 2)
    dumped, _ = bitsandbytes.dump_optimizer_state(
        tx, params, state, order=["kernel"], param_groups=saved["param_groups"][0] | GROUP, nested=False
    )
    assert_same(dumped["state"], saved["state"])


# --- names, axes, steps ----------------------------------------------------------------------------------------------


def linear_and_square():
    """torch's Linear(6, 4) and a square one, in fp32; and our parameters."""
    rng = np.random.default_rng(0)
    states = {i: {"step": 2, "state1": rng.normal(size=s).astype(np.float32)} for i, s in ((0, (4, 6)), (1, (5, 5)))}
    params = {"head": {"kernel": jnp.zeros((6, 4))}, "square": {"kernel": jnp.zeros((5, 5))}}
    return {"state": states, "param_groups": [{"params": [0, 1]}]}, params


def test_weights_of_linear_layers_are_transposed_where_the_user_says_so():
    saved, params = linear_and_square()
    tx, order = bitsandbytes.lion8bit(), ["head/kernel", "square/kernel"]
    state, report = bitsandbytes.load_optimizer_state(saved, tx, params, order=order, transpose={"kernel$": (1, 0)})
    assert report.exact
    np.testing.assert_array_equal(state[0].mu["head"]["kernel"], saved["state"][0]["state1"].T)
    np.testing.assert_array_equal(state[0].mu["square"]["kernel"], saved["state"][1]["state1"].T)
    back, _ = bitsandbytes.dump_optimizer_state(
        tx, params, state, order=order, transpose={"kernel$": (1, 0)}, param_groups=GROUP, nested=False
    )
    assert_same(back["state"], saved["state"])

    as_it_is = {"square": (0, 1), "kernel$": (1, 0)}
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=order, transpose=as_it_is)
    np.testing.assert_array_equal(state[0].mu["square"]["kernel"], saved["state"][1]["state1"])


def test_nothing_is_transposed_by_guess():
    saved, params = linear_and_square()
    tx, order = bitsandbytes.lion8bit(), ["head/kernel", "square/kernel"]
    load = bitsandbytes.load_optimizer_state
    with pytest.raises(ValueError, match=r"'square/kernel' of shape \(5, 5\) fits as it is and transposed"):
        load(saved, tx, params, order=order, transpose={"head": (1, 0)})
    with pytest.raises(ValueError, match=r"transpose=\{'head/kernel': \(1, 0\)\}"):
        load(saved, tx, params, order=order)
    with pytest.raises(ValueError, match="no order of"):
        load(saved, tx, params, order=order, transpose={"kernel": (0, 0)})
    with pytest.raises(ValueError, match="matches none of head/kernel"):
        load(saved, tx, params, order=order, transpose={"kernel": (1, 0), "embed": (1, 0)})


def test_axes_of_more_dimensions():
    """A convolution: torch has (out, in, height, width), Flax (height, width, in, out)."""
    theirs = np.random.default_rng(0).normal(size=(4, 3, 5, 6)).astype(np.float32)
    saved = {"state": {0: {"step": 1, "state1": theirs}}, "param_groups": [{"params": [0]}]}
    params = {"conv": {"kernel": jnp.zeros((5, 6, 3, 4))}}
    options = {"order": ["conv/kernel"], "transpose": {"conv": (2, 3, 1, 0)}}
    tx = bitsandbytes.lion8bit()
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, **options)
    np.testing.assert_array_equal(state[0].mu["conv"]["kernel"], theirs.transpose(2, 3, 1, 0))
    back, _ = bitsandbytes.dump_optimizer_state(tx, params, state, param_groups=GROUP, nested=False, **options)
    np.testing.assert_array_equal(back["state"][0]["state1"], theirs)


def test_order_may_be_a_mapping_and_leave_parameters_out(frozen):
    saved, params = saved_of(ADAM, frozen)
    tx = ours_as_saved(ADAM)
    by_list, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["weight", "bias"])
    by_index, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order={1: "bias", 0: "weight"})
    assert_same(by_list, by_index)
    names = {0: "model.weight", 1: "model.bias"}
    named = {
        "state": {names[key]: state for key, state in saved["state"].items()},
        "param_groups": [saved["param_groups"][0] | {"params": list(names.values())}],
    }
    by_name, _ = bitsandbytes.load_optimizer_state(
        named, tx, params, order={"model.weight": "weight", "model.bias": "bias"}
    )
    assert_same(by_list, by_name)
    only, report = bitsandbytes.load_optimizer_state(saved, tx, {"bias": params["bias"]}, order=[None, "bias"])
    assert_same(only[0].mu["bias"], by_list[0].mu["bias"])
    assert [row.key for row in report.rows] == [1, 1]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["weight", "gain"], "there are no parameters 'gain'. They are: "),
        (["weight"], "it leaves out torch's parameters 1"),
        (["weight", "weight"], "it names twice 'weight'"),
        (["weight", "bias", "more"], "no parameter of torch has the keys 2"),
        (["weight", None], "it leaves out our parameters 'bias'"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(order, message, frozen):
    saved, params = saved_of(ADAM, frozen)
    with pytest.raises(ValueError, match=message):
        bitsandbytes.load_optimizer_state(saved, ours_as_saved(ADAM), params, order=order)


def test_what_is_not_the_same_optimizer_is_refused(frozen):
    saved, params = saved_of(ADAM, frozen)
    load, order = bitsandbytes.load_optimizer_state, {"order": ["weight", "bias"]}
    with pytest.raises(ValueError, match=r"has 2 states .* but lion in `tx` has 1"):
        load(saved, bitsandbytes.lion8bit(), params, **order)
    with pytest.raises(ValueError, match=r"that of AdEMAMix has two moments, \(2, 20, 31\)"):
        load(saved, bitsandbytes.ademamix8bit(), params, **order)
    with pytest.raises(ValueError, match="got 0"):
        load(saved, optax.adamw(1e-3), params, **order)
    with pytest.raises(ValueError, match="keeps mu, nu, trace"):
        load(saved, fse.rmsprop8bit(1e-3, centered=True, momentum=0.9), params, **order)
    with pytest.raises(ValueError, match="keeps no moments"):
        load(saved, fse.sgd8bit(1e-3), params, **order)
    with pytest.raises(TypeError, match=r"got PosixPath. A file opens with torch.load"):
        load(pathlib.Path("optimizer.pt"), bitsandbytes.adam8bit(), params, **order)
    with pytest.raises(ValueError, match="must have 'state' and 'param_groups', got 'weight', 'bias'"):
        load(params, bitsandbytes.adam8bit(), params, **order)
    with pytest.raises(TypeError, match="paths in torch's order"):
        load(saved, bitsandbytes.adam8bit(), params, order="weight")


def test_a_trace_of_steps_is_none_of_gradients():
    """What our LARS sums has other signs and sizes than what bitsandbytes' does, which clips behind its trace."""
    kernel = {"kernel": jnp.ones((4, 256))}
    for tx in (fse.lars8bit(1e-3), optax.chain(fse.scale_by_lars8bit(), optax.scale(-1e-3))):
        with pytest.raises(ValueError, match=r"trace of lars .* sums what its trust ratio makes of gradients"):
            bitsandbytes.load_optimizer_state(one_vector(), tx, kernel, order=["kernel"])
        with pytest.raises(ValueError, match=r"Use fse.interop.bitsandbytes.lars8bit"):
            bitsandbytes.dump_optimizer_state(tx, kernel, tx.init(kernel), order=["kernel"], param_groups=GROUP)
    clipping = fse.lars8bit(1e-3, max_unorm=0.02, state_format=BLOCKS)
    state, _ = bitsandbytes.load_optimizer_state(one_vector(), clipping, {"kernel": jnp.ones(1024)}, order=["kernel"])
    assert int(state[-1].count) == 4


def test_scalars_survive_the_way_there_and_back():
    params = {"logit_scale": jnp.ones(())}
    group = GROUP | {"alpha": 5.0}
    for tx in (bitsandbytes.adamw8bit(), bitsandbytes.ademamix8bit(), bitsandbytes.lion8bit()):
        _, state = tx.update(params, tx.init(params), params)
        saved, _ = bitsandbytes.dump_optimizer_state(tx, params, state, order=["logit_scale"], param_groups=group)
        loaded, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["logit_scale"])
        jax.tree.map(np.testing.assert_array_equal, loaded, state)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("codec", ["root", "dynamic"])
def test_a_mean_of_squares_cannot_be_negative(bits, codec):
    state_format = fse.StateFormat(codec, block_size=256, min_size=0)  # of "dynamic" the codes would survive
    tx = fse.interop.bitsandbytes.rmsprop8bit(state_format=state_format, rules=((".*", bits),))
    params = {"kernel": jnp.ones(1024)}
    saved = one_vector()
    with pytest.raises(ValueError, match=r"`nu` is never negative, but the state that is to become it has -3.97"):
        bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    saved["state"][0]["state1"] = np.maximum(saved["state"][0]["state1"], 127)  # code 127 is zero
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=["kernel"])
    assert not any(int(x.min()) < 0 for x in jax.tree.leaves(state[0].nu))


def test_broken_states_are_refused():
    with pytest.raises(ValueError, match="without its `absmax1` or `qmap1`"):
        saved = one_vector()
        del saved["state"][0]["qmap1"]
        load_vector(saved)
    with pytest.raises(ValueError, match="`qmap1` of parameter 0 must be 256 finite numbers"):
        load_vector(one_vector(qmap1=np.ones(100, np.float32)))
    for step in (-3, 2**40, 7.5, np.inf, np.array([3, 4]), "many"):
        with pytest.raises(ValueError, match="The step of parameter 0 must be a whole number"):
            load_vector(one_vector(step=step))
    saved = one_vector()
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match=r"has no 'step' for parameter 0. Say how many there were: step="):
        load_vector(saved)
    with pytest.raises(ValueError, match="has None for the state of parameter 0"):
        load_vector({**saved, "state": {0: None}})
    with pytest.raises(ValueError, match="3 scales for 1024 elements"):
        load_vector(one_vector(absmax1=np.ones(3, np.float32)))
    with pytest.raises(ValueError, match=r"has the shape \(1024,\), but 'kernel' has \(1000,\)"):
        load_vector(one_vector(), 1000)


def test_counts_of_parameters_that_differ_are_the_users_choice(frozen):
    saved, params = saved_of(ADAM, frozen)
    saved["state"][1]["step"] = 2
    tx, order = ours_as_saved(ADAM), ["weight", "bias"]
    with pytest.raises(ValueError, match=r"\{0: 3, 1: 2\}.*step=3"):
        bitsandbytes.load_optimizer_state(saved, tx, params, order=order)
    state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, order=order, step=3)
    assert state[0].count == 3


def test_parameters_that_never_had_a_gradient_begin_from_zeros(frozen):
    saved, params = saved_of(ADAM, frozen)
    del saved["state"][1]
    state, report = bitsandbytes.load_optimizer_state(saved, ours_as_saved(ADAM), params, order=["weight", "bias"])
    assert {row.how for row in report.rows if row.path == "bias"} == {"absent"} and not state[0].nu["bias"].any()
    saved["state"] = {}
    state, _ = bitsandbytes.load_optimizer_state(saved, ours_as_saved(ADAM), params, order=["weight", "bias"])
    assert_same(state, ours_as_saved(ADAM).init(params))
    dumped, _ = bitsandbytes.dump_optimizer_state(
        ours_as_saved(ADAM), params, state, order=["weight", "bias"], param_groups=GROUP
    )
    assert dumped["state"] == {}


# --- our side --------------------------------------------------------------------------------------------------------


def test_the_state_is_found_in_wrappers_and_every_count_is_set(frozen):
    saved, params = saved_of(ADAM, frozen)
    rate, options = optax.linear_schedule(1e-2, 0.0, 10), {"order": ["weight", "bias"]}
    inner = bitsandbytes.adamw8bit(rate, weight_decay=optax.constant_schedule(0.1), state_format=BLOCKS)
    expected, _ = bitsandbytes.load_optimizer_state(saved, our_optimizer(ADAM, state_format=BLOCKS), params, **options)
    for tx in (
        inner,
        optax.chain(optax.clip_by_global_norm(1.0), inner),
        fse.chain(optax.clip(1.0), inner),
        optax.inject_hyperparams(bitsandbytes.adamw8bit, static_args=("weight_decay",))(rate, state_format=BLOCKS),
    ):
        state, _ = bitsandbytes.load_optimizer_state(saved, tx, params, **options)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        is_core = lambda x: isinstance(x, fse.ScaleByAdam8bitState)  # noqa: E731
        (core,) = [x for x in jax.tree.leaves(state, is_leaf=is_core) if is_core(x)]
        assert core.mu["weight"].dtype == jnp.uint8
        assert_same(core, expected[0])
        counts = [x for p, x in jax.tree_util.tree_leaves_with_path(state) if "count" in jax.tree_util.keystr(p[-1:])]
        assert len(counts) > 1 and all(count == SAVED for count in counts)
        tx.update(params, state, params)
        dumped, _ = bitsandbytes.dump_optimizer_state(tx, params, state, param_groups=GROUP, **options)
        assert dumped["state"][0]["step"] == SAVED


def test_variables_boxes_and_shapes_are_as_good_as_arrays(frozen):
    saved, params = saved_of(ADAM, frozen)
    tx, options = our_optimizer(ADAM, state_format=BLOCKS), {"order": ["weight", "bias"]}
    expected, _ = bitsandbytes.load_optimizer_state(saved, tx, params, **options)
    from_shapes, _ = bitsandbytes.load_optimizer_state(saved, tx, jax.eval_shape(lambda: params), **options)
    assert_same(from_shapes, expected)

    boxed = jax.tree.map(lambda p: nn.Partitioned(p, names=(None,) * p.ndim), params)
    variables = flax.nnx.State(jax.tree.map(flax.nnx.Param, params))
    for wrapped in (boxed, variables):
        state, _ = bitsandbytes.load_optimizer_state(saved, tx, wrapped, **options)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(wrapped))
        assert_same(jax.tree.leaves(state), jax.tree.leaves(expected))
        dumped, _ = bitsandbytes.dump_optimizer_state(tx, wrapped, state, param_groups=GROUP, **options)
        again, _ = bitsandbytes.load_optimizer_state(dumped, tx, wrapped, **options)
        assert jax.tree.structure(again) == jax.tree.structure(state)


def test_sharded_parameters_get_sharded_moments():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    saved = one_vector(8 * 512)
    saved["state"][0]["state1"] = saved["state"][0]["state1"].reshape(8, 512)
    params = {"kernel": jax.device_put(jnp.zeros((8, 512)), sharding)}
    state, _ = bitsandbytes.load_optimizer_state(saved, bitsandbytes.lion8bit(), params, order=["kernel"])
    assert state[0].mu["kernel"].sharding == sharding and state[0].mu_absmax["kernel"].sharding == sharding


def test_hyperparameters_that_nobody_knows_are_asked_for(frozen):
    _, params = saved_of(ADAM, frozen)
    tx = our_optimizer(ADAM, state_format=BLOCKS)
    state, order = tx.init(params), ["weight", "bias"]
    with pytest.raises(ValueError, match="lacks betas, eps"):
        bitsandbytes.dump_optimizer_state(
            tx, params, state, order=order, param_groups={"lr": 1e-3, "weight_decay": 0.0}
        )
    other = our_optimizer(ADAM, rules=((".*", 32),))
    with pytest.raises(ValueError, match="uint8 for 'weight', which `tx` stores otherwise"):
        bitsandbytes.dump_optimizer_state(other, params, state, order=order, param_groups=GROUP)


def test_codes_that_are_not_bytes_are_no_numbers():
    codes = one_vector()["state"][0]["state1"]
    for wrong, what in (
        (codes.astype(np.int64), "int64 with scales"),
        (codes.astype(np.float32), "float32 with scales"),
    ):
        with pytest.raises(ValueError, match=f"`state1` of parameter 0 is {what}"):
            load_vector(one_vector(state1=wrong))


def test_scales_of_a_wider_dtype_are_cast():
    state, _ = load_vector(one_vector(absmax1=np.arange(1.0, 5.0)))
    np.testing.assert_array_equal(state.mu_absmax["kernel"], np.arange(1, 5, dtype=np.float32))
