"""Compares Adam's updates with rounded moments to those with fp32 moments, for random gradients.

    python -m benchmarks rounding                writes results/rounding.json, prints the table
    python -m benchmarks rounding --quick        a tenth of the steps; writes no file

The gradient of every element is drawn from N(0, 1), so that second moments should stay near 1 and updates should keep
their size. Then it is drawn from N(0, 1/30^2), so that second moments should fall. A step changes a second moment by
1 - b2 of itself or less, which is far below the distance between two codes. With rounding to nearest a moment moves
only when a large gradient comes, and hardly ever falls unless the scale of its block does. The losses of trainings,
which matter most, are in `quality.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_stable_embed as fse

from ..harness import report

SHAPE = (64, 256)
STEPS, AFTER = 6000, 1000  # gradients of size 1, then of size SHRUNK
SHRUNK = 1 / 30
EXACT = fse.scale_by_adam8bit(rules=((".*", 32),))
STORAGES = [(codec, rounding) for codec in ("root", "dynamic") for rounding in ("nearest", "stochastic")]


def measure(shorter: int = 1) -> dict[str, Any]:
    """Returns size and error of updates, and second moments after gradients shrank, for fp32 and every storage."""
    exact = _run(EXACT, shorter)
    rows = [_row("fp32", "", exact, exact)]
    for codec, rounding in STORAGES:
        state_format = fse.StateFormat(codec, rounding, min_size=0)
        stored = _run(fse.scale_by_adam8bit(state_format=state_format), shorter)
        rows.append(_row(codec, rounding, stored, exact))
    steps = {"steps": STEPS // shorter, "after": AFTER // shorter, "shrunk": SHRUNK, "shape": SHAPE}
    return {"environment": report.environment("rounding"), **steps, "rows": rows}


def _run(tx: Any, shorter: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns every tenth update in the last tenth of the steps, and the second moment after gradients shrank."""
    params = {"kernel": jnp.zeros(SHAPE)}

    @jax.jit
    def step(state, i, size):
        g = size * jax.random.normal(jax.random.fold_in(jax.random.key(0), i), SHAPE)
        updates, state = tx.update({"kernel": g}, state, params)
        return updates["kernel"], state

    state, updates, steps = tx.init(params), [], STEPS // shorter
    for i in range(steps):
        u, state = step(state, i, 1.0)
        if i >= 0.9 * steps and i % 10 == 0:
            updates.append(np.asarray(u))
    for i in range(AFTER // shorter):
        _, state = step(state, steps + i, SHRUNK)
    return updates, np.asarray(fse.convert_state(tx, EXACT, params, state).nu["kernel"])


def _row(codec: str, rounding: str, run: Any, exact: Any) -> dict[str, Any]:
    (updates, nu), (theirs, their_nu) = run, exact
    return {
        "codec": codec,
        "rounding": rounding,
        "size": _rms(updates) / _rms(theirs),
        "error": _rms(np.subtract(updates, theirs)) / _rms(theirs),
        "second_moment_after": float(np.median(nu / their_nu)),
    }


def _rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def markdown(results: dict[str, Any]) -> str:
    """Returns the rows as a table."""
    lines = [
        f"`python -m benchmarks rounding`, {' x '.join(map(str, results['shape']))} elements, "
        f"{results['steps']} steps with gradients from N(0, 1), then {results['after']} with gradients "
        f"1/{1 / results['shrunk']:.0f} as large, compared with Adam with fp32 moments:",
        "",
        "| moments | size of updates | error of updates | second moment after gradients shrank |",
        "| --- | --: | --: | --: |",
    ]
    for row in results["rows"][1:]:
        name, after = f"{row['codec']}, {row['rounding']}", row["second_moment_after"]
        lines.append(f"| {name} | {row['size'] - 1:+.1%} | {row['error']:.1%} | {after:.2f}x |")
    return "\n".join(lines)


FILE = report.RESULTS / "rounding.json"


def main(arguments: list[str], save: Callable = report.save) -> None:
    """Measures, prints, and keeps the results of a full run."""
    report.run(
        "rounding",
        __doc__,
        arguments,
        lambda quick: measure(10 if quick else 1),
        markdown,
        lambda results: save(results, FILE),
    )
