"""Measures full models in fp32 and in 8 bits: the time to compile a step, many small parameters, and a training step.

    python -m benchmarks models             writes results/models.json, prints the tables; about ten minutes
    python -m benchmarks models --quick     small models; writes no file

Compile times are from tracing to the compiled program, for this machine and for chips whose compilers are installed
(extras `tpu` and `cuda`). Chips without a compiler keep the row that they had.
"""

import gc
import json
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..counted import compiled
from ..harness import report
from ..harness.contenders import ADAMW, LEARNING_RATE, step_of
from ..harness.shapes import tinyllama
from ..harness.tree_steps import BASELINE, EIGHT, OURS, ours, small_leaves, training

FILE = report.RESULTS / "models.json"
CHIPS = ("v6e", compiled.GPU)  # chips with enough memory for the model
TIMES = 3  # a program is compiled so often, and the median counts
SMALL = 200  # vectors; with thousands of them XLA compiles for many minutes on CPU


def compile_times(quick: bool) -> dict[str, Any]:
    """Returns the seconds to trace and compile a step of AdamW for the arrays of TinyLlama, by platform."""
    shapes, rows = tinyllama(1, 64) if quick else tinyllama(), {}
    places: dict[str, Any] = {jax.default_backend(): jax.devices()[0]}
    for chip in () if quick else CHIPS:
        if (devices := compiled.devices_of(chip)) is not None:
            places[chip] = devices[0]
    for name, device in places.items():
        sharding = jax.sharding.SingleDeviceSharding(device)
        params = {k: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for k, shape in shapes.items()}
        turns = {BASELINE: [], OURS: []}
        for _ in range(1 if quick else TIMES):
            turns[BASELINE].append(_seconds(optax.adamw(LEARNING_RATE, **ADAMW), params, False))
            turns[OURS].append(_seconds(ours(rules=EIGHT), params, True))
        rows[name] = {"arrays": len(shapes), **{key: sorted(times)[len(times) // 2] for key, times in turns.items()}}
    return rows


def _seconds(tx: Any, params: Any, fused: bool) -> float:
    place = next(iter(params.values())).sharding
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(tx.init, params)
    )

    jax.clear_caches()
    gc.collect()
    began = perf_counter()
    jax.jit(step_of(tx, fused), donate_argnums=(0, 1)).lower(params, state, params).compile()
    return perf_counter() - began


def measure(quick: bool) -> dict[str, Any]:
    """Returns all measurements."""
    rounds = 3 if quick else 9
    with compiled.dumped():
        times = compile_times(quick)
    if not quick and FILE.exists():
        times = json.loads(FILE.read_text())["compile"] | times
    return {
        "environment": report.environment("models"),
        "compile": times,
        "training": training(quick, rounds, batch=1, context=128),
        "small": small_leaves(quick, rounds, SMALL),
    }


def markdown(results: dict[str, Any]) -> str:
    """Returns the tables."""
    env = results["environment"]
    lines = [["AdamW, TinyLlama 1.1B, 201 arrays: seconds to trace and compile", BASELINE, OURS, "ratio"]]
    lines.append(["---", *["--:"] * 3])
    for name, row in results["compile"].items():
        base, own = row[BASELINE], row[OURS]
        lines.append([name, f"{base:.1f}", f"{own:.1f}", f"{own / base:.2f}x"])
    steps = [["step", "ms", "ratio"], ["---", *["--:"] * 2]]
    for name, row in results["training"].items():
        title = f"language_model.py, {row['parameters'] / 1e6:.0f}M parameters, {row['tokens']} tokens: {name}"
        steps.append([title, report.spread(row["ms"]), f"{row['ratio'][1]:.2f}x"])
    for name, row in results["small"].items():
        title = f"{SMALL} vectors of 64 to 4096 elements: {name}"
        steps.append([title, report.spread(row["ms"]), f"{row['ratio'][1]:.2f}x"])
    about = f"{env['device']}, {env['cores']} cores; `python -m benchmarks models` at {env['commit']}, {env['date']}."
    return f"{about}\n\n{report.table(lines)}\n\n{report.table(steps)}"


def main(arguments: list[str]) -> None:
    """Measures, prints, and keeps the results of a full run."""
    report.run("models", __doc__, arguments, measure, markdown, lambda results: report.save(results, FILE))
