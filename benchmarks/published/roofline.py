"""Draws the time of a step of AdamW next to that of `optax.adamw`: measured on GPUs, counted for TPUs.

`python -m benchmarks readme` draws it from the files in `results/`. A mark on each bar shows the time that memory alone
needs, so no step can be faster. For TPUs the bar is the longer of the times for memory and for instructions.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..counted import compiled
from ..harness import report
from ..harness.tree_steps import BASELINE
from ..measured import gpu

FILE = report.RESULTS / "roofline.png"
SIZE = 4096 * 4096  # parameters of a step on a TPU
OURS, REFERENCE, OTHERS = "#0072B2", "#999999", "#E6C78A"


class Bar(NamedTuple):
    """A step: its name, its milliseconds, and the milliseconds that memory needs for its bytes."""

    name: str
    ms: float
    memory_ms: float

    @property
    def color(self) -> str:
        """Tells this library, `optax.adamw` and other libraries apart."""
        if "optax" in self.name:
            return REFERENCE
        return OTHERS if any(peer in self.name for peer in ("torch", "bitsandbytes")) else OURS


Group = tuple[str, list[Bar]]


def bars(on_gpus: list[dict[str, Any]], counted: dict[str, Any]) -> list[Group]:
    """Returns groups of bars with their titles. The first bar of a group is `optax.adamw`."""
    groups = [
        (
            f"{results['environment']['device']}: 1.1 billion parameters, measured with an older kernel",
            _measured(results),
        )
        for results in on_gpus
    ]
    for chip in compiled.CHIPS:
        rows = [row for row in counted["rows"] if row["chip"] == chip]
        title = f"TPU {chip}: {SIZE / 1e6:.1f} million parameters, least time by counts (not run)"
        groups.append((title, [_least(row) for row in rows if _is_one_pass(row)]))
    return groups


def _is_one_pass(row: dict[str, Any]) -> bool:
    """Returns whether a step reads its arrays once. The norm for clipping is a pass of its own."""
    return (row["bundles"] or "optax" in row["step"]) and "clip" not in row["step"]


def _measured(results: dict[str, Any]) -> list[Bar]:
    """Returns the steps of the model that ran. Memory has the speed of a copy."""
    rows = {name: row for name, row in results["model"].items() if row.get("device_ms")}
    speed = results["copy_gb_per_s"] * 1e6  # bytes per millisecond
    order = sorted(rows, key=lambda name: name != BASELINE)
    return [Bar(name, rows[name]["device_ms"], gpu.moved_by_model(rows[name]) / speed) for name in order]


def _least(row: dict[str, Any]) -> Bar:
    """Returns the longer of the times for instructions and for memory."""
    ms_per_cycle = SIZE / 1024 / compiled.CHIPS[row["chip"]].clock * 1e3
    memory = row["cycles_of_memory"] * ms_per_cycle
    return Bar(row["step"], max((row["bundles"] or 0) * ms_per_cycle, memory), memory)


def draw(on_gpus: list[dict[str, Any]], counted: dict[str, Any], path: Path = FILE) -> Path:
    """Writes the picture and returns its path."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    groups = bars(on_gpus, counted)
    figure = Figure(figsize=(8, 0.25 * sum(len(rows) + 3.5 for _, rows in groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, height_ratios=[len(rows) for _, rows in groups])
    for ax, (title, rows) in zip(axes, groups):
        at, optax = range(len(rows)), rows[0].ms
        ax.barh(at, [bar.ms for bar in rows], color=[bar.color for bar in rows], height=0.7)
        ax.set_yticks(at, [bar.name.replace("`", "") for bar in rows], fontsize=8)
        ax.invert_yaxis()
        ax.axvline(optax, color="0.4", linewidth=0.8, linestyle=":")
        for k, bar in enumerate(rows):
            ax.plot([bar.memory_ms] * 2, [k - 0.35, k + 0.35], color="black", linewidth=1.5)
            text = f" {bar.ms:.3g} ms" + ("" if bar is rows[0] else f" ({bar.ms / optax:.2f}x)")
            ax.text(max(bar.ms, optax if bar.ms > 0.8 * optax else 0), k, text, va="center", fontsize=7)
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlim(0, 1.18 * max(bar.ms for bar in rows))
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("milliseconds per step", fontsize=7)
    kinds = (("optax.adamw", REFERENCE), ("this library", OURS), ("other libraries", OTHERS))
    handles = [Patch(color=color, label=label) for label, color in kinds]
    handles.append(Line2D([], [], color="black", linewidth=1.5, label="time that memory needs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path
