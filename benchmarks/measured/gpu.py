"""Runs the kernels on this machine's GPU: their answers, and their time next to memory's and other libraries'.

    python -m benchmarks gpu             writes results/gpu-<device>.json, prints the tables; about six minutes
    python -m benchmarks gpu --quick     tiny arrays and the reference, on any machine; writes no file

Needs jax with CUDA, flax and optax. torch, torchao and bitsandbytes take part if they are installed. All contenders
take turns in one process (harness/timing.py). A turn is several steps in a row, so that the host stays ahead of the
device. The time that the device was busy is read from the profiler as well.

The bytes of a step are those that it must read and write. The bandwidth of memory is measured by copying an array.
"""

import gc
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from math import prod
from time import perf_counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.codecs import CODECS

from ..harness import report
from ..harness.contenders import step_of
from ..harness.modules import EmbedThenNorm
from ..harness.shapes import tinyllama
from ..harness.timing import alternate, quartiles
from ..harness.tree_steps import (
    BASELINE,
    EIGHT,
    PEERS,
    Holder,
    Tree,
    busy_ms,
    compared,
    field,
    ours,
    small_leaves,
    start,
    steps,
    training,
)

ROUNDS = 15

# --- measurements -----------------------------------------------------------------------------------------------------


def answers(quick: bool) -> list[Tree]:
    """Compares kernel and reference, step by step from the same state: how many codes differ, and by how much."""
    named = None if jax.default_backend() != "gpu" else "pallas_gpu"
    shapes = [(256, 384)] if quick else [(512, 384), (300, 130), (7, 64, 257), (4096,), (5000,)]
    settings = list(itertools.product(CODECS, ("nearest", "stochastic"), DTYPES))

    def row(setting: tuple[Any, ...]) -> Tree:
        codec, rounding, dtype = setting
        holder = Holder({f"kernel_{k}": shape for k, shape in enumerate(shapes)}, DTYPES[dtype])
        kernel, reference = (ours(codec, rounding, implementation=name, min_size=0) for name in (named, "xla"))
        fused = dtype == "float32"
        both = [jax.jit(step_of(tx, fused)) for tx in (kernel, reference)]
        params, state, codes, rounded_apart, parameters_apart = holder.params, kernel.init(holder.params), 0, [], []
        for k in range(3):
            grads = {name: jnp.roll(g, k) * (1 + k) for name, g in holder.grads.items()}
            ours_, (params, state) = (step(params, state, grads) for step in both)
            for a, b in zip(_codes(ours_[1]), _codes(state)):
                codes += a.size
                rounded_apart.append(np.abs(a - b).ravel())
            for a, b in zip(ours_[0].values(), params.values()):
                parameters_apart.append(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
        apart = np.concatenate(rounded_apart)
        return {
            "codec": codec,
            "rounding": rounding,
            "dtype": dtype,
            "path": "fused_update" if fused else "update",
            "codes": codes,
            "codes_apart": int(np.count_nonzero(apart)),
            "most_apart": int(apart.max()),
            "parameters_apart": float(max(parameters_apart)),
        }

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the time goes to compilers
        return list(pool.map(row, settings[:3] if quick else settings))


DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}


def _codes(state: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.int32) for x in (*state[0].mu.values(), *state[0].nu.values())]


def copy_gb_per_s(size: int) -> float:
    """Returns the bytes that a copy of a float32 array reads and writes per second, by JAX or torch, the faster one."""
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(jnp.copy)
    turns = {"jax": lambda: jax.block_until_ready([copy(x) for _ in range(steps())])}
    if find_spec("torch") is not None and jax.default_backend() == "gpu":
        import torch

        a, b = (torch.zeros(size, device="cuda") for _ in range(2))
        turns["torch"] = lambda: ([b.copy_(a) for _ in range(steps())], torch.cuda.synchronize())
    seconds = alternate(turns, 2.0, ROUNDS)
    return max(8 * size * steps() / quartiles(s)[1] / 1e9 for s in seconds.values())


