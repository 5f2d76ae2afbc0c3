"""A picture of what share of the memory's speed a step reaches: measured on a GPU, and by compilers' counts for TPUs.

`python -m benchmarks readme` draws it, from the files in `results/`.
"""

from math import prod
from pathlib import Path
from typing import Any

from ..counted import compiled
from ..harness import report
from ..harness.tree_steps import BASELINE, OURS
from ..measured import gpu

FILE = report.RESULTS / "roofline.png"
MEASURED, COUNTED, REFERENCE = "#1f77b4", "#9ecae1", "#bbbbbb"


Group = tuple[str, list[tuple[str, float, str]]]


def bars(on_gpus: list[dict[str, Any]], counted: dict[str, Any]) -> list[Group]:
    """Groups of bars: title, and for each bar its name, its share and its colour."""
    groups = [(f"{measured['environment']['device']}, measured", _measured(measured)) for measured in on_gpus]
    for chip in compiled.BYTES_A_CYCLE:
        rows = [row for row in counted["rows"] if row["chip"] == chip and row["bundles"]]
        shares = [(row["step"], min(1.0, row["cycles_of_memory"] / row["bundles"]), COUNTED) for row in rows]
        groups.append((f"TPU {chip}, at most, as its compiler counts", shares))
    return groups


def _measured(results: dict[str, Any]) -> list[tuple[str, float, str]]:
    found = []
    for name, colour in ((BASELINE, REFERENCE), (OURS, MEASURED)):
        row = results["model"][name]
        share = gpu.share_of_copy(results, gpu.moved_by_model(row), row["device_ms"])
        found.append((f"{name}: 1.1B parameters", share, colour))
    for name, row in results["arrays"].items():
        moved = row["bytes_per_parameter"] * prod(row["shape"])
        found.append((name, gpu.share_of_copy(results, moved, row["kernel"]["device_ms"]), MEASURED))
        if name == "`root`":
            found.append((f"{name}, `xla`", gpu.share_of_copy(results, moved, row["xla"]["device_ms"]), REFERENCE))
    return found


def draw(on_gpus: list[dict[str, Any]], counted: dict[str, Any], path: Path = FILE) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure

    groups = bars(on_gpus, counted)
    figure = Figure(figsize=(8, 0.3 * sum(len(rows) + 2 for _, rows in groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, height_ratios=[len(rows) for _, rows in groups])
    for ax, (title, rows) in zip(axes, groups):
        names, shares, colours = zip(*rows)
        at = range(len(rows))
        ax.barh(at, [100 * share for share in shares], color=colours, height=0.7)
        ax.set_yticks(at, [name.replace("`", "") for name in names], fontsize=8)
        ax.invert_yaxis()
        ax.axvline(100, color="black", linewidth=0.8)
        ax.set_title(title, fontsize=9, loc="left")
        for k, share in enumerate(shares):
            ax.text(100 * share + 1, k, f"{100 * share:.0f}", va="center", fontsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlim(0, 110)
    axes[-1].set_xlabel("share of the memory's speed, percent: of a copy (GPU), of the chip's figure (TPU)", fontsize=8)
    figure.savefig(path, dpi=130)
