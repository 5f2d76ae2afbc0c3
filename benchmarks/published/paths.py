"""Shows what a step costs on every path that users take, next to float32 optax, in one table. Nothing is measured here.

`python -m benchmarks readme` writes it, from the files in `results/`.
"""

import json
from collections.abc import Iterator
from typing import Any

from ..counted import collectives, compiled, instructions, lookups
from ..harness import report
from ..harness.tree_steps import BASELINE, OURS
from ..measured import gpu, models

HEAD = ["where", "platform", "what", "float32 optax or Flax", "ours", "obtained"]
COUNTED, MEASURED = "counted", "measured"
BYTES = "bytes per parameter"
Row = tuple[str, str, str, str, str, str]


def markdown() -> str:
    """Returns the table."""
    files = compiled, instructions, collectives, lookups, models
    step, kernel, meshes, embeddings, full = (json.loads(one.FILE.read_text()) for one in files)
    rows = [
        *_of_steps(step["rows"]),
        *_of_meshes(meshes["rows"]),
        *_of_gpus(gpu.everywhere()),
        *_of_rounding(step["rows"], kernel["cases"]),
        *_of_embeddings(embeddings["meshes"]),
        *_of_cpu(full),
    ]
    return report.table([HEAD, ["---", "---", "---", "--:", "--:", "---"], *_merged(rows)])


def _merged(rows: list[Row]) -> list[list[str]]:
    """Returns the rows as lines of a table. Platforms with the same numbers share a line."""
    platforms: dict[tuple[str, ...], list[str]] = {}
    for where, platform, *others in rows:
        platforms.setdefault((where, *others), []).append(platform)
    return [[where, ", ".join(dict.fromkeys(names)), *others] for (where, *others), names in platforms.items()]


def _of_steps(rows: list[dict[str, Any]]) -> Iterator[Row]:
    """Returns the bytes that one device moves for a step, by how the step is called."""
    found = {(row["chip"], row["step"]): row for row in rows}
    clipped = "`optax.adamw` after `clip_by_global_norm`, updates"
    for where, step, base in (
        ("`tx.update`, then `optax.apply_updates`", "`adamw8bit`, `tx.update` and `apply_updates`", None),
        ("`fse.in_place(tx)`, in TrainState and nnx.Optimizer", "`adamw8bit`, `in_place` and `apply_updates`", None),
        ("`fse.fused_update`", "`adamw8bit`", None),
        ("`fse.fused_update` after `clip_by_global_norm`", "`adamw8bit` after `clip_by_global_norm`", clipped),
    ):
        for chip in dict.fromkeys(row["chip"] for row in rows):
            theirs, ours = found[chip, base or "`optax.adamw`, updates"], found[chip, step]
            yield where, chip, BYTES, f"{theirs['bytes']:.2f}", f"{ours['bytes']:.2f}", COUNTED


def _of_meshes(rows: list[dict[str, Any]]) -> Iterator[Row]:
    """Returns what the optimizer adds to the communication of a sharded training step."""
    for row in rows:
        if row["axes"] == "Auto" and row["step"] == collectives.FUSED and not row["straddling"]:
            where = "training steps sharded by FSDP and tensor parallelism, Auto axes"
            added = sum(row["optimizer"]["arrays"].values())
            yield where, row["slice"], "collectives of the optimizer", "0", str(added), COUNTED


def _of_gpus(every: list[dict[str, Any]]) -> Iterator[Row]:
    for results in every:
        rows, device = results["model"], results["environment"]["device"]
        for where, name in (
            ("`fse.fused_update`, 1.1B parameters", OURS),
            ("`tx.update`, the same", OURS.replace("fused_update", "update")),
        ):
            theirs, ours = rows[BASELINE]["device_ms"], rows[name]["device_ms"]
            yield where, device, "ms, with the previous kernel", f"{theirs:.1f}", f"{ours:.1f}", MEASURED


def _of_rounding(rows: list[dict[str, Any]], cases: list[dict[str, Any]]) -> Iterator[Row]:
    """Returns the instructions of the kernels by rounding."""
    for chip in ("v5e", "v6e"):
        found = {row["step"]: row["bundles"] for row in rows if row["chip"] == chip}
        for rounding, step in (("nearest", "`adamw8bit`, nearest"), ("dither", "`adamw8bit`")):
            yield f"the kernel, {rounding}", chip, "bundles per 1024 parameters", "", f"{found[step]:.1f}", COUNTED
    for case in cases:
        if case["step"] in ("nearest", "dither", "stochastic", "bfloat16"):
            what = "instructions per element"
            yield f"the kernel, {case['step']}", compiled.GPU, what, "", f"{case['instructions']:.1f}", COUNTED


def _of_embeddings(rows: list[dict[str, Any]]) -> Iterator[Row]:
    for row in rows:
        if row["module"] == "StableEmbed":
            theirs, ours = (f"{row[key] / 1e9:.2f}" for key in ("theirs", "ours"))
            yield f"`StableEmbed`, {row['dtype']}, {row['where']}", "v5e", "GB, with gradients", theirs, ours, COUNTED


def _of_cpu(full: dict[str, Any]) -> Iterator[Row]:
    device, rows = full["environment"]["device"], full["compile"]["cpu"]
    what = f"seconds to compile {rows['arrays']} arrays"
    yield "`fse.fused_update`", device, what, f"{rows[BASELINE]:.1f}", f"{rows[OURS]:.1f}", MEASURED
    base, own = full["small"][BASELINE], full["small"][OURS]
    where = f"`fse.fused_update`, {models.SMALL} small vectors"
    yield where, device, "seconds of the first step", f"{base['first_s']:.1f}", f"{own['first_s']:.1f}", MEASURED
    yield where, device, "ms per step", f"{base['ms'][1]:.1f}", f"{own['ms'][1]:.1f}", MEASURED
