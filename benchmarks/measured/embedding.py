"""Times training steps of an embedding: of its table, dense and by rows, and of StableEmbed next to other modules.

    python -m benchmarks embedding               writes results/embedding.json, prints the tables
    python -m benchmarks embedding --quick       small tables and few rounds; writes no file

A step of a table looks up random ids, computes a loss, differentiates it, and updates the table and the moments of
Adam, which are donated. Sparse steps update only the rows that were looked up. All contenders take turns in one
process (harness/timing.py). torch and bitsandbytes take part if they are installed.
"""

import gc
import json
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_stable_embed as fse

from ..harness import report
from ..harness.modules import EmbedThenNorm, Shape
from ..harness.timing import MOST_ROUNDS, alternate, quartiles

RATE = 1e-3
DENSE, ROWS, FUSED, IDS, TORCH = "dense", "rows", "rows, in place", "dense gradient, rows updated", "torch"
STEPS = {
    DENSE: "`optax.adam`",
    ROWS: "`fse.row_sparse(optax.adam)`",
    FUSED: "`fse.row_sparse(fse.adam8bit)`, `fused_update`",
    IDS: "`fse.row_sparse(optax.adam)`, dense gradient and `token_ids`",
    TORCH: "torch `Embedding(sparse=True)`, `SparseAdam`",
}
MODULES = {
    "stable": "`fse.linen.StableEmbed`",
    "stable, rows": "`fse.linen.StableEmbed(sparse=True)`, `fse.row_value_and_grad`",
    "flax": "`nn.Embed`, `nn.LayerNorm`",
    "flax exact": "`nn.Embed`, `nn.LayerNorm(use_fast_variance=False)`",
    "bitsandbytes": "`bitsandbytes.nn.StableEmbedding`",
    "bitsandbytes, rows": "`bitsandbytes.nn.StableEmbedding(sparse=True)`",
}


SHAPES = Shape(50_304, 512, 256), Shape(503_040, 512, 256), Shape(262_144, 1024, 4096)
QUICK = Shape(5_030, 64, 32), Shape(50_300, 64, 32)
FORWARD_BACKWARD = Shape(50_304, 512, 256), Shape(50_304, 512, 4096)
QUICK_FORWARD_BACKWARD = (Shape(503, 64, 256),)


class Running(NamedTuple):
    """A contender that is compiled and ready."""

    step: Callable[[], None]
    temp_bytes: int | None


# --- the step of a table ---------------------------------------------------------------------------------------------


def start_jax(shape: Shape, kind: str) -> Running:
    """Prepares one contender in JAX, with its own table and moments."""
    embed = fse.linen.Embed(shape.num_embeddings, shape.features, sparse=kind != DENSE)

    def loss_fn(params: Any, ids: Any, targets: Any) -> Any:
        return jnp.sum((embed.apply({"params": params}, ids) - targets) ** 2)

    tx: Any = fse.adam8bit(RATE) if kind == FUSED else optax.adam(RATE)
    tx = tx if kind == DENSE else fse.row_sparse(tx)
    of_loss = jax.value_and_grad(loss_fn) if kind in (DENSE, IDS) else fse.row_value_and_grad(loss_fn)

    def step(params: Any, state: Any, ids: Any, targets: Any) -> Any:
        loss, grads = of_loss(params, ids, targets)
        if kind == FUSED:
            return *fse.fused_update(tx, grads, state, params), loss
        updates, state = tx.update(grads, state, params, **({"token_ids": ids} if kind == IDS else {}))
        return optax.apply_updates(params, updates), state, loss

    ids, targets = batches(shape)
    params = embed.init(jax.random.key(0), ids[0])["params"]
    state = tx.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    temp = jitted.lower(params, state, ids[0], targets).compile().memory_analysis().temp_size_in_bytes
    in_turn = cycle(ids)

    def one_step() -> None:
        nonlocal params, state
        params, state, loss = jitted(params, state, next(in_turn), targets)
        jax.block_until_ready((params, state, loss))

    return Running(one_step, temp)


