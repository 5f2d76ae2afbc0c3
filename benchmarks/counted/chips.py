"""Counts the bytes of parameters and optimizer state on every chip of a slice, for large models sharded over it.

    python -m benchmarks chips            writes results/chips.json, prints the table
    python -m benchmarks chips --quick    the smaller model; writes no file

The counts follow from the shapes of Llama 2 (arXiv:2307.09288, table 1, and its released configurations) and from their
shardings. No array is allocated, and nothing is compiled. The memory of a chip is taken from Google Cloud's
documentation of TPU versions.
"""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding

import flax_stable_embed as fse

from ..harness import report
from ..harness.transformer import Transformer

FILE = report.RESULTS / "chips.json"
MODELS = {
    "7B": Transformer(width=4096, hidden=11008, head=128, layers=32),
    "70B": Transformer(width=8192, hidden=28672, head=128, layers=80, keys=1024),
}
MEMORY = {"v5e": 16e9, "v5p": 95e9}


class Slice(NamedTuple):
    """A model on a slice, sharded over a mesh."""

    model: str
    slice: str
    mesh: tuple[int, int]  # fsdp x tensor


SLICES = (
    Slice("7B", "v5e:4x4", (16, 1)),
    Slice("7B", "v5e:4x4", (4, 4)),
    Slice("7B", "v5e:16x16", (16, 16)),
    Slice("7B", "v5p:2x2x2", (8, 1)),
    Slice("70B", "v5e:16x16", (16, 16)),
    Slice("70B", "v5p:8x8x8", (64, 8)),
)


def optimizers(shards: int) -> dict[str, tuple[Any, optax.GradientTransformation]]:
    """Returns dtype of parameters and optimizer by name, for a mesh that splits no axis into more shards than this."""
    state_format = fse.StateFormat(shards=shards)
    adamw8bit = fse.adamw8bit(1e-4, state_format=state_format)
    in_host = ((".*", fse.Rule(memory_kind="pinned_host")),)
    return {
        "`optax.adamw`": (jnp.float32, optax.adamw(1e-4)),
        "`optax.adamw`, bfloat16": (jnp.bfloat16, optax.adamw(1e-4)),
        "`adamw8bit`": (jnp.float32, adamw8bit),
        '`adamw8bit`, `memory_kind="pinned_host"`': (
            jnp.float32,
            fse.adamw8bit(1e-4, rules=in_host, state_format=state_format),
        ),
        "`split_weights(adamw8bit)`, bfloat16": (jnp.bfloat16, fse.split_weights(adamw8bit)),
    }


def bytes_of_a_chip(shapes: Any, memory: str | None = None) -> int:
    """Returns the bytes that sharded arrays take on one chip, in this memory."""
    here = [x for x in jax.tree.leaves(shapes) if x.sharding.memory_kind == memory]
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)


def measured(one: Slice) -> list[dict[str, Any]]:
    """Returns one row per optimizer."""
    model, mesh = MODELS[one.model], AbstractMesh(one.mesh, ("fsdp", "tensor"))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), model.specs())
    rows = []
    for name, (dtype, tx) in optimizers(max(one.mesh)).items():
        shape = partial(jax.ShapeDtypeStruct, dtype=dtype)
        params = jax.tree.map(lambda x, s, shape=shape: shape(x.shape, sharding=s), model.shapes(), shardings)
        state = fse.abstract_state(tx, params)
        rows.append(
            one._asdict()
            | {
                "optimizer": name,
                "parameters": bytes_of_a_chip(params),
                "state": bytes_of_a_chip(state),
                "host": bytes_of_a_chip(state, "pinned_host"),
                "straddling": sum(bool(row.straddles) for row in fse.describe(tx, params).rows),
            }
        )
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """Returns the counts of all slices. A quick run has the smaller model."""
    slices = [one for one in SLICES if one.model == "7B"] if quick else SLICES
    counts = {name: sum(prod(x.shape) for x in jax.tree.leaves(MODELS[name].shapes())) for name in MODELS}
    rows = [row for one in slices for row in measured(one)]
    return {"environment": report.environment("chips"), "parameters": counts, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """Returns the table."""
    head = ["model", "slice", "fsdp x tensor", "optimizer", "parameters", "gradients", "state"]
    lines = [[*head, "all, share of memory", "host"], [*["---"] * 4, *["--:"] * 5]]
    for row in results["rows"]:
        every = 2 * row["parameters"] + row["state"]
        share = every / MEMORY[row["slice"].partition(":")[0]]
        sizes = [f"{row[key] / 1e9:.3f} GB" for key in ("parameters", "parameters", "state")]
        host = f"{row['host'] / 1e9:.3f} GB" if row["host"] else ""
        mesh = " x ".join(map(str, row["mesh"]))
        lines.append(
            [row["model"], row["slice"], mesh, row["optimizer"], *sizes, f"{every / 1e9:.3f} GB, {share:.0%}", host]
        )
    counts = ", ".join(f"{name}: {n / 1e9:.2f} billion" for name, n in results["parameters"].items())
    memory = ", ".join(f"{chip} {size / 1e9:.0f} GB" for chip, size in MEMORY.items())
    about = (
        f"`python -m benchmarks chips`: parameters of Llama 2 ({counts} parameters), their gradients and their "
        f"optimizer state, bytes per chip ({memory}). They are float32 unless it says bfloat16. Activations are not "
        "included. `shards` is the size of the larger mesh axis, so no block is split between two chips."
    )
    return about + "\n\n" + report.table(lines)


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results of a full run."""
    report.run("chips", __doc__, arguments, measure, markdown, lambda results: report.save(results, FILE))
