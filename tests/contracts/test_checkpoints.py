"""Tests that a run continues from its checkpoint: with every library, on every mesh, and after damage to the files.

Runs are saved on a mesh of 2 x 2 after two steps with stochastic rounding, whose bits are the same on every mesh. So
two more steps on any mesh must give the bits of a run that was never interrupted.
"""

import functools
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1

import flax_stable_embed as fse
from tests.tools import assert_same_bits, gradients, is_codes, parameters

SHAPE = (256, 32)  # eight blocks of 32 on the first axis, so no block straddles 2, 4 or 8 devices
TX = fse.adamw8bit(0.01, state_format=fse.StateFormat(rounding="stochastic", min_size=0))


def mesh_of(*shape):
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("a", "b"))


def sharding_on(mesh, path, x):
    """Shards the kernel and its moments, and replicates everything else."""
    is_cut = "kernel" in jax.tree_util.keystr(path) and x.ndim == 2
    return NamedSharding(mesh, P("a", "b") if is_cut else P())


def placed(tree, mesh):
    return jax.tree_util.tree_map_with_path(lambda path, x: jax.device_put(x, sharding_on(mesh, path, x)), tree)


def shapes(where):
    """Returns shapes of parameters and state with shardings. Nothing is allocated."""
    params = jax.eval_shape(lambda: parameters(kernel=SHAPE))
    tree = {"params": params, "state": jax.eval_shape(TX.init, params)}

    def shape(path, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(path, x))

    return jax.tree_util.tree_map_with_path(shape, tree)


TARGETS = {
    "the same mesh": lambda path, x: sharding_on(mesh_of(2, 2), path, x),
    "another shape": lambda path, x: sharding_on(mesh_of(4, 1), path, x),
    "more devices": lambda path, x: sharding_on(mesh_of(2, 4), path, x),
    "one device": lambda path, x: SingleDeviceSharding(jax.devices()[3]),
}


@functools.cache
def stepped():
    return jax.jit(lambda grads, state, params: fse.fused_update(TX, grads, state, params), donate_argnums=(1, 2))


def take_steps(run, steps, first):
    """Takes more steps and returns the run. The arrays of `run` are donated."""
    params, state = run["params"], run["state"]
    for i in range(first, first + steps):
        like = jax.tree.map(lambda p: p.sharding, params)
        grads = jax.device_put(gradients(i, parameters(kernel=SHAPE)), like)
        params, state = stepped()(grads, state, params)
    return {"params": params, "state": state}


def saved_run(steps=2):
    """The run when it is saved."""
    params = placed(parameters(kernel=SHAPE), mesh_of(2, 2))
    return take_steps({"params": params, "state": placed(TX.init(params), mesh_of(2, 2))}, steps, 0)


@functools.cache
def bits(steps):
    """The uninterrupted run, on the host."""
    return jax.tree.map(np.array, saved_run(steps))


def assert_continues(run):
    """Checks that a run restored after two steps continues with the bits of the uninterrupted run."""
    assert_same_bits(run, bits(2))
    assert is_codes(run["state"][0].mu["kernel"])
    assert_same_bits(take_steps(run, 2, 2), bits(4))


def by_manager(folder, run=None, like=None):
    with ocp.CheckpointManager(folder) as manager:
        if run is None:
            return manager.restore(2, args=ocp.args.StandardRestore(like))
        manager.save(2, args=ocp.args.StandardSave(run))


def by_checkpointer(folder, run=None, like=None):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, like) if run is None else checkpointer.save(folder, run)


def by_v1(folder, run=None, like=None):
    return v1.load(folder, like) if run is None else v1.save(folder, run)


LIBRARIES = {"v1": by_v1, "StandardCheckpointer": by_checkpointer, "CheckpointManager": by_manager}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_run_continues_from_shapes_and_shardings(library, target, tmp_path):
    by, like = LIBRARIES[library], shapes(TARGETS[target])
    by(tmp_path / "run", run=saved_run())
    before = sum(x.nbytes for x in jax.live_arrays())
    run = by(tmp_path / "run", like=like)
    held = sum(x.nbytes for x in jax.live_arrays()) - before
    assert held == sum(x.nbytes for x in jax.tree.leaves(run)), "arrays are held twice"
    assert all(x.sharding == y.sharding for x, y in zip(*map(jax.tree.leaves, (run, like)), strict=True))
    assert_continues(run)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_run_on_one_device_continues_on_a_mesh(library, tmp_path):
    one = jax.device_put(bits(2), jax.devices()[0])
    LIBRARIES[library](tmp_path / "run", run=one)
    assert_continues(LIBRARIES[library](tmp_path / "run", like=shapes(TARGETS["more devices"])))


def test_an_explicit_mesh_opens_the_checkpoint_of_an_auto_mesh(tmp_path):
    by_v1(tmp_path / "run", run=saved_run())
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        run = by_v1(tmp_path / "run", like=shapes(lambda path, x: sharding_on(mesh, path, x)))
        assert jax.typeof(run["params"]["kernel"]).sharding.spec == P("a", "b")
        assert_continues(run)