def start_torch(shape: Shape) -> Running:
    """Prepares torch's sparse embedding with the optimizer that is made for it."""
    import torch

    torch.set_num_threads(report.cores())
    embed = torch.nn.Embedding(shape.num_embeddings, shape.features, sparse=True)
    optimizer = torch.optim.SparseAdam(embed.parameters(), lr=RATE)
    ids, targets = batches(shape)
    in_turn, their_targets = _torch_tensors(ids, targets)

    def one_step() -> None:
        optimizer.zero_grad()
        ((embed(next(in_turn)) - their_targets) ** 2).sum().backward()
        optimizer.step()

    return Running(one_step, None)


def _torch_tensors(ids: list[Any], floats: Any) -> tuple[Any, Any]:
    """Returns ids and numbers for torch. The batches of ids repeat without end."""
    import torch

    return cycle([torch.tensor(np.asarray(i)) for i in ids]), torch.tensor(np.asarray(floats))


def batches(shape: Shape) -> tuple[list[Any], Any]:
    """Returns the ids of sixteen batches, and targets."""
    rng = np.random.default_rng(0)
    ids = [jnp.asarray(rng.integers(0, shape.num_embeddings, shape.tokens), jnp.int32) for _ in range(16)]
    return ids, jnp.asarray(rng.standard_normal((shape.tokens, shape.features)), jnp.float32)


def table_steps(shape: Shape, budget_s: float, most_rounds: int) -> dict[str, Any]:
    """Returns milliseconds, temporaries and ratios for one shape."""
    runs = {kind: start_jax(shape, kind) for kind in (DENSE, ROWS, FUSED, IDS)}
    if find_spec("torch"):
        runs[TORCH] = start_torch(shape)
    turns = alternate({kind: run.step for kind, run in runs.items()}, budget_s, most_rounds)
    rows = {}
    for kind, run in runs.items():
        rows[kind] = {
            "ms": quartiles([1e3 * t for t in turns[kind]]),
            "times_faster_than_dense": quartiles([d / t for d, t in zip(turns[DENSE], turns[kind])]),
            "times_faster_than_torch": TORCH in turns and quartiles([d / t for d, t in zip(turns[TORCH], turns[kind])]),
            "temp_bytes": run.temp_bytes,
        }
    entry = {"shape": shape, "allowed_temporaries": shape.allowed_temporaries, "rows": rows}
    del runs
    gc.collect()
    return entry


def growth(small: Shape, large: Shape, budget_s: float, most_rounds: int) -> dict[str, list[float]]:
    """Returns how much longer a step takes on the large table. Steps on both tables take turns."""
    runs = {(kind, shape): start_jax(shape, kind) for kind in (ROWS, FUSED) for shape in (small, large)}
    turns = alternate({key: run.step for key, run in runs.items()}, budget_s, most_rounds)
    return {kind: quartiles([b / a for a, b in zip(turns[kind, small], turns[kind, large])]) for kind in (ROWS, FUSED)}


# --- forward and backward of StableEmbed -----------------------------------------------------------------------------


def start_module(shape: Shape, name: str) -> Running:
    """Prepares a module: its output and all of its gradients."""
    ids, cotangent = batches(shape)
    by_rows = name.endswith("rows")
    if name.startswith("bitsandbytes"):
        return _start_bitsandbytes(shape, ids, cotangent, by_rows)
    sizes = shape.num_embeddings, shape.features
    ours = fse.linen.StableEmbed(*sizes, sparse=by_rows)
    module: nn.Module = ours if name.startswith("stable") else EmbedThenNorm(*sizes, use_fast_variance=name == "flax")
    params = module.init(jax.random.key(0), ids[0])["params"]
    differentiate = fse.row_value_and_grad if by_rows else jax.value_and_grad

    def loss_fn(params: Any, ids: Any, cotangent: Any) -> Any:
        y = module.apply({"params": params}, ids)
        return jnp.vdot(y, cotangent), y

    def step(params: Any, ids: Any, cotangent: Any) -> Any:
        (_, y), grads = differentiate(loss_fn, has_aux=True)(params, ids, cotangent)
        return y, grads

    jitted, in_turn = jax.jit(step), cycle(ids)
    temp = jitted.lower(params, ids[0], cotangent).compile().memory_analysis().temp_size_in_bytes

    def one_step() -> None:
        jax.block_until_ready(jitted(params, next(in_turn), cotangent))

    return Running(one_step, temp)


