"""Fine-tunes a small language model at low learning rates, with weights that are stored in several ways.

    python -m benchmarks finetuning                writes results/finetuning.json, prints the table
    python -m benchmarks finetuning --quick        a few steps; writes no file

A transformer of bytes (0.1M parameters) is trained on source code of Python's standard library, in float32. Then it is
trained on English, the text of Python's `help`. Gradients are those of the weights that the model computes with, in
bfloat16 except for "float32". The arithmetic is float32. The loss is that of English text that was held out, and it is
computed with the bfloat16 weights, except for "float32".
"""

import pydoc_data
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_stable_embed as fse

from ..harness import report

WIDTH, HEADS, CONTEXT, BATCH, LAYERS = 64, 4, 48, 16, 1
RATES, SEEDS = (3e-5, 3e-6), (11, 12, 13)
BEFORE, STEPS, BATCHES = 600, 400, 16  # steps on code, steps on English, batches of the held-out text
HELD_OUT = 0.1

SMALL = fse.StateFormat(min_size=0)
WAYS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "float32": optax.adamw,
    "`split_weights(optax.adamw, 32)`": lambda rate: fse.split_weights(optax.adamw(rate), 32),
    "`split_weights(optax.adamw)`": lambda rate: fse.split_weights(optax.adamw(rate)),
    "`split_weights(adamw8bit)`": lambda rate: fse.split_weights(fse.adamw8bit(rate, state_format=SMALL)),
    "bfloat16, `stochastic_round_updates(optax.adamw)`": lambda rate: fse.stochastic_round_updates(optax.adamw(rate)),
    "bfloat16, `optax.adamw` with fp32 moments": lambda rate: _fp32_moments(optax.adamw(rate)),
}


def _fp32_moments(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the transform with the state of float32 parameters."""

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: tx.init(wide(params)),
        lambda grads, state, params=None: tx.update(wide(grads), state, wide(params)),
    )


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Returns source code and English, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    code = b"".join(file.read_bytes() for file in files)
    english = (Path(pydoc_data.__path__[0]) / "topics.py").read_bytes()
    return np.frombuffer(code, np.uint8), np.frombuffer(english, np.uint8)


def start() -> Any:
    """Returns the first parameters."""
    keys = iter(jax.random.split(jax.random.key(0), 3 + 4 * LAYERS))

    def normal(*shape):
        return 0.02 * jax.random.normal(next(keys), shape)

    def norm():
        return {"scale": jnp.ones(WIDTH)}

    def block():
        matrices = {"qkv": normal(WIDTH, 3 * WIDTH), "out": normal(WIDTH, WIDTH)}
        matrices |= {"up": normal(WIDTH, 4 * WIDTH), "down": normal(4 * WIDTH, WIDTH)}
        return {**matrices, "norm_1": norm(), "norm_2": norm()}

    params = {"embedding": normal(256, WIDTH), "position": normal(CONTEXT, WIDTH), "head": normal(WIDTH, 256)}
    return params | {"norm": norm(), "blocks": [block() for _ in range(LAYERS)]}


def loss_of(params: Any, ids: Any) -> Any:
    """Returns the mean cross-entropy of the bytes after the first, in nats, computed in float32."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    x = params["embedding"][ids[:, :-1]] + params["position"]
    for block in params["blocks"]:
        q, k, v = jnp.split(_normalized(x, block["norm_1"]) @ block["qkv"], 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in (q, k, v))
        heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + heads.reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(_normalized(x, block["norm_2"]) @ block["up"]) @ block["down"]
    logits = _normalized(x, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def _normalized(x: Any, norm: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * norm["scale"]


def batches(text: np.ndarray, seed: int, count: int) -> Iterator[Any]:
    """Yields windows of a text from random places."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(text) - CONTEXT - 1, BATCH)
        yield jnp.asarray(np.stack([text[k : k + CONTEXT + 1] for k in starts]).astype(np.int32))


def trained(params: Any, state: Any, tx: Any, text: np.ndarray, seed: int, steps: int) -> Any:
    """Returns the parameters after some steps."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, ids):
        updates, state = tx.update(jax.grad(loss_of)(params, ids), state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, (params, state))
    for ids in batches(text, seed, steps):
        params, state = step(params, state, ids)
    return params


def measure(shorter: int = 1) -> dict[str, Any]:
    """Returns the loss of every way, learning rate and seed, and the one before fine-tuning."""
    code, english = texts()
    ends = int(len(english) * (1 - HELD_OUT))
    validate = jax.jit(loss_of)

    def held_out(params: Any) -> float:
        return mean(float(validate(params, ids)) for ids in batches(english[ends:], 999, BATCHES))

    first = optax.adamw(2e-3)
    base = trained(start(), first.init(start()), first, code, 1, BEFORE // shorter)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), base)
    rows = []
    for name, make in WAYS.items():
        for rate in RATES:
            tx, params = make(rate), base if name == "float32" else half
            runs = [trained(params, tx.init(params), tx, english[:ends], seed, STEPS // shorter) for seed in SEEDS]
            rows.append({"way": name, "rate": rate, "losses": [held_out(run) for run in runs]})
    before = {"float32": held_out(base), "bfloat16": held_out(half)}
    return {"environment": report.environment("finetuning"), "steps": STEPS // shorter, "before": before, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """Returns the table."""
    losses = {(row["way"], row["rate"]): row["losses"] for row in results["rows"]}
    lines = [["weights", *(f"learning rate {rate:g}" for rate in RATES)], ["---", *["--:" for _ in RATES]]]
    for name in WAYS:
        cells = [f"{mean(found):.4f} ({max(found) - min(found):.4f})" for found in (losses[name, r] for r in RATES)]
        lines.append([name, *cells])
    about = (
        f"`python -m benchmarks finetuning`: validation loss after {results['steps']} steps, mean of {len(SEEDS)} "
        "seeds, and in brackets the largest minus the smallest of them. Before: "
        f"{results['before']['float32']:.4f}, with weights rounded to bfloat16 {results['before']['bfloat16']:.4f}."
    )
    return about + "\n\n" + report.table(lines)


FILE = report.RESULTS / "finetuning.json"


def main(arguments: list[str], save: Callable = report.save) -> None:
    """Measures, prints, and keeps the results of a full run."""
    report.run(
        "finetuning",
        __doc__,
        arguments,
        lambda quick: measure(20 if quick else 1),
        markdown,
        lambda results: save(results, FILE),
    )
