"""Tests that a compiled step is the step that was asked for: no Python function in it, cached, serialized, exported."""

import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import SMALL, assert_same_bits, build, every_kind_of_optimizer, every_optimizer

WRAPPERS = {
    "quantize_state": lambda: fse.quantize_state(optax.adamw(1e-3), state_format=SMALL),
    "stochastic": lambda: fse.adamw8bit(1e-3, state_format=fse.StateFormat(min_size=0, rounding="stochastic")),
    "split_weights": lambda: fse.split_weights(fse.adamw8bit(1e-3, state_format=SMALL)),
    "stochastic_round_updates": lambda: fse.stochastic_round_updates(fse.adamw8bit(1e-3, state_format=SMALL)),
    "row_sparse": lambda: fse.row_sparse(fse.adamw8bit(1e-3, state_format=SMALL)),
    "percentile_clipping": lambda: fse.chain(fse.percentile_clipping(), fse.adamw8bit(1e-3, state_format=SMALL)),
    "clip_by_global_norm": lambda: fse.chain(fse.clip_by_global_norm(1.0), fse.adamw8bit(1e-3, state_format=SMALL)),
    "with_max_norm": lambda: fse.with_max_norm(fse.adamw8bit(1e-3, state_format=SMALL), 1.0),
    "bitsandbytes": lambda: fse.interop.bitsandbytes.adamw8bit(1e-3),
    "xla": lambda: fse.adamw8bit(1e-3, state_format=SMALL, implementation="xla"),
}
TRANSFORMS = WRAPPERS | {case.name: lambda case=case: build(case) for case in OPTIMIZERS}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "one device": ((1, 1), AUTO, P()),
    "Auto": ((2, 4), AUTO, P("a", "b")),
    "Auto, a block straddles devices": ((2, 4), AUTO, P(("a", "b"), None)),
    "Explicit": ((2, 4), EXPLICIT, P("a", "b")),
    "Explicit, a block straddles devices": ((2, 4), EXPLICIT, P(("a", "b"), None)),
}


def arrays(sizes, kind, spec, shape=(128, 128)):
    """Returns parameters, of which one is 8-bit and sharded, and gradients."""
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, ("a", "b")[: len(sizes)], axis_types=(kind,) * len(sizes), devices=devices)

    def some(seed):
        numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        tree = {"kernel": numbers, "wte": {"embedding": numbers[:16, :8]}}
        where = {"kernel": NamedSharding(mesh, spec), "wte": {"embedding": NamedSharding(mesh, P())}}
        return jax.device_put(tree, where)

    return mesh, some(0), some(1)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.one_in(7)
def test_no_python_function_is_reachable_from_a_compiled_step(name, mesh):
    tx = TRANSFORMS[name]()
    set_mesh, params, grads = arrays(*MESHES[mesh])
    with jax.set_mesh(set_mesh):
        state = tx.init(params)
        extra = {"token_ids": {"wte/embedding": jnp.arange(3)}} if name in ("row_sparse", "with_max_norm") else {}
        steps = [lambda g, s, p: tx.update(g, s, p, **extra)]
        steps += [lambda g, s, p: fse.fused_update(tx, g, s, p, **extra)] * (name != "quantize_state")
        for step in (tx.init, *steps):
            args = (params,) if step is tx.init else (grads, state, params)
            lowered = jax.jit(step).lower(*args).as_text()
            for word in ("CustomSPMDPartitioning", "callback", "xla_python"):
                assert word not in lowered


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("devices", [2, 8])
@every_optimizer
@pytest.mark.one_in(16)
def test_an_exported_step_gives_the_same_bits(case, devices, kind):
    tx = build(case)
    mesh, params, grads = arrays((devices,), kind, P("a"))
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=jax.tree.map(lambda x: x.sharding, fse.abstract_state(tx, params)))
        args, tree = jax.tree.flatten((grads, state(params), params))
        # As lists of arrays, because optax registers no state for serialization.
        step = jax.jit(lambda *args: jax.tree.leaves(tx.update(*tree.unflatten(args))))
        exported = jax.export.deserialize(jax.export.export(step)(*args).serialize())
        assert exported.nr_devices == devices
        assert_same_bits(jax.jit(exported.call)(*args), step(*args))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=lambda kind: kind.name)