def _start_bitsandbytes(shape: Shape, ids: list[Any], cotangent: Any, sparse: bool) -> Running:
    import bitsandbytes
    import torch

    torch.set_num_threads(report.cores())
    module = bitsandbytes.nn.StableEmbedding(shape.num_embeddings, shape.features, sparse=sparse)
    in_turn, theirs = _torch_tensors(ids, cotangent)

    def one_step() -> None:
        module.zero_grad(set_to_none=True)
        module(next(in_turn)).backward(theirs)

    return Running(one_step, None)


def forward_backward(shape: Shape, budget_s: float, most_rounds: int) -> dict[str, Any]:
    """Returns the milliseconds of each module, and their ratios to `StableEmbed`."""
    names = [name for name in MODULES if "bitsandbytes" not in name or find_spec("bitsandbytes")]
    runs = {name: start_module(shape, name) for name in names}
    turns = alternate({name: run.step for name, run in runs.items()}, budget_s, most_rounds)
    rows = {
        name: {
            "ms": quartiles([1e3 * t for t in turns[name]]),
            "beside_ours": quartiles([t / o for o, t in zip(turns["stable"], turns[name])]),
            "beside_ours_by_rows": quartiles([t / o for o, t in zip(turns["stable, rows"], turns[name])]),
            "temp_bytes": run.temp_bytes,
        }
        for name, run in runs.items()
    }
    return {"shape": shape, "rows": rows}


# --- results ---------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[str, Any]:
    """Returns all measurements. A quick run has small tables and few rounds."""
    shapes, budget_s, most = (QUICK, 0.5, 5) if quick else (SHAPES, 25.0, MOST_ROUNDS)
    results = {"environment": report.environment("embedding")}
    results["steps"] = [table_steps(shape, budget_s, most) for shape in shapes]
    results["growth"] = {"shapes": shapes[:2]} | growth(*shapes[:2], budget_s, most)
    modules = QUICK_FORWARD_BACKWARD if quick else FORWARD_BACKWARD
    results["modules"] = [forward_backward(shape, budget_s, most) for shape in modules]
    return json.loads(json.dumps(results))


def markdown(results: dict[str, Any]) -> str:
    """Returns both tables."""
    env = results["environment"]
    about = (
        f"`python -m benchmarks embedding` at {env['commit']}, {env['device']}, {env['cores']} cores: median "
        "(quartiles) of a step, and median ratios to others in the same round."
    )
    small, large = results["growth"]["shapes"]
    grown = (
        f"From {small[0]:,} to {large[0]:,} rows the step takes {results['growth'][ROWS][1]:.2f} times as long "
        f"(in place: {results['growth'][FUSED][1]:.2f})."
    )
    steps = _table("step of a table", results["steps"], STEPS, DENSE_AND_TORCH)
    modules = _table("output and gradients of a module", results["modules"], MODULES, RELATIVE)
    return "\n\n".join([about, steps, grown, modules])


DENSE_AND_TORCH = {"speedup over dense": "times_faster_than_dense", "speedup over torch": "times_faster_than_torch"}
RELATIVE = {"time, relative to StableEmbed": "beside_ours", "and with `sparse=True`": "beside_ours_by_rows"}


def _table(what: str, entries: list[dict[str, Any]], names: dict[str, str], ratios: dict[str, str]) -> str:
    """Returns a table with one line per contender and shape. `ratios` maps columns to the fields that they show."""
    lines = [[what, "rows x features, ids", "ms", *ratios, "temporaries"], ["---", "---", *["--:"] * (len(ratios) + 2)]]
    for entry in entries:
        for name, row in entry["rows"].items():
            shown = [_times(row[field]) for field in ratios.values()]
            lines.append(
                [names[name], _shape(entry["shape"]), report.spread(row["ms"]), *shown, _mb(row["temp_bytes"])]
            )
    return report.table(lines)


def _shape(shape: list[int]) -> str:
    return f"{shape[0]:,} x {shape[1]:,}, {shape[2]:,}"


def _times(quarters: Any) -> str:
    return f"{quarters[1]:.3g}x" if quarters else ""


def _mb(n: int | None) -> str:
    return "" if n is None else f"{n / 1e6:.1f} MB"


FILE = report.RESULTS / "embedding.json"


def main(arguments: list[str], save: Callable = report.save) -> None:
    """Measures, prints, and keeps the results of a full run."""
    report.run("embedding", __doc__, arguments, measure, markdown, lambda results: save(results, FILE))
