"""Tests every optimizer of tests/cases.py on meshes: shardings, equal bits, and checkpoints from another mesh."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import (
    SMALL,
    assert_8bit,
    assert_equal,
    assert_nearly,
    assert_same_bits,
    build,
    core,
    every_kind_of_optimizer,
    first_moment,
    gradients,
    jitted,
    may_straddle,
    moments,
    parameters,
    run,
    types,
)

every_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)

KERNEL = (256, 32)  # eight blocks of 32 on the first axis, so no block straddles 2, 4 or 8 devices
SPECS = [P("a", "b"), P(("a", "b"), None), P(None, "b"), P("b")]


def mesh_of(kind, shape=(2, 4), names=("a", "b")):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def place(params, mesh, spec):
    """Shards the kernel by `spec` and replicates the rest."""
    rest = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
    return jax.device_put(params, rest | {"kernel": NamedSharding(mesh, spec)})


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def equivalent(a, b):
    """Whether two trees of arrays have equivalent shardings."""
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in zip(*map(jax.tree.leaves, (a, b))))


def cut(x):
    """Returns the number of shards along each axis."""
    return tuple(n // m for n, m in zip(x.shape, x.sharding.shard_shape(x.shape)))


@every_kind_of_optimizer
@every_kind
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.one_in(16)
def test_the_state_is_sharded_like_the_parameter_and_stays_so(case, kind, spec):
    mesh, tx = mesh_of(kind), build(case)
    with jax.set_mesh(mesh):
        params = place(parameters(kernel=KERNEL), mesh, spec)
        state = tx.init(params)
        found = assert_8bit(case, state)
        for name in moments(case):
            codes, absmax = (getattr(found, field)["kernel"] for field in (name, f"{name}_absmax"))
            assert codes.sharding.is_equivalent_to(params["kernel"].sharding, 2)
            assert cut(absmax) == cut(codes), "blocks fit the shards, so scales must be sharded like their codes"
            for key in ("wte", "norm"):
                for x in jax.tree.leaves((getattr(found, name)[key], getattr(found, f"{name}_absmax")[key])):
                    assert x.sharding.device_set == set(mesh.devices.flat)
        step = jax.jit(lambda *args: jitted(tx)(*args))
        new, after = params, state
        for i in range(3):
            grads = place(gradients(i, params), mesh, spec)
            new, after, _ = step(grads, after, new)
            assert equivalent(new, params)
            on_mesh = lambda s: [s._asdict()[f] for m in moments(case) for f in (m, f"{m}_absmax")]  # noqa: E731
            assert equivalent(on_mesh(core(case, after)), on_mesh(found))
        if kind == AxisType.Explicit:
            assert types(after) == types(state) and types(new) == types(params)
            assert types(jax.jit(tx.init)(params)) == types(state)
            fused = jax.eval_shape(functools.partial(fse.fused_update, tx), params, state, params)
            assert types(fused) == types((params, state))
        assert_8bit(case, after)


@every_kind_of_optimizer
@every_kind
@pytest.mark.one_in(5)
@may_straddle
def test_blocks_that_straddle_devices_still_give_the_same_bits(case, kind):
    """`shards` is wrong here: an axis with two blocks of 32 is sharded over four devices."""
    tx, plain = build(case), parameters(kernel=(64, 64))
    expected, expected_state = run(tx, plain, 2)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = place(plain, mesh, P("a", "b"))
        state = tx.init(params)
        assert_8bit(case, state)
        new, after = run(tx, params, 2, step=jax.jit(lambda *args: jitted(tx)(*args)), state=state)
        assert_equal(case, (new, after), (expected, expected_state))
        assert cut(first_moment(case, after)["kernel"]) == cut(params["kernel"])


@functools.cache
def on_one_device(case, rounding):
    tx = build(case, state_format=fse.StateFormat(rounding=rounding, min_size=0))
    return run(tx, parameters(kernel=KERNEL))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [
    ("stochastic", AUTO, (1, 1), P("a", "b")),
    ("stochastic", EXPLICIT, (2, 1), P("a", "b")),
    ("stochastic", AUTO, (2, 2), P("b", "a")),
    ("stochastic", EXPLICIT, (2, 4), P(("a", "b"))),
    ("stochastic", AUTO, (2, 4), P("a", "b")),
    ("nearest", AUTO, (2, 4), P(("b", "a"))),
    ("nearest", EXPLICIT, (1, 4), P(None, "b")),
]


@pytest.mark.parametrize(
    ("case", "rounding", "kind", "shape", "spec"),
    [
        # `make test` runs one of the seven meshes for each optimizer, and all seven in total.
        pytest.param(case, *mesh, marks=[] if (k - 3 * n) % 7 == 0 else pytest.mark.slow)
        for n, case in enumerate(OPTIMIZERS)
        for k, mesh in enumerate(MESHES)
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.one_in(7)
def test_every_mesh_gives_the_same_bits(case, rounding, kind, shape, spec):
    expected, expected_state = on_one_device(case, rounding)
    tx = build(case, state_format=fse.StateFormat(rounding=rounding, min_size=0))
    mesh = mesh_of(kind, shape)
    with jax.set_mesh(mesh):
        params = place(parameters(kernel=KERNEL), mesh, spec)
        step = jax.jit(lambda *args: jitted(tx)(*args))
        new, state = params, tx.init(params)
        for i in range(3):
            new, state, _ = step(place(gradients(i, params), mesh, spec), state, new)
        assert_8bit(case, state)
        assert_equal(case, (new, state), (expected, expected_state))


@every_kind_of_optimizer
@pytest.mark.parametrize("made", ["eager", "jit", "elsewhere", "numpy"])
@pytest.mark.one_in(5)
def test_parameters_on_a_mesh_work_with_states_from_anywhere(case, made):
    """The Auto mesh is not set. The state comes from `init` with and without jit, from one device, or from NumPy."""
    mesh, tx, plain = mesh_of(AxisType.Auto), build(case), parameters(kernel=KERNEL)
    params = place(plain, mesh, P("a", "b"))
    state = {"eager": tx.init, "jit": jax.jit(tx.init)}.get(made, lambda _: tx.init(plain))(params)
    state = jax.tree.map(np.asarray, state) if made == "numpy" else state
    grads = place(gradients(0, plain), mesh, P("a", "b"))
    found = jax.jit(lambda *args: jitted(tx)(*args))(grads, state, params)
    expected = jitted(tx)(gradients(0, plain), tx.init(plain), plain)
    assert_8bit(case, found[1])
    assert_equal(case, found, expected)


@every_kind_of_optimizer
@every_kind
def test_one_step_moves_no_data_between_devices(case, kind):
    mesh, tx = mesh_of(kind), build(case)
    with jax.set_mesh(mesh):
        params = place({"kernel": parameters(kernel=KERNEL)["kernel"]}, mesh, P("a", "b"))
        state = tx.init(params)
        found = assert_8bit(case, state)
        assert cut(first_moment(case, found)["kernel"]) == (2, 4)
        step = jax.jit(lambda *args: fse.fused_update(tx, *args), donate_argnums=(1, 2))
        text = step.lower(params, state, params).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", *([] if case.sums else ["all-reduce"])):
        assert collective not in text
    # Only norms are reduced, which are single numbers, never an array of the parameter's shape.
    assert all(shape in ("f32[]", "f32[1,1]") for shape in re.findall(r"= (\S+?)(?:\{\S*)? all-reduce\(", text))


@every_kind_of_optimizer
@every_kind
@pytest.mark.one_in(5)
def test_a_checkpoint_opens_on_another_mesh(case, kind, tmp_path):
    tx = build(case)
    mesh = mesh_of(kind, (2, 2))
    with jax.set_mesh(mesh):
        params = place(parameters(kernel=KERNEL), mesh, P("a", "b"))
        params, state = run(tx, params, 2, step=jax.jit(lambda *args: jitted(tx)(*args)))
        assert_8bit(case, state)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", {"params": params, "state": state})
    plain = jax.eval_shape(lambda: parameters(kernel=KERNEL))
    for shape, spec in (((4, 1), P("a", None)), ((2, 4), P(None, ("a", "b")))):
        target = mesh_of(kind, shape)
        where = {"kernel": NamedSharding(target, spec), "other": NamedSharding(target, P())}
        abstract = jax.tree_util.tree_map_with_path(
            lambda path, x, where=where: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=where["kernel" if "kernel" in jax.tree_util.keystr(path) else "other"]
            ),
            {"params": plain, "state": jax.eval_shape(tx.init, plain)},
        )
        with ocp.StandardCheckpointer() as checkpointer, jax.set_mesh(target):
            restored = checkpointer.restore(tmp_path / "state", abstract)
        assert_same_bits(restored, {"params": params, "state": state})
        assert restored["params"]["kernel"].sharding.mesh.shape == target.shape


OTHER_FORMATS = [
    {"state_format": fse.StateFormat("dynamic", min_size=0)},
    {"state_format": fse.StateFormat("linear", min_size=0)},
    {"state_format": fse.StateFormat(block_size=64, min_size=0)},
    {"rules": ((".*", 32),)},
    {"rules": (("kernel", fse.Rule(8, fse.StateFormat("dynamic", min_size=0))),)},
]


def refuse_every_other_format(folder):
    """Orbax casts dtypes silently, so the shapes of scales and `format` must give the error."""
    for case in OPTIMIZERS:
        state = build(case).init({"kernel": jnp.ones((32, 64))})
        assert_8bit(case, state)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / case.name, state)
            checkpointer.wait_until_finished()
            for other in OTHER_FORMATS:
                tx = case.ours(**case.hyper, **{"state_format": SMALL} | other)
                with pytest.raises(ValueError, match="shape"):
                    checkpointer.restore(
                        Path(folder) / case.name, jax.eval_shape(tx.init, {"kernel": jnp.ones((32, 64))})
                    )


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    # This runs in its own process. If one array fails, orbax drops the reads of the others, which warn when they are
    # collected, possibly in a later test.
    code = (
        f"from {__name__} import refuse_every_other_format as refuse; refuse({str(tmp_path)!r}); print('all refused')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "all refused" in done.stdout, done.stderr


@every_kind_of_optimizer
@every_kind
def test_abstract_init_keeps_the_shardings_of_its_shapes(case, kind):
    mesh, tx = mesh_of(kind), build(case)
    with jax.set_mesh(mesh):
        params = place(parameters(kernel=KERNEL), mesh, P("a", "b"))
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
        state = tx.init(shapes)
        assert_8bit(case, state)
        assert_same_bits(state, tx.init(params))
        assert types(state) == types(tx.init(params))
        if kind == AxisType.Explicit:
            # Compared as text, because `eval_shape` gives counts an empty mesh, in optax too.
            assert str(types(jax.eval_shape(tx.init, shapes))) == str(types(state))


@every_kind_of_optimizer
@every_kind
def test_init_under_jit_accepts_the_shardings_of_the_abstract_state(case, kind):
    mesh, tx = mesh_of(kind), build(case)
    with jax.set_mesh(mesh):
        params = place(parameters(kernel=KERNEL), mesh, P("a", "b"))
        eager, abstract = tx.init(params), fse.abstract_state(tx, params)
        assert jax.tree.structure(eager) == jax.tree.structure(abstract)
        for x, like in zip(jax.tree.leaves(eager), jax.tree.leaves(abstract), strict=True):
            assert (x.shape, x.dtype) == (like.shape, like.dtype)
            assert like.sharding.mesh == mesh
            if isinstance(x.sharding, NamedSharding):
                assert like.sharding.is_equivalent_to(x.sharding, x.ndim)
            else:  # counts, which are not placed on a mesh
                assert like.sharding.is_fully_replicated
        state = jax.jit(tx.init, out_shardings=shardings(abstract))(params)
        assert_8bit(case, state)
        assert_same_bits(state, eager)
        assert equivalent(state, abstract)


@every_kind_of_optimizer
@every_kind
@pytest.mark.one_in(5)
def test_multi_steps_and_clipping_work_on_a_mesh(case, kind):
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), build(case)), 2)
    plain = parameters(kernel=KERNEL)
    expected = run(tx, plain, 2, step=jax.jit(functools.partial(_stepped, tx)))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = place(plain, mesh, P("a", "b"))
        state, new = tx.init(params), params
        step = jax.jit(functools.partial(_stepped, tx))
        for i in range(2):
            new, state, _ = step(place(gradients(i, params), mesh, P("a", "b")), state, new)
        found = assert_8bit(case, state)
        assert cut(first_moment(case, found)["kernel"]) == (2, 4)
        assert_nearly((new, state), expected, rtol=1e-5)  # the norm is summed in another order


def _stepped(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, updates


@pytest.mark.parametrize("devices", [1, 8])
def test_arrays_on_an_explicit_mesh_need_no_set_mesh(devices):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.float32)
    mesh = jax.make_mesh((devices,), ("a",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:devices])
    tx = fse.adamw8bit(1e-3)
    want = jax.jit(tx.update)(kernel, tx.init(kernel), kernel)
    cut = jax.device_put(kernel, NamedSharding(mesh, P(None, "a")))
    for update in (jax.jit(tx.update), tx.update):
        got = update(cut, tx.init(cut), cut)
        jax.tree.map(np.testing.assert_array_equal, got, want)
