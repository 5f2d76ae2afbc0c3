"""Counts the bytes of optimizer state of large models, by optimizer and rules.

    python -m benchmarks state            writes results/state.json, prints the tables
    python -m benchmarks state --quick    the same, but writes no file

The counts follow from the shapes of the parameters. No array is allocated.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flax_stable_embed as fse

from ..harness import report
from . import chips

FILE = report.RESULTS / "state.json"

# Gemma 2 2B (arXiv:2408.00118, table 1): a large vocabulary on a small model. The embedding is also the output matrix.
VOCABULARY, WIDTH, LAYERS, HIDDEN = 256_000, 2304, 26, 9216
QUERIES, KEYS, HEAD = 8, 4, 256


def gemma_2_2b() -> dict[str, Any]:
    """Returns the shapes of the parameters of Gemma 2 2B, under the names of the `gemma` package."""
    layer = {
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
        # Before and after attention, and before and after the MLP.
        "norms": {f"norm_{i}": {"scale": (WIDTH,)} for i in range(4)},
    }
    model = {f"layer_{i}": layer for i in range(LAYERS)}
    model |= {"embedder": {"input_embedding": (VOCABULARY, WIDTH)}, "final_norm": {"scale": (WIDTH,)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model, is_leaf=is_shape)


MODELS: dict[str, Callable[[], dict[str, Any]]] = {"Llama 2 7B": chips.MODELS["7B"].shapes, "Gemma 2 2B": gemma_2_2b}


def is_embedding(path: str, shape: tuple[int, ...] = ()) -> bool:
    """Returns whether a parameter is the table of the vocabulary."""
    del shape
    return path.endswith("embedding")


def embedding_in(bits: Any) -> tuple:
    """Returns the rules that store the moments of the embedding in this precision."""
    return ((fse.where(is_embedding), bits),)


ADAMW, ADAMW8BIT = "optax.adamw", "fse.adamw8bit"
UNSHARDED, ALL_IN_8_BITS = "fse.adamw8bit, shards=1", "fse.adamw8bit, embedding in 8 bits"
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    ADAMW: lambda: optax.adamw(1e-3),
    ADAMW8BIT: lambda: fse.adamw8bit(1e-3),
    UNSHARDED: lambda: fse.adamw8bit(1e-3, state_format=fse.StateFormat(shards=1)),  # larger blocks, fewer scales
    ALL_IN_8_BITS: lambda: fse.adamw8bit(1e-3, rules=embedding_in(8)),
}
CHOICES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "`optax.adamw(lr)`": OPTIMIZERS[ADAMW],
    "`fse.adamw8bit(lr)`": OPTIMIZERS[ADAMW8BIT],
    '`..., rules=(("embedding", "bf16"),)`': lambda: fse.adamw8bit(1e-3, rules=embedding_in("bf16")),
    '`..., rules=(("embedding", "rowwise"),)`': lambda: fse.adamw8bit(1e-3, rules=embedding_in("rowwise")),
    '`..., rules=(("embedding", 8),)`': OPTIMIZERS[ALL_IN_8_BITS],
    "`fse.lion8bit(lr)`": lambda: fse.lion8bit(1e-4),
    '`fse.lion8bit(lr, rules=(("embedding", 8),))`': lambda: fse.lion8bit(1e-4, rules=embedding_in(8)),
}


def state_bytes(tx: optax.GradientTransformation, params: Any) -> dict[str, int]:
    """Returns the bytes of the state that `tx.init` returns, of the embedding and in all."""
    state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params))
    sizes = [(jax.tree_util.keystr(path), prod(x.shape) * x.dtype.itemsize) for path, x in state]
    embedding = sum(size for path, size in sizes if path.endswith("embedding']"))
    return {"embedding": embedding, "total": sum(size for _, size in sizes)}


def of_model(shapes: Any) -> dict[str, Any]:
    """Returns the counts of one model."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    (table,) = [(path, x) for path, x in leaves if is_embedding(jax.tree_util.keystr(path, simple=True))]
    return {
        "parameters": sum(prod(x.shape) for _, x in leaves),
        "embedding": jax.tree_util.keystr(table[0], simple=True, separator="/"),
        "embedding_parameters": prod(table[1].shape),
        "state": {name: state_bytes(make(), shapes) for name, make in OPTIMIZERS.items()},
    }


def measure(quick: bool) -> dict[str, Any]:
    """Returns the counts of all models, and of every choice for Gemma. Counting is quick in any case."""
    del quick
    choices = [{"choice": name} | state_bytes(make(), gemma_2_2b()) for name, make in CHOICES.items()]
    models = {name: of_model(shapes()) for name, shapes in MODELS.items()}
    return {"environment": report.environment("state"), "models": models, "choices": choices}


def gigabytes(size: int, digits: int = 1) -> str:
    """Returns a size in GB."""
    return f"{size / 1e9:.{digits}f} GB"


def headline(results: dict[str, Any]) -> str:
    """Returns the optimizer state of both models in a few sentences."""

    def size(model: str, optimizer: str) -> str:
        return gigabytes(results["models"][model]["state"][optimizer]["total"])

    llama, gemma = results["models"]
    return (
        f"With `fse.adamw8bit` the optimizer state of {llama} takes **{size(llama, ADAMW8BIT)}** instead of "
        f"**{size(llama, ADAMW)}**, and that of {gemma} {size(gemma, ADAMW8BIT)} instead of {size(gemma, ADAMW)}.\n"
        f"The embedding keeps fp32 moments by default. With 8-bit moments for it too, the state of {gemma} takes "
        f"{size(gemma, ALL_IN_8_BITS)}.\nCounted from the shapes of the parameters by `python -m benchmarks state`."
    )


def markdown(results: dict[str, Any]) -> str:
    """Returns the choices for Gemma as a table."""
    model = results["models"]["Gemma 2 2B"]
    count = model["parameters"]
    lines = [["optimizer", "embedding", "everything else", "state", "bytes per parameter"], ["---", *["--:"] * 4]]
    for row in results["choices"]:
        sizes = row["embedding"], row["total"] - row["embedding"], row["total"]
        lines.append([row["choice"], *(gigabytes(size, 2) for size in sizes), f"{row['total'] / count:.2f}"])
    return (
        f"Gemma 2 2B has {count / 1e9:.2f} billion parameters, {model['embedding_parameters'] / 1e6:.0f} million of "
        f"them in the embedding. Counted from their shapes by `python -m benchmarks state`:\n\n{report.table(lines)}"
    )


def tables(results: dict[str, Any]) -> str:
    """Returns everything that is counted."""
    lines = [["model", "parameters", *(f"`{name}`" for name in OPTIMIZERS)], ["---", *["--:"] * 5]]
    for name, model in results["models"].items():
        sizes = [model["state"][tx]["total"] for tx in OPTIMIZERS]
        shown = [f"{gigabytes(size, 3)}, {size / model['parameters']:.3f} bytes per parameter" for size in sizes]
        lines.append([name, f"{model['parameters']:,}", *shown])
    return "\n\n".join([headline(results), report.table(lines), markdown(results)])


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results of a full run."""
    report.run("state", __doc__, arguments, measure, tables, lambda results: report.save(results, FILE))
