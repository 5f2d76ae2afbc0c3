"""Compares the goals of this library with the results in `results/`, in one table. Nothing is measured here.

`python -m benchmarks readme` writes it.
"""

import json
from collections.abc import Iterator
from typing import Any

from ..counted import compiled, instructions
from ..harness import report
from ..harness.contenders import BASELINE as CPU_BASELINE
from ..harness.tree_steps import BASELINE, OURS
from ..measured import gpu, models

VERDICTS = {True: "yes", False: "no", None: ""}
HEAD = ["measure", "goal", "reached", "met"]
MATRIX = "square_4096"  # of 16.8M parameters


def markdown(cpu: dict[str, Any]) -> str:
    """Returns the table. `cpu` are the newest results of `python -m benchmarks steps`."""
    files = compiled.FILE, instructions.FILE, models.FILE
    counted, kernels, full = (json.loads(file.read_text()) for file in files)
    lines = [HEAD, ["---"] * 4]
    on_gpus = gpu.everywhere()
    for rows in (
        _of_compilers(counted),
        _of_gpu_kernels(kernels),
        *map(_of_gpu, on_gpus),
        _of_cpu(cpu),
        _of_models([*on_gpus, full], full),
    ):
        lines += [[what, reach, found, VERDICTS[good]] for what, reach, found, good in rows]
    return report.table(lines)


Row = tuple[str, str, str, bool | None]  # None: not measured


def _of_compilers(counted: dict[str, Any]) -> Iterator[Row]:
    rows = {row["chip"]: row for row in counted["rows"] if row["step"] == "`adamw8bit`"}
    base = {row["chip"]: row for row in counted["rows"] if row["step"] == "`optax.adamw`, updates"}
    for chip, row in rows.items():
        what = f"{chip}, compiled: AdamW in place, 4096 x 4096: bytes moved per parameter (`optax.adamw`: "
        what += f"{base[chip]['bytes']:.0f}), bytes of temporaries per parameter, kernels"
        found = f"{row['bytes']:.2f}, {row['temporaries']:.2f}, {row['kernels']}"
        good = row["bytes"] <= 16.6 and row["temporaries"] < 0.01 and row["kernels"] == 1
        yield what, "16.6, 0, 1", found, good
    for chip, most in (("v5e", 25.0), ("v6e", 17.5)):
        found = rows[chip]["bundles"]
        what = f"{chip}, compiled: bundles of instructions per 1024 parameters"
        yield f"{what}, codec `root`", f"{most:g}", f"{found:.1f}", found <= most


def _of_gpu_kernels(counted: dict[str, Any]) -> Iterator[Row]:
    rows = {row["step"]: row["instructions"] for row in counted["cases"]}
    for step, most in (("nearest", 50), ("dither", 80), ("stochastic", 80), ("bfloat16", 55)):
        what = f"H200, compiled: instructions per element, codec `root`, {step}"
        yield what, str(most), f"{rows[step]:.1f}", rows[step] <= most
    added = rows["dither"] - rows["nearest"]
    yield "H200, compiled: instructions per element that dither adds", "8", f"{added:.1f}", added <= 8
    warps = min(row["warps"] for row in counted["models"])
    what = "H200, compiled: warps per processor, fewest of the arrays of TinyLlama and Llama 2 7B"
    yield what, "16", str(warps), warps >= 16


def _of_gpu(measured: dict[str, Any]) -> Iterator[Row]:
    device, rows = measured["environment"]["device"], measured["model"]
    own, base = rows[OURS], rows[BASELINE]
    step = f"{device}: a step of AdamW, 1.1B parameters"
    share = gpu.share_of_copy(measured, gpu.moved_by_model(own), own["device_ms"])
    yield f"{step}: bandwidth, relative to a copy", "85%", f"{100 * share:.0f}%", share >= 0.85
    ratio = own["device_ms"] / base["device_ms"]
    yield f"{step}: time, relative to `optax.adamw`", "0.62x", f"{ratio:.2f}x", ratio <= 0.62
    for name, row in rows.items():
        if "torch" in name or "bitsandbytes" in name:
            if "skip" in row:
                yield f"{step}: time, relative to {name}", "below 1x", row["skip"], None
                continue
            ratio = own["device_ms"] / row["device_ms"]
            yield f"{step}: time, relative to {name}", "below 1x", f"{ratio:.2f}x", ratio < 1
    if "stable_embed" in measured:
        busy = {name: row["device_ms"] for name, row in measured["stable_embed"].items()}
        what = "forward and backward, float32"
        ratio = busy[f"stable, {what}"] / busy[f"flax, {what}"]
        name = f"{device}: `StableEmbed`, {what}: time, relative to `nn.Embed` and `nn.LayerNorm`"
        yield name, "1x", f"{ratio:.2f}x", ratio <= 1


def _of_cpu(cpu: dict[str, Any]) -> Iterator[Row]:
    (entry,) = [entry for entry in cpu["shapes"] if entry["name"] == MATRIX]
    rows = {(row["contender"], row["path"]): row for row in entry["rows"] if "ms" in row}
    own = rows["fse.adamw8bit root", "fused_update"]
    step = f"{cpu['environment']['device']}, {cpu['environment']['cores']} cores: a step of AdamW, 16.8M parameters"
    ratio = own["ratio"][1] / rows[CPU_BASELINE, "update"]["ratio"][1]
    yield f"{step}: time, relative to `optax.adamw`", "1x", f"{ratio:.2f}x", ratio <= 1
    for (name, _), row in rows.items():
        if "AdamW8bit" in name:
            times = row["ms"][1] / own["ms"][1]
            yield f"{step}: speedup over {name}", "8x", f"{times:.1f}x", times >= 8


def _of_models(trained: list[dict[str, Any]], full: dict[str, Any]) -> Iterator[Row]:
    """Returns the rows of full trainings, on GPUs and on this machine, and those of `python -m benchmarks models`."""
    for results in trained:
        rows, device = results["training"], results["environment"]["device"]
        best = min(row["ratio"][1] for name, row in rows.items() if "8bit" in name)
        size = f"{rows['adamw']['parameters'] / 1e6:.0f}M parameters, {rows['adamw']['tokens']:,} tokens"
        yield f"{device}: a training step, {size}: time, relative to fp32", "1x", f"{best:.2f}x", best <= 1
    for name, row in full["compile"].items():
        ratio = row[OURS] / row[BASELINE]
        what = f"{name}: seconds to compile a step for {row['arrays']} arrays (`optax.adamw`: {row[BASELINE]:.1f})"
        yield what, f"{2 * row[BASELINE]:.1f}", f"{row[OURS]:.1f}", ratio <= 2
    for results in trained:
        if "small" in results:
            ratio = results["small"][OURS]["ratio"][1]
            count = models.SMALL if results is full else 2000
            what = f"{results['environment']['device']}: a step on {count} vectors of 64 to 4096 elements"
            yield f"{what}: time, relative to `optax.adamw`", "1.3x", f"{ratio:.2f}x", ratio <= 1.3
