"""Applies many small updates to weights that are stored in several ways, and compares with float64.

    python -m benchmarks weights                writes results/weights.json, prints the tables
    python -m benchmarks weights --quick        a tenth of the steps; writes no file

First table: an update is -rate * (0.1 s + 0.3 a + 0.1 w), with a constant sign s for each weight, noise a that is
correlated over about ten steps, and weight decay. Learning rates follow a cosine to zero, apart from the smallest. The
error is the distance from float64 divided by the distance that float64 has moved. In brackets: the share of that
movement that was kept.

Second table: 8-bit AdamW next to AdamW with fp32 moments, for gradients of several sizes. Scales of blocks are float32,
so the error does not depend on the size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_stable_embed as fse
from flax_stable_embed.ops.counter_random import array_key, hashed_bits, linear_index, rounding_key, weight_bits
from flax_stable_embed.ops.rounding import stochastic_round
from flax_stable_embed.ops.split_weights import join_weight, split_weight

from ..harness import report

N, STEPS = 2048, 10_000
RATES = (3e-4, 1e-5, 1e-6, 1e-7)
CONSTANT = 1e-7  # the rate that does not fall
STARTS = {"N(0, 0.02)": (0.0, 0.02), "near 1": (1.0, 0.05)}
SIZES, SHAPE, AFTER = (1e-3, 1e-6, 1e-9, 1e-12), (256, 256), 30  # of gradients; array and steps of the second table


class Way(NamedTuple):
    """A way to store weights.

    bytes: The bytes per weight.
    start: Returns the stored form of float32 weights.
    read: Returns the float32 weights.
    store: Returns the stored form of the sum of weights and update: `store(stored, update, step)`.
    """

    bytes: int
    start: Callable[[Any], Any]
    read: Callable[[Any], Any]
    store: Callable[[Any, Any, Any], Any]


def _split(bits: int, rounding: str) -> Way:
    def noise(step: Any) -> Any:
        return (
            weight_bits(linear_index((N,)), rounding_key("dither", "weights", step)) if rounding == "dither" else None
        )

    return Way(
        bits // 8,
        lambda w: split_weight(w, bits),
        lambda stored: join_weight(*stored),
        lambda stored, u, step: split_weight(join_weight(*stored) + u, bits, noise(step)),
    )


def _wide(p: Any) -> Any:
    return p.astype(jnp.float32)


def _kahan(stored: Any, u: Any, step: Any) -> Any:
    del step
    p, rest = stored
    u = u + _wide(rest)
    new = (_wide(p) + u).astype(jnp.bfloat16)
    return new, (u - (_wide(new) - _wide(p))).astype(jnp.bfloat16)


def _stochastic(p: Any, u: Any, step: Any) -> Any:
    return stochastic_round(_wide(p) + u, jnp.bfloat16, hashed_bits(linear_index((N,)), array_key("weights", step)))


def _half(w: Any) -> Any:
    return w.astype(jnp.bfloat16)


WAYS = {
    "float32": Way(4, lambda w: w, lambda w: w, lambda w, u, step: w + u),
    "`split_weights`, 32 bits": _split(32, "nearest"),
    "bfloat16 with a bfloat16 compensation (Kahan)": Way(
        4, lambda w: (_half(w), _half(w - _wide(_half(w)))), lambda s: _wide(s[0]) + _wide(s[1]), _kahan
    ),
    "`split_weights`, 24 bits": _split(24, "dither"),
    "24 bits, rounded to nearest": _split(24, "nearest"),
    "bfloat16, `stochastic_round_updates`": Way(2, _half, _wide, _stochastic),
    "bfloat16": Way(2, _half, _wide, lambda p, u, step: _half(_wide(p) + u)),
}


def drift(mean: float, deviation: float, rate: float, steps: int) -> dict[str, dict[str, float]]:
    """Returns the error of each way after many updates, and the share of the movement that it has kept."""
    key = jax.random.key(0)
    sign = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (N,)), 1.0, -1.0).astype(jnp.float32)
    first = jnp.float32(mean + deviation * np.random.default_rng(0).standard_normal(N))

    def step(carry, k):
        noise, exact, stored = carry
        noise = 0.9 * noise + np.float32(np.sqrt(1 - 0.81)) * jax.random.normal(
            jax.random.fold_in(key, k + 10), (N,), jnp.float32
        )
        falls = 0.5 * (1 + jnp.cos(jnp.float32(np.pi / steps) * k.astype(jnp.float32)))
        now = jnp.float32(rate) * (1.0 if rate == CONSTANT else falls)
        direction = 0.1 * sign + 0.3 * noise
        exact = exact - now.astype(jnp.float64) * (direction.astype(jnp.float64) + 0.1 * exact)
        stored = {
            name: way.store(stored[name], -now * (direction + 0.1 * way.read(stored[name])), k)
            for name, way in WAYS.items()
        }
        return (noise, exact, stored), None

    stored = {name: way.start(first) for name, way in WAYS.items()}
    carry = jnp.zeros(N, jnp.float32), first.astype(jnp.float64), stored
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps, dtype=jnp.int32))[0])
    _, exact, stored = run(carry)
    moved = np.asarray(exact) - np.asarray(first, np.float64)
    found = {}
    for name, way in WAYS.items():
        by = np.asarray(way.read(stored[name]), np.float64) - np.asarray(first, np.float64)
        error = np.sqrt(np.mean((by - moved) ** 2) / np.mean(moved**2))
        found[name] = {"error": float(error), "kept": float(np.mean(by * moved) / np.mean(moved**2))}
    return found


def small_gradients(size: float) -> float:
    """Returns the error of parameters after some steps of 8-bit AdamW, relative to their movement with fp32 moments."""
    state_format = fse.StateFormat(min_size=0)
    optimizers = [
        fse.adamw8bit(1e-3, eps=1e-20, rules=rules, state_format=state_format) for rules in (((".*", 32),), ())
    ]
    start = {"kernel": jnp.zeros(SHAPE)}

    def run(tx):
        def step(carry, k):
            params, state = carry
            g = size * jax.random.normal(jax.random.fold_in(jax.random.key(0), k), SHAPE)
            return fse.fused_update(tx, {"kernel": g}, state, params), None

        return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.arange(AFTER))[0][0]["kernel"])()

    exact, stored = (np.asarray(run(tx), np.float64) for tx in optimizers)
    return float(np.sqrt(np.mean((stored - exact) ** 2) / np.mean(exact**2)))


def measure(shorter: int = 1) -> dict[str, Any]:
    """Returns the errors of all ways, rates and starts, and those for gradients of all sizes."""
    rows = []
    with jax.enable_x64(True):
        for name, (mean, deviation) in STARTS.items():
            for rate in RATES:
                found = drift(mean, deviation, rate, STEPS // shorter)
                rows += [{"start": name, "rate": rate, "way": way} | numbers for way, numbers in found.items()]
    small = [{"size": size, "error": small_gradients(size)} for size in SIZES]
    return {"environment": report.environment("weights"), "steps": STEPS // shorter, "rows": rows, "small": small}


def markdown(results: dict[str, Any]) -> str:
    """Returns the first table."""
    cells = {(row["way"], row["start"], row["rate"]): row for row in results["rows"]}
    columns = [(start, rate) for start in STARTS for rate in RATES if (start, rate) != ("near 1", CONSTANT)]
    head = ["stored as", "bytes", *(f"{start}, {rate:g}" for start, rate in columns)]
    lines = [head, ["---", "--:", *["--:" for _ in columns]]]
    for name, way in WAYS.items():
        numbers = [cells[name, start, rate] for start, rate in columns]
        lines.append([name, str(way.bytes), *(f"{x['error']:.1e} ({x['kept']:.1%})" for x in numbers)])
    about = (
        f"`python -m benchmarks weights`: {results['steps']:,} updates at several learning rates, of weights from "
        "N(0, 0.02) and of weights near 1. Error of the weights relative to the movement of float64, and in brackets "
        "the share of the movement that was kept:"
    )
    return about + "\n\n" + report.table(lines)


def markdown_of_bytes() -> str:
    """Returns a table of the bytes per parameter that a training keeps for a large matrix, by what holds them."""
    adamw8bit = fse.adamw8bit(1e-3)
    ways = {
        "float32, `optax.adamw`": (jnp.float32, optax.adamw(1e-3)),
        "float32, `adamw8bit`": (jnp.float32, adamw8bit),
        "bfloat16, `split_weights(adamw8bit, 32)`": (jnp.bfloat16, fse.split_weights(adamw8bit, 32)),
        "bfloat16, `split_weights(adamw8bit)`": (jnp.bfloat16, fse.split_weights(adamw8bit)),
        "bfloat16, `stochastic_round_updates(adamw8bit)`": (jnp.bfloat16, fse.stochastic_round_updates(adamw8bit)),
        "bfloat16, `optax.adamw`": (jnp.bfloat16, optax.adamw(1e-3)),
    }
    lines = [["training in", "parameter", "gradient", "moments", "remainder", "total"], ["---", *["--:"] * 5]]
    for name, (dtype, tx) in ways.items():
        params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), dtype)}
        remainder = sum(x.bytes for x in fse.describe(tx, params).remainders.values()) / 4096**2
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params))) / 4096**2
        wide = jnp.dtype(dtype).itemsize
        numbers = wide, wide, state - remainder, remainder, 2 * wide + state
        lines.append([name, *(f"{n:.2f}" if n else "" for n in numbers)])
    return report.table(lines)


def markdown_of_small(results: dict[str, Any]) -> str:
    """Returns the second table."""
    lines = [["size of gradients", "error"], ["--:", "--:"]]
    lines += [[f"{row['size']:g}", f"{row['error']:.2%}"] for row in results["small"]]
    return report.table(lines)


FILE = report.RESULTS / "weights.json"


def main(arguments: list[str], save: Callable = report.save) -> None:
    """Measures, prints, and keeps the results of a full run."""
    report.run(
        "weights",
        __doc__,
        arguments,
        lambda quick: measure(10 if quick else 1),
        lambda results: f"{markdown(results)}\n\n{markdown_of_small(results)}",
        lambda results: save(results, FILE),
    )