ARRAYS: dict[str, tuple[tuple[int, ...], Any, Tree]] = {
    "`root`": ((8192, 8192), jnp.float32, {}),
    "`dynamic`": ((8192, 8192), jnp.float32, {"codec": "dynamic"}),
    "`linear`": ((8192, 8192), jnp.float32, {"codec": "linear"}),
    "`root`, stochastic": ((8192, 8192), jnp.float32, {"rounding": "stochastic"}),
    "`dynamic`, stochastic": ((8192, 8192), jnp.float32, {"codec": "dynamic", "rounding": "stochastic"}),
    "`root`, bfloat16": ((8192, 8192), jnp.bfloat16, {}),
    "`root`, blocks of 256 along rows": ((8192, 8192), jnp.float32, {"block_size": 256, "block_axis": -1}),
    "`root`, blocks of 128": ((8192, 8192), jnp.float32, {"block_size": 128}),
    "`root`, blocks of 64": ((8192, 8192), jnp.float32, {"block_size": 64}),
    "`root`, ragged": ((8191, 8193), jnp.float32, {}),
    "`root`, a vector": ((1 << 26,), jnp.float32, {}),
}


def arrays(quick: bool, rounds: int) -> Tree:
    """Times kernel and reference on one array."""
    rows = {}
    for name, (shape, dtype, form) in ARRAYS.items():
        shape = tuple(min(n, 300) for n in shape) if quick else shape
        holder = Holder({"kernel": shape}, dtype)
        runs = {"kernel": start(holder, ours(rules=EIGHT, **form))}
        runs["xla"] = start(holder, ours(rules=EIGHT, implementation="xla", **form))
        turns = alternate({key: run.turn for key, run in runs.items()}, 1.0, rounds)
        moved = prod(shape) * 3 * jnp.dtype(dtype).itemsize + 2 * runs["kernel"].state_bytes
        rows[name] = {"shape": shape, "bytes_per_parameter": moved / prod(shape)}
        for key, run in runs.items():
            ms = quartiles([1e3 * t / steps() for t in turns[key]])
            rows[name][key] = {"ms": ms, "device_ms": busy_ms(run.turn), "gb_per_s": moved / ms[1] / 1e6}
    return rows


# The dtype that a StableEmbed computes in, and whether some ids are more frequent than others, as words are.
LOOKUPS: dict[str, tuple[Any, bool]] = {
    "float32": (jnp.float32, False),
    "float32, ids by Zipf's law": (jnp.float32, True),
    "bfloat16, ids by Zipf's law": (jnp.bfloat16, True),
}


def stable_embed(quick: bool, rounds: int) -> Tree:
    """Times StableEmbed, and `nn.Embed` with `nn.LayerNorm`: forward, and forward and backward."""
    vocabulary, width, tokens = (64, 32, 16) if quick else (32768, 4096, 65536)
    rows = {}
    for lookup, (dtype, frequent) in LOOKUPS.items():
        chance = 1 / np.arange(1, vocabulary + 1) ** frequent
        ids = jnp.asarray(np.random.default_rng(1).choice(vocabulary, tokens, p=chance / chance.sum()), jnp.int32)
        dy = jax.random.normal(jax.random.key(2), (tokens, width), dtype)
        runs = {}
        for name, module in (("stable", fse.linen.StableEmbed), ("flax", EmbedThenNorm)):
            embed = module(vocabulary, width, dtype=dtype)
            params = jax.jit(embed.init)(jax.random.key(0), ids)
            runs[f"{name}, forward"] = _turn_of(jax.jit(embed.apply), params, ids)
            runs[f"{name}, forward and backward"] = _turn_of(jax.jit(partial(_both, embed)), params, ids, dy)
        turns = alternate(runs, 2.0, rounds)
        # Forward reads rows and writes the output. Backward reads the output's gradient, then it reads every row and
        # writes its gradient.
        of_output = jnp.dtype(dtype).itemsize
        least = {"forward": tokens * width * (4 + of_output)}
        least["forward and backward"] = least["forward"] + tokens * width * of_output + 2 * 4 * vocabulary * width
        for name, turn in runs.items():
            row = {"shape": (vocabulary, width, tokens), "least_bytes": least[name.partition(", ")[2]]}
            row |= {"ms": quartiles([1e3 * t / steps() for t in turns[name]]), "device_ms": busy_ms(turn)}
            rows[f"{name}, {lookup}"] = row
        del runs, params, dy
        gc.collect()
    return rows


