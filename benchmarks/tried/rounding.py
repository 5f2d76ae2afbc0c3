"""Compares Adam's updates with rounded moments to those with fp32 moments, for random gradients.

    python -m benchmarks rounding                writes results/rounding.json, prints the tables
    python -m benchmarks rounding --quick        a tenth of the steps; writes no file

First table: the gradient of every element is drawn from N(0, 1), so that second moments should stay near 1 and updates
should keep their size. Then it is drawn from N(0, 1/30^2), so that second moments should fall. A step changes a second
moment by 1 - b2 of itself or less, which is far below the distance between two codes. With rounding to nearest a moment
moves only when a large gradient comes, and hardly ever falls unless the scale of its block does.

Second table: the error of updates for several decays b2 and kinds of gradients, where only second moments are rounded
in another way. It shows where dither begins to be better than rounding to nearest. The losses of trainings, which
matter most, are in `quality.py`.
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
ROUNDINGS = ("nearest", "dither", "stochastic")
STORAGES = [(codec, rounding) for codec in ("root", "dynamic") for rounding in ROUNDINGS]
DECAYS, BY_DECAY = (0.95, 0.98, 0.99, 0.995, 0.999), 2000  # steps

KEY = jax.random.key(0)
SCALES = jnp.exp(0.7 * jax.random.normal(jax.random.key(1), SHAPE))
HALF = jax.random.bernoulli(jax.random.key(2), 0.5, SHAPE)


def _normal(i: Any, steps: int) -> Any:
    del steps
    return jax.random.normal(jax.random.fold_in(KEY, i), SHAPE)


def _heavy_tailed(i: Any, steps: int) -> Any:
    del steps
    normal = jax.random.normal(jax.random.fold_in(KEY, i), (6, *SHAPE))  # JAX's own sampler of t takes far longer
    return SCALES * normal[0] / jnp.sqrt(jnp.mean(normal[1:] ** 2, axis=0))


def _shrinking(i: Any, steps: int) -> Any:
    return _heavy_tailed(i, steps) * jnp.where((i > steps // 3) & HALF, SHRUNK, 1.0)


def _periodic(i: Any, steps: int) -> Any:
    return _normal(i, steps) * jnp.where(i % 4 == 0, 4.0, 0.5)


def _constant(i: Any, steps: int) -> Any:
    return SCALES * jnp.where(i < steps // 3, 1.0, -0.3)


GRADIENTS: dict[str, Callable[[Any, int], Any]] = {
    "N(0, 1)": _normal,
    "Student t(5), lognormal scales": _heavy_tailed,
    "half of them shrink 30x at a third": _shrinking,
    "four times as large every 4th step": _periodic,
    "constant, another sign at a third": _constant,
}


def measure(shorter: int = 1) -> dict[str, Any]:
    """Returns size and error of updates, and second moments after gradients shrank, for fp32 and every storage."""
    exact = _run(_adam(0.999), shorter)
    rows = [_row("fp32", "", exact, exact)]
    for codec, rounding in STORAGES:
        rows.append(_row(codec, rounding, _run(_adam(0.999, codec, rounding), shorter), exact))
    steps = {"steps": STEPS // shorter, "after": AFTER // shorter, "shrunk": SHRUNK, "shape": SHAPE}
    by_decay = [
        {"decay": decay, "gradients": name} | _errors(decay, gradient, BY_DECAY // shorter)
        for decay in DECAYS
        for name, gradient in GRADIENTS.items()
    ]
    steps |= {"steps_by_decay": BY_DECAY // shorter}
    return {"environment": report.environment("rounding"), **steps, "rows": rows, "by_decay": by_decay}


def _adam(b2: float, codec: Any = "root", rounding: Any = None) -> Any:
    """Returns Adam, with fp32 moments if there is no rounding."""
    rules = ((".*", 32),) if rounding is None else ()
    return fse.scale_by_adam8bit(b2=b2, rules=rules, state_format=fse.StateFormat(codec, rounding, min_size=0))


def _run(tx: Any, shorter: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns every tenth update in the last tenth of the steps, and the second moment after gradients shrank."""
    params = {"kernel": jnp.zeros(SHAPE)}

    @jax.jit
    def step(state, i, size):
        g = size * jax.random.normal(jax.random.fold_in(KEY, i), SHAPE)
        updates, state = tx.update({"kernel": g}, state, params)
        return updates["kernel"], state

    state, updates, steps = tx.init(params), [], STEPS // shorter
    for i in range(steps):
        u, state = step(state, i, 1.0)
        if i >= 0.9 * steps and i % 10 == 0:
            updates.append(np.asarray(u))
    for i in range(AFTER // shorter):
        _, state = step(state, steps + i, SHRUNK)
    return updates, np.asarray(fse.convert_state(tx, _adam(0.999), params, state).nu["kernel"])


def _errors(decay: float, gradient: Callable, steps: int) -> dict[str, float]:
    """Returns the error of updates, relative to those with fp32 moments, over the last quarter of the steps."""
    params = {"kernel": jnp.zeros(SHAPE)}
    optimizers = [_adam(decay), *(_adam(decay, "root", rounding) for rounding in ROUNDINGS)]

    def step(states, i):
        g = {"kernel": gradient(i, steps)}
        pairs = [tx.update(g, state, params) for tx, state in zip(optimizers, states)]
        exact, *stored = [updates["kernel"] for updates, _ in pairs]
        return [state for _, state in pairs], (jnp.sum(exact**2), [jnp.sum((u - exact) ** 2) for u in stored])

    run = jax.jit(lambda states: jax.lax.scan(step, states, jnp.arange(steps)))
    _, (size, errors) = run([tx.init(params) for tx in optimizers])
    last = steps // 4
    return {
        rounding: float(jnp.sqrt(error[-last:].sum() / size[-last:].sum()))
        for rounding, error in zip(ROUNDINGS, errors)
    }


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
    lines += [
        "",
        f"Error of updates in the last quarter of {results['steps_by_decay']} steps, `root`:",
        "",
        f"| decay of the second moment | gradients | {' | '.join(ROUNDINGS)} |",
        f"| --: | --- |{' --: |' * len(ROUNDINGS)}",
    ]
    for row in results["by_decay"]:
        best = min(row[rounding] for rounding in ROUNDINGS)
        found = [f"**{row[r]:.4f}**" if row[r] == best else f"{row[r]:.4f}" for r in ROUNDINGS]
        lines.append(f"| {row['decay']} | {row['gradients']} | {' | '.join(found)} |")
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