# --- serialization to bytes ------------------------------------------------------------------------------------------


def by_msgpack(file, run):
    file.write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(run)))
    return serialization.from_state_dict(run, serialization.msgpack_restore(file.read_bytes()))


def by_bytes(file, run):
    file.write_bytes(serialization.to_bytes(run))
    return serialization.from_bytes(run, file.read_bytes())


def by_safetensors(file, run):
    """Flattens by path. Every leaf of a state is one array with its own name."""
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    pairs, tree = jax.tree_util.tree_flatten_with_path(run)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.array(x) for path, x in pairs}
    assert len(named) == len(pairs)
    library.save_file(named, file)
    loaded = library.load_file(file)
    return tree.unflatten([loaded[name] for name in named])


@pytest.mark.parametrize("by", [by_msgpack, by_bytes, by_safetensors], ids=lambda by: by.__name__)
def test_a_run_continues_from_serialized_bytes(by, tmp_path):
    run = by(tmp_path / "run", saved_run())
    assert_continues(placed(run, mesh_of(2, 4)))


# --- saving during training ------------------------------------------------------------------------------------------


def test_saving_is_correct_while_steps_overwrite_the_saved_arrays(tmp_path):
    """Steps donate their buffers. The files must hold the bits at the time of each call of `save`.

    On CPU, JAX copies a donated buffer that is still being written to a file. On other devices, orbax copies it before.
    """
    run, expected = saved_run(), {}
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(max_to_keep=None)) as manager:
        for i in range(2, 8):
            expected[i] = jax.tree.map(np.array, run)
            assert manager.save(i, args=ocp.args.StandardSave(run))
            run = take_steps(run, 1, i)
        manager.wait_until_finished()
        for i, tree in expected.items():
            like = shapes(TARGETS["another shape"])
            assert_same_bits(manager.restore(i, args=ocp.args.StandardRestore(like)), tree)


def test_v1_saves_while_steps_run(tmp_path):
    run = saved_run()
    pending = v1.save_async(tmp_path / "run", run)
    run = take_steps(run, 2, 2)
    pending.result()
    assert_same_bits(run, bits(4))
    assert_continues(by_v1(tmp_path / "run", like=shapes(TARGETS["the same mesh"])))


# --- what can go wrong -----------------------------------------------------------------------------------------------


def cut_short(folder):
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_sense(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\xa5" * file.stat().st_size)


def without_arrays(folder):
    for file in list(folder.rglob("d/*")):
        file.unlink()


def without_state(folder):
    """Saves the parameters without the state."""
    shutil.rmtree(folder)
    with ocp.CheckpointManager(folder.parent) as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": saved_run(3)["params"]}))


def of_another_codec(folder):
    tx = fse.adamw8bit(0.01, state_format=fse.StateFormat("dynamic", min_size=0))
    _saved_by(folder, tx)


def of_other_rules(folder):
    _saved_by(folder, fse.adamw8bit(0.01, rules=((".*", 32),)))


def _saved_by(folder, tx):
    shutil.rmtree(folder)
    params = parameters(kernel=SHAPE)
    with ocp.CheckpointManager(folder.parent) as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": params, "state": tx.init(params)}))


def full_disk(folder):
    """Saves while no file may be longer than 2000 bytes."""
    shutil.rmtree(folder)
    run = saved_run(3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with ocp.CheckpointManager(folder.parent) as manager:
            manager.save(3, args=ocp.args.StandardSave(run))
            manager.wait_until_finished()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


SAID = {
    cut_short: "",
    without_sense: "",
    without_arrays: "",
    without_state: "state",
    of_another_codec: "shape",
    of_other_rules: "shape",
    full_disk: "File too large",
}


def refuse_and_continue(folder):
    """Checks that the last checkpoint is refused with an error that says why, and that the one before it opens."""
    for spoil, said in SAID.items():
        steps, like = Path(folder) / spoil.__name__, shapes(TARGETS["the same mesh"])
        with ocp.CheckpointManager(steps) as manager:
            manager.save(2, args=ocp.args.StandardSave(saved_run()))
            manager.save(3, args=ocp.args.StandardSave(saved_run(3)))
        try:
            spoil(steps / "3")
            with ocp.CheckpointManager(steps) as manager:
                manager.restore(3, args=ocp.args.StandardRestore(like))
            message = ""
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        print(f"{spoil.__name__}: {message:.300}".replace("\n", " "))
        assert message and said in message, spoil.__name__
        with ocp.CheckpointManager(steps) as manager:
            assert manager.latest_step() == (2 if spoil is full_disk else 3)
            assert_continues(manager.restore(2, args=ocp.args.StandardRestore(like)))
    print("all continued")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_opens(tmp_path):
    # This runs in its own process. If one array fails, orbax drops the reads of the others, which warn when they are
    # collected, possibly in a later test.
    code = f"import tests.conftest; from {__name__} import refuse_and_continue; refuse_and_continue({str(tmp_path)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    print(done.stdout)
    assert "all continued" in done.stdout, done.stderr