def _both(module: nn.Module, params: Any, ids: Any, dy: Any) -> tuple[Any, Any]:
    y, pullback = jax.vjp(lambda params: module.apply(params, ids), params)
    return y, pullback(dy)[0]


def _turn_of(f: Callable, *args: Any) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(steps()):
            out = f(*args)
        jax.block_until_ready(out)

    turn()
    return turn


def measure(quick: bool) -> Tree:
    """Runs all parts. A full run writes its results after each part."""
    rounds = 3 if quick else ROUNDS
    results: Tree = {"environment": report.environment("gpu")}
    parts = {
        "answers": lambda: answers(quick),
        "copy_gb_per_s": lambda: copy_gb_per_s(1 << 10 if quick else 1 << 29),
        "arrays": lambda: arrays(quick, rounds),
        "model": lambda: compared(tinyllama(1, 64) if quick else tinyllama(), field(), rounds),
        "training": lambda: training(quick, rounds),
        "stable_embed": lambda: stable_embed(quick, rounds),
        "small": lambda: small_leaves(quick, rounds),
    }
    for name, part in parts.items():
        began = perf_counter()
        results[name] = part()
        gc.collect()
        if not quick:
            keep(results)
        print(f"{name}: {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return results


# --- tables ----------------------------------------------------------------------------------------------------------


def everywhere() -> list[Tree]:
    """Returns the results of every GPU, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(report.RESULTS.glob("gpu-*.json"))]


def markdown(results: Tree) -> str:
    """Returns the tables of the parts in the results."""
    tables = {"model": _of_model, "arrays": _of_arrays, "training": _of_training, "small": _of_small}
    tables |= {"stable_embed": _of_modules}
    parts = [_about(results)] + [make(results) for name, make in tables.items() if name in results]
    return "\n\n".join(parts)


def _about(results: Tree) -> str:
    env, rows = results["environment"], results["answers"]
    versions = [f"{p} {env['versions'][p]}" for p in ("jax", "optax", *PEERS) if env["versions"][p]]
    apart = {dtype: [row for row in rows if row["dtype"] == dtype] for dtype in {row["dtype"]: 0 for row in rows}}
    shares = [
        f"{sum(r['codes_apart'] for r in found) / sum(r['codes'] for r in found):.1e} ({dtype})"
        for dtype, found in apart.items()
    ]
    return (
        f"### {env['device']}\n\n{', '.join(versions)}; `python -m benchmarks gpu` at {env['commit']}, {env['date']}. "
        f"A copy of an array reads and writes {results['copy_gb_per_s']:,.0f} GB/s. Times are milliseconds per step: "
        "the time that the GPU was busy, from its profiler, and the elapsed time (quartiles). Kernel and reference "
        "were compared step by step from the same state. These shares of "
        f"{sum(row['codes'] for row in rows):,} codes differ between the two, "
        f"by at most {max(row['most_apart'] for row in rows)}: "
        f"{', '.join(shares)}."
    )


def share_of_copy(results: Tree, moved: float, ms: float) -> float:
    """Returns the bandwidth of moving these bytes in this time, as a share of the bandwidth of a copy."""
    return moved / ms / 1e6 / results["copy_gb_per_s"]


def moved_by_model(row: Tree) -> float:
    """Returns the bytes that a step of the full model must read and write, with the state of this row."""
    return sum(map(prod, tinyllama().values())) * (12 + 2 * row["state_bytes_per_parameter"])


def _share(results: Tree, moved: float, ms: float | None) -> str:
    return "" if ms is None else f"{100 * share_of_copy(results, moved, ms):.0f}%"


def _busy(row: Tree) -> str:
    return "" if row["device_ms"] is None else f"{row['device_ms']:.3g}"


def _of_model(results: Tree) -> str:
    rows = results["model"]
    base = rows[BASELINE]["device_ms"]
    head = [
        "AdamW, TinyLlama 1.1B, 201 arrays",
        "state, bytes per parameter",
        "GPU busy, ms",
        "relative to `optax.adamw`",
    ]
    lines = [
        [*head, "bandwidth, relative to a copy", "elapsed, ms", "compile or first step, s"],
        ["---", *["--:"] * 6],
    ]
    for name, row in rows.items():
        if "skip" in row:
            lines.append([name, row["skip"], *[""] * 5])
            continue
        moved, ms = moved_by_model(row), row["device_ms"]
        ratio = "" if ms is None else f"{ms / base:.2f}x"
        state = f"{row['state_bytes_per_parameter']:.2f}"
        share = _share(results, moved, ms)
        lines.append([name, state, _busy(row), ratio, share, report.spread(row["ms"]), f"{row['first_s']:.1f}"])
    return report.table(lines)


def _of_arrays(results: Tree) -> str:
    lines = [
        [
            "one array, AdamW in place",
            "shape",
            "bytes moved per parameter",
            "ms",
            "bandwidth, relative to a copy",
            "`xla`, ms",
        ]
    ]
    lines.append(["---", "---", *["--:"] * 4])
    for name, row in results["arrays"].items():
        shape, moved = " x ".join(f"{n:,}" for n in row["shape"]), row["bytes_per_parameter"] * prod(row["shape"])
        share = _share(results, moved, row["kernel"]["device_ms"])
        lines.append([name, shape, f"{row['bytes_per_parameter']:.2f}", _busy(row["kernel"]), share, _busy(row["xla"])])
    return report.table(lines)


def _of_training(results: Tree) -> str:
    rows = results["training"]
    first = next(iter(rows.values()))
    title = (
        f"examples/language_model.py, {first['parameters'] / 1e6:.0f}M parameters, {first['tokens']:,} tokens per step"
    )
    lines = [[title, "GPU busy, ms", "elapsed, ms", "relative to adamw"], ["---", *["--:"] * 3]]
    for name, row in rows.items():
        lines.append([name, _busy(row), report.spread(row["ms"]), f"{row['ratio'][1]:.3f}x"])
    return report.table(lines)


def _of_small(results: Tree) -> str:
    lines = [["2000 vectors of 64 to 4096 elements", "GPU busy, ms", "elapsed, ms", "relative to `optax.adamw`"]]
    lines.append(["---", *["--:"] * 3])
    for name, row in results["small"].items():
        lines.append([name, _busy(row), report.spread(row["ms"]), f"{row['ratio'][1]:.2f}x"])
    return report.table(lines)


def _of_modules(results: Tree) -> str:
    rows = results["stable_embed"]
    vocabulary, width, tokens = next(iter(rows.values()))["shape"]
    title = f"table {vocabulary:,} x {width:,}, {tokens:,} tokens"
    lines = [[title, "GPU busy, ms", "bandwidth, relative to a copy", "`nn.Embed`, `nn.LayerNorm`, ms", "ratio"]]
    lines.append(["---", *["--:"] * 4])
    for name, row in rows.items():
        module, _, what = name.partition(", ")
        if module != "stable":
            continue
        flax = rows[f"flax, {what}"]
        share = _share(results, row["least_bytes"], row["device_ms"])
        ratio = f"{row['device_ms'] / flax['device_ms']:.2f}x" if row["device_ms"] else ""
        lines.append([f"`StableEmbed`, {what}", _busy(row), share, _busy(flax), ratio])
    return report.table(lines)


def main(arguments: list[str]) -> None:
    """Measures, prints, and keeps the results of a full run."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.55")  # torch and the libraries on it need the rest
    if not {"--quick", "--help", "-h"} & {*arguments} and jax.default_backend() != "gpu":
        return print("JAX finds no GPU on this machine. `python -m benchmarks compiled` needs none.")
    report.run("gpu", __doc__, arguments, measure, markdown, keep)


def keep(results: Tree) -> None:
    """Writes the results, named after the GPU."""
    device = re.sub(r"[^a-z0-9]+", "-", results["environment"]["device"].lower()).strip("-")
    report.save(results, report.RESULTS / f"gpu-{device}.json")