@every_kind_of_optimizer
def test_a_serialized_step_runs_without_being_compiled_again(case, kind):
    tx = build(case)
    mesh, params, grads = arrays((2, 4), kind, P("a", "b"))
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=jax.tree.map(lambda x: x.sharding, fse.abstract_state(tx, params)))
        args = grads, state(params), params
        compiled = jax.jit(tx.update).lower(*args).compile()
        loaded = deserialize_and_load(*serialize(compiled))
        assert_same_bits(loaded(*args), compiled(*args))


# --- in other processes ----------------------------------------------------------------------------------------------

# Every static hyper-parameter in turn. The first entry is the program of an earlier process.
VARIANTS = {
    "as before": {},
    "learning_rate": {"learning_rate": 1e-1},
    "weight_decay": {"weight_decay": 0.1},
    "b1": {"b1": 0.5},
    "b2": {"b2": 0.9},
    "eps": {"eps": 0.5},
    "eps_root": {"eps_root": 0.5},
    "nesterov": {"nesterov": True},
    "a constant schedule": {"learning_rate": optax.constant_schedule(0.2)},
    "rounding": {"state_format": fse.StateFormat(min_size=0, rounding="stochastic")},
    "codec": {"state_format": fse.StateFormat("linear", min_size=0)},
}


def a_step(variant):
    """Returns a step of AdamW on two devices, and its arguments."""
    options = {"learning_rate": 1e-3, "weight_decay": 0.0, "state_format": SMALL} | VARIANTS[variant]
    tx = fse.adamw8bit(**options)
    _, params, grads = arrays((2,), AUTO, P("a"))
    return jax.jit(tx.update), (grads, tx.init(params), params)


def run_with_a_cache(folder: str, strip: str, second: str):
    """Runs steps with a cache on disk, as the first or as the second process that uses it."""
    step, args = a_step("as before")
    jax.config.update("jax_enable_compilation_cache", False)
    expected = {name: function(*given) for name in VARIANTS for function, given in [a_step(name)]}
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    if hasattr(jax.config, "jax_remove_custom_partitioning_ptr_from_cache_key"):
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", strip == "strip")
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    for variant in VARIANTS if second == "second" else ["as before"]:
        step, args = a_step(variant)
        events.clear()
        found = step(*args)
        hits = sum(name.endswith("cache_hits") for name in events)
        assert hits == (second == "second" and variant == "as before"), (variant, hits)
        assert_same_bits(found, expected[variant])
    print("all right")


def save_step(file: str):
    step, args = a_step("as before")
    Path(file).write_bytes(pickle.dumps(serialize(step.lower(*args).compile())))
    print("all right")


def load_step(file: str):
    step, args = a_step("as before")
    loaded = deserialize_and_load(*pickle.loads(Path(file).read_bytes()), execution_devices=jax.devices()[:2])
    assert_same_bits(loaded(*args), step(*args))
    print("all right")


def in_a_process(call):
    code = f"import tests.conftest, {__name__} as here; here.{call}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "all right" in done.stdout, done.stderr


@pytest.mark.parametrize("strip", ["strip", "keep"])
@pytest.mark.one_in(4)
def test_a_cache_on_disk_never_gives_the_program_of_another_hyper_parameter(strip, tmp_path):
    for which in ("first", "second"):
        in_a_process(f"run_with_a_cache({str(tmp_path)!r}, {strip!r}, {which!r})")


def test_another_process_loads_a_serialized_step(tmp_path):
    file = str(tmp_path / "step")
    in_a_process(f"save_step({file!r})")
    in_a_process(f"load_step({file!r})")
