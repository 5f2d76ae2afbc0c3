"""Reports the trainings of `quality.py`: which runs were unstable, one table per question, one figure.

A run is unstable if it diverges, even if it recovers. One of these has happened:

- *not finite*: a training or validation loss is NaN or infinite;
- *exploded*: a training loss exceeds EXPLODED times the first one, which is the loss of an untrained model;
- *fell back*: more than FELL_BACK of the largest decrease of the validation loss is lost again at the end.

A run that only learns little, because its rate is too high or too low, is stable. Its loss shows that.
"""

import math
import re
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from ..harness import report

FILE = report.RESULTS / "quality.json"
EXPLODED, FELL_BACK = 1.5, 0.2


def unstable(losses: list[float | None], validation: list[list]) -> str:
    """Returns why a run is unstable, from its training losses and its validation losses (step, loss), else "".

    >>> unstable([8.3, 6.1, 5.0], [[0, 8.3], [3, 5.0]]), unstable([8.3, None], [[0, 8.3]])
    ('', 'not finite')
    """
    held_out = [loss for _, loss in validation]
    if None in losses or None in held_out or not all(map(math.isfinite, [*losses, *held_out])):
        return "not finite"
    if max(losses) > EXPLODED * losses[0]:
        return "exploded"
    lowest = min(held_out)
    return "fell back" if held_out[-1] - lowest > FELL_BACK * (held_out[0] - lowest) else ""


# --- numbers ---------------------------------------------------------------------------------------------------------


def final(run: dict[str, Any]) -> float:
    """Returns the last validation loss, infinity if it is not finite."""
    loss = run["validation"][-1][1]
    return math.inf if loss is None else loss


def of_cell(results: dict[str, Any], cell: str, rate: float | None = None) -> list[dict[str, Any]]:
    """Returns the runs of a cell, with one rate or with all."""
    return [run for run in results["runs"] if run["cell"] == cell and rate in (None, run["rate"])]


def differences(results: dict[str, Any], cell: str, reference: str, rate: float | None = None) -> list[float]:
    """Returns relative differences of the last validation loss from the reference's run with the same rate and seed.

    Only pairs of stable runs count.
    """
    other = {(run["rate"], run["seed"]): run for run in of_cell(results, reference, rate) if not run["unstable"]}
    runs = [run for run in of_cell(results, cell, rate) if not run["unstable"]]
    pairs = [(run, other[run["rate"], run["seed"]]) for run in runs if (run["rate"], run["seed"]) in other]
    return [final(run) / final(base) - 1 for run, base in pairs]


def _rates(results: dict[str, Any], cell: str) -> list[float]:
    return results["tasks"][cell.split("-")[0]]["rates"]


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """Returns one table per question, with one line per cell."""
    return "\n\n".join([*about(results), *tables(results).values()])


