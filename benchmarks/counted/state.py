"""Bytes of optimizer state of a large model, by how it is stored: `python -m benchmarks state`. Nothing allocated."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flax_stable_embed as fse

from ..harness import report

# Gemma 2 2B (arXiv:2408.00118, table 1): a large vocabulary on a small model.
VOCABULARY, WIDTH, LAYERS, HIDDEN = 256_000, 2304, 26, 9216
QUERIES, KEYS, HEAD = 8, 4, 256


def gemma_2_2b() -> dict[str, Any]:
    """Shapes of the parameters of a model like Gemma 2 2B, under Flax's names."""
    shapes = {
        "attention": {
            "query": {"kernel": (WIDTH, QUERIES, HEAD)},
            "key": {"kernel": (WIDTH, KEYS, HEAD)},
            "value": {"kernel": (WIDTH, KEYS, HEAD)},
            "out": {"kernel": (QUERIES, HEAD, WIDTH)},
        },
        "mlp": {
            "gate": {"kernel": (WIDTH, HIDDEN)},
            "up": {"kernel": (WIDTH, HIDDEN)},
            "down": {"kernel": (HIDDEN, WIDTH)},
        },
        "norms": {f"norm_{i}": {"scale": (WIDTH,)} for i in range(4)},
    }
    model = {f"layer_{i}": shapes for i in range(LAYERS)}
    model |= {"embedder": {"input_embedding": (VOCABULARY, WIDTH)}, "final_norm": {"scale": (WIDTH,)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model, is_leaf=is_shape)


def embedding(bits: Any) -> tuple:
    """The rule that stores the embedding's moments so."""
    return ((fse.where(is_embedding), bits),)


def is_embedding(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the table of the vocabulary."""
    return path.endswith("embedding")


CHOICES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "`optax.adamw(lr)`": lambda: optax.adamw(1e-3),
    "`fse.adamw8bit(lr)`": lambda: fse.adamw8bit(1e-3),
    '`..., rules=(("embedding", "bf16"),)`': lambda: fse.adamw8bit(1e-3, rules=embedding("bf16")),
    '`..., rules=(("embedding", "rowwise"),)`': lambda: fse.adamw8bit(1e-3, rules=embedding("rowwise")),
    '`..., rules=(("embedding", 8),)`': lambda: fse.adamw8bit(1e-3, rules=embedding(8)),
    "`fse.lion8bit(lr)`": lambda: fse.lion8bit(1e-4),
    '`fse.lion8bit(lr, rules=(("embedding", 8),))`': lambda: fse.lion8bit(1e-4, rules=embedding(8)),
}


def measure(quick: bool) -> dict[str, Any]:
    """Returns the bytes of every choice's state, of the embedding and in all. Counting is quick in any case."""
    del quick
    params = gemma_2_2b()
    rows = []
    for name, make in CHOICES.items():
        tx = make()
        state = jax.eval_shape(tx.init, params)
        total = sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
        found = [row.bytes for row in fse.describe(tx, params).rows if is_embedding(row.path, row.shape)]
        table = sum(found) if found else 8 * VOCABULARY * WIDTH
        rows.append({"choice": name, "embedding": table, "total": total})
    count = sum(prod(x.shape) for x in jax.tree.leaves(params))
    return {"environment": report.environment("state"), "parameters": count, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """Returns the choices as a table."""
    count = results["parameters"]
    lines = [
        f"{count / 1e9:.2f} billion parameters, {VOCABULARY * WIDTH / 1e6:.0f} million of them in the embedding "
        "(`python -m benchmarks state`; shapes of Gemma 2 2B, nothing allocated):",
        "",
        "| optimizer | embedding | everything else | state | bytes a parameter |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in results["rows"]:
        rest = row["total"] - row["embedding"]
        sizes = " | ".join(f"{size / 1e9:.2f} GB" for size in (row["embedding"], rest, row["total"]))
        lines.append(f"| {row['choice']} | {sizes} | {row['total'] / count:.2f} |")
    return "\n".join(lines)


FILE = report.RESULTS / "state.json"


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results unless they are quick ones."""
    report.run("state", __doc__, arguments, measure, markdown, lambda results: report.save(results, FILE))