def about(results: dict[str, Any]) -> list[str]:
    """Describes the runs, and how to read the tables."""
    env, done = results["environment"], len(results["runs"])
    seeds = {name: len({run["seed"] for run in results["runs"] if run["task"] == name}) for name in results["tasks"]}
    counted = f"{done} runs" if done == results["planned"] else f"{done} of {results['planned']} runs"
    devices = Counter(run["device"] for run in results["runs"])
    where = ", ".join(devices) if len(devices) < 2 else ", ".join(f"{n} on {name}" for name, n in devices.items())
    return [
        f"{counted}; {_sizes(results, seeds)}; jax {env['versions']['jax']}; {where}; "
        f"`python -m benchmarks quality`, {env['date']}.",
        "For each learning rate: the last validation loss, median over seeds, and in brackets how many runs were "
        f"unstable. A run is unstable if a loss is not finite, or above {EXPLODED:g} times the first, or if more than "
        f"{FELL_BACK:.0%} of the gain is lost by the end. The last two columns compare each stable run with the run of "
        "the first line that has the same rate and seed: the mean difference in loss and its standard error, first at "
        "the best rate of that line, then over all rates.",
    ]


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Returns the table of every question that has runs. The ladder comes first."""
    asked = {t: rows for t, rows in results["questions"].items() if any(of_cell(results, cell) for _, cell in rows)}
    return {title: _question(results, title, rows) for title, rows in asked.items()}


def _sizes(results: dict[str, Any], seeds: dict[str, int]) -> str:
    language, digits = results["tasks"]["language"], results["tasks"]["digits"]
    return (
        f"language model: width {language['width']}, {language['layers']} layers, vocabulary {language['vocab']}, "
        f"{language['steps']} steps, {seeds['language']} seeds; "
        f"digits: {digits['steps']} steps, {seeds['digits']} seeds"
    )


def _question(results: dict[str, Any], title: str, rows: list[list[str]]) -> str:
    rates, (against, reference) = _rates(results, rows[0][1]), rows[0]
    best = min(rates, key=lambda rate: median([*map(final, of_cell(results, reference, rate))] or [math.inf]))
    compared = [f"against {against} at {best:g}", "at all rates"]
    lines = [[title, *(f"{rate:g}" for rate in rates), "unstable", *compared], ["---", *["--:"] * (len(rates) + 3)]]
    for label, cell in rows:
        by_rate = [_at_rate(of_cell(results, cell, rate)) for rate in rates]
        pairs = ([] if cell == reference else differences(results, cell, reference, rate) for rate in (best, None))
        lines.append([label, *by_rate, _share(of_cell(results, cell)), *map(spread_of, pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _at_rate(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    loss, count = median(map(final, runs)), sum(bool(run["unstable"]) for run in runs)
    text = "not finite" if math.isinf(loss) else f"{loss:.0f}" if loss >= 100 else f"{loss:.4f}"
    return f"{text} ({count}/{len(runs)})" if count else text


def _share(runs: list[dict[str, Any]]) -> str:
    return f"{unstable_share(runs):.0%}" if runs else ""


def unstable_share(runs: list[dict[str, Any]]) -> float:
    """Returns the share of these runs that was unstable."""
    return mean(bool(run["unstable"]) for run in runs)


def spread_of(values: list[float]) -> str:
    """Formats the mean of relative differences, with its standard error if there are several."""
    if len(values) < 2:
        return "" if not values else f"{values[0]:+.2%}"
    return f"{mean(values):+.2%} ± {stdev(values) / math.sqrt(len(values)):.2%}"


# --- the figure ------------------------------------------------------------------------------------------------------

# Okabe and Ito's palette, whose colors can be told apart with any kind of color vision. Markers differ as well.
STYLES = {
    "fp32": ("#000000", "o", "-"),
    "root": ("#0072B2", "s", "-"),
    "dynamic": ("#D55E00", "^", "-"),
    "linear": ("#CC79A7", "D", "-"),
    "root, dither": ("#56B4E9", "s", "--"),
    "dynamic, dither": ("#E69F00", "^", "--"),
    "linear, dither": ("#999999", "D", "--"),
}
TITLE = {"loc": "left", "fontsize": 10, "fontweight": "bold"}
SHADES = ("#b5d4ea", "#6baed6", "#2f7fbc", "#08519c", "#062a5a", "#000000")  # learning rates, from low to high


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws loss by learning rate and the difference from fp32 for both tasks, and the ladder between them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 13), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1.15, 1))
    shown = ("fp32", "root", "dynamic", "linear", "root, dither", "linear, dither")
    axes = [figure.add_subplot(grid[i, j]) for i in range(3) for j in range(2)]
    _losses(axes[0], results, "language", shown, "Language model, stable embedding")
    _differences(axes[1], results, "language", "Language model: difference from fp32")
    _ladder(axes[2], axes[3], results)
    _losses(axes[4], results, "digits", shown, "Handwritten digits")
    _differences(axes[5], results, "digits", "Handwritten digits: difference from fp32")
    for a in axes:
        a.grid(color="0.9", linewidth=0.6)
        a.set_axisbelow(True)
        a.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _offset(rate: float, i: int, n: int) -> float:
    """Returns a position next to others on the logarithmic axis, so that error bars do not hide one another."""
    return rate * 1.1 ** (i - (n - 1) / 2)


def _losses(axes, results, task: str, labels, title: str) -> None:
    """Draws the median over seeds with the lowest and the highest. An arrow at the top stands for a run far above."""
    rates = results["tasks"][task]["rates"]
    cells = {label: f"{task}-{label.replace(', ', '-')}" for label in labels}
    first = [run["validation"][0][1] for run in results["runs"] if run["task"] == task]
    if not first:
        return
    top = 1.05 * max(first)
    for i, (label, cell) in enumerate(cells.items()):
        color, marker, line = STYLES[label]
        points = [(r, [final(run) for run in of_cell(results, cell, r)]) for r in rates]
        points = [(_offset(r, i, len(cells)), losses) for r, losses in points if losses]
        if not points:
            continue
        x, groups = zip(*points)
        middle = [min(median(g), top) for g in groups]
        low = [m - min(min(g), top) for m, g in zip(middle, groups)]
        high = [min(max(g), top) - m for m, g in zip(middle, groups)]
        axes.errorbar(
            x, middle, (low, high), color=color, marker=marker, linestyle=line, label=_shown(label), capsize=2,
            markersize=5, linewidth=1.3,
        )  # fmt: skip
        gone = [a for a, g in zip(x, groups) if median(g) > top]
        if gone:  # not clipped; an empty line would change the layout
            axes.plot(gone, [top] * len(gone), color=color, marker="^", markersize=9, linestyle="", clip_on=False)
    axes.axhline(median(first), color="0.6", linewidth=1, linestyle=":")
    axes.annotate(" before the first step", (0, median(first)), xycoords=("axes fraction", "data"), color="0.4",
                  fontsize=8, ha="left", va="top")  # fmt: skip
    _rate_axis(axes, rates)
    axes.set_ylabel("validation loss, nats")
    axes.set_title(title, **TITLE)
    _legend(axes, 2)


def _differences(axes, results, task: str, title: str) -> None:
    """Draws the mean over seeds with the lowest and the highest. The gray band is the effect of nudged parameters."""
    rates = results["tasks"][task]["rates"]
    reference = f"{task}-fp32"
    nudged = [differences(results, f"{reference}-nudged", reference, rate) for rate in rates]
    band = [(r, 100 * min(v), 100 * max(v)) for r, v in zip(rates, nudged) if v]
    if band:
        axes.fill_between(*zip(*band), color="0.85", label="fp32 from nudged parameters")
    axes.axhline(0, color="black", linewidth=1)
    labels = [label for label in STYLES if label.split(",")[0] not in ("fp32", "linear")]
    for i, label in enumerate(labels):
        color, marker, line = STYLES[label]
        cell = f"{task}-{label.replace(', ', '-')}"
        points = [(_offset(r, i, len(labels)), differences(results, cell, reference, r)) for r in rates]
        points = [(x, [100 * v for v in values]) for x, values in points if values]
        if points:
            x, groups = zip(*points)
            y = [mean(g) for g in groups]
            spread = [m - min(g) for m, g in zip(y, groups)], [max(g) - m for m, g in zip(y, groups)]
            axes.errorbar(
                x, y, spread, color=color, marker=marker, linestyle=line, label=_shown(label), capsize=2,
                markersize=5, linewidth=1.2,
            )  # fmt: skip
    _rate_axis(axes, rates)
    axes.set_ylabel("validation loss, % from the\nfp32 run of the same seed")
    axes.set_title(title, **TITLE)
    _legend(axes, 2)


def _shown(label: str) -> str:
    """Returns a codec with its rounding."""
    return label if label == "fp32" or ", " in label else f"{label}, nearest"


def _legend(axes, ncols: int) -> None:
    """Puts the legend under the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "columnspacing": 1}
        axes.legend(frameon=False, fontsize=9, ncols=ncols, **place)


def _rate_axis(axes, rates: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    axes.set_xlim(rates[0] / 1.4, rates[-1] * 1.4)
    axes.set_xlabel("learning rate")


def _ladder(share, losses, results) -> None:
    """Draws one line per rung: the share of unstable runs, and the loss of every run."""
    from matplotlib.lines import Line2D

    title, rows = next(iter(results["questions"].items()))
    rows = [(label, cell) for label, cell in rows if of_cell(results, cell)]
    if not rows:
        return
    rates = _rates(results, rows[0][1])
    top = 1.05 * median(run["validation"][0][1] for run in results["runs"] if run["task"] == "language")
    for y, (label, cell) in enumerate(rows):
        runs = of_cell(results, cell)
        value = 100 * unstable_share(runs)
        color = STYLES[label.split(",")[0]][0]
        share.barh(y, value, color=color, height=0.6)
        share.annotate(f"{value:.0f}%", (value, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        for i, rate in enumerate(rates):
            shade, height = SHADES[i % len(SHADES)], y + 0.65 * ((i + 0.5) / len(rates) - 0.5)
            shown = [final(run) for run in of_cell(results, cell, rate)]
            inside = [x for x in shown if x <= top]
            losses.plot(inside, [height] * len(inside), "o", color=shade, markersize=5, alpha=0.85)
            if len(inside) < len(shown):
                losses.plot([top], [height], ">", color=shade, markersize=7, clip_on=False)
    labels = [re.sub(", (plain|stable)", r",\n\1", label) for label, _ in rows]
    share.set_yticks(range(len(rows)), labels, fontsize=9)
    losses.set_yticks(range(len(rows)), [])
    for axes in (share, losses):
        axes.set_ylim(len(rows) - 0.4, -0.6)
    share.set_xlim(0, 112)
    share.set_xticks(range(0, 101, 25))
    share.set_xlabel("unstable runs, % of all learning rates and seeds")
    share.set_title(f"{title}: language model", **TITLE)
    losses.set_xlim(right=top)
    losses.set_xlabel(f"loss of every run, nats (arrow: above {top:.1f} or not finite)")
    losses.set_title("Its losses", **TITLE)
    handles = [Line2D([], [], color=s, marker="o", linestyle="", label=f"{r:g}") for s, r in zip(SHADES, rates)]
    losses.legend(
        handles=handles, fontsize=9, title="learning rate", title_fontsize=9, frameon=False, ncols=len(rates),
        loc="upper center", bbox_to_anchor=(0.5, -0.12), columnspacing=1, handletextpad=0.2,
    )  # fmt: skip
