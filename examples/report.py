"""Reports training runs: the bytes of their state, one table, one plot, and one summary as JSON.

    python examples/report.py                                       prints the table of the last comparison as Markdown
    python examples/report.py runs/comparison.json --publish NAME   also publishes it under this name

Publishing writes the table into the page (README.md or a page of docs/) that has the marks <!-- NAME: ... --> and
<!-- /NAME -->, and copies plot and summary into examples/results/. `language_model.py` imports this module to measure
and to draw.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from statistics import mean, median

import jax
import numpy as np
import run_folder

RESULTS = Path(__file__).with_name("results")  # published comparisons, a .png and a .json each
LIMIT = 0.002  # largest relative difference between the validation losses of a run and of the reference
SMOOTHED_OVER = 15  # standard deviation of the weights behind the smoothed curve, in steps
CURVE_STEPS = 10  # training losses are averaged over so many steps in the curve that a summary keeps
STATE_CLASSES = {  # in the order of the table
    "codes": "state: 8-bit codes",
    "scales": "state: scales of the codes",
    "others": "state: other fp32 arrays",
    "remainders": "state: remainders of bfloat16 weights",
    "embeddings": "state: embeddings",
}
# Okabe and Ito's palette: blue, vermillion, green, purple can be told apart with any kind of color vision.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]


# --- numbers of one run ---


def state_bytes(opt_state) -> dict[str, int]:
    """Returns the bytes of an optimizer state by class. Paths and dtypes tell the classes, so any optax state works."""
    classes = dict.fromkeys(STATE_CLASSES, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        if is_embedding(path):
            classes["embeddings"] += leaf.nbytes
        elif ".remainder" in jax.tree_util.keystr(path):
            classes["remainders"] += leaf.nbytes
        elif "absmax" in jax.tree_util.keystr(path):
            classes["scales"] += leaf.nbytes
        elif leaf.dtype.itemsize == 1 and leaf.ndim > 1:
            classes["codes"] += leaf.nbytes
        else:
            classes["others"] += leaf.nbytes
    return classes


def digest(tree) -> str:
    """Returns a hash of every bit of every array. Two runs with the same hash are the same run."""
    hasher = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        hasher.update(np.asarray(leaf).tobytes())
    return hasher.hexdigest()


def step_bytes(compiled) -> int:
    """Returns the bytes that a compiled step holds while it runs: arguments, temporaries, and results not in place."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def curve(metrics: list[dict]) -> dict[str, list]:
    """Returns the training loss as a curve: the mean loss of every `CURVE_STEPS` steps, and the last of these steps."""
    parts = [metrics[i : i + CURVE_STEPS] for i in range(0, len(metrics), CURVE_STEPS)]
    return {
        "steps": [part[-1]["step"] for part in parts],
        "loss": [round(mean(line["loss"] for line in part), 4) for part in parts],
    }


def is_embedding(path) -> bool:
    """Returns whether a leaf of a pytree belongs to an embedding table."""
    return "'embedding'" in jax.tree_util.keystr(path)


def write_run(folder: Path, settings: dict, params, opt_state, compiled_step) -> dict:
    """Writes the report of a finished run into its folder and returns it."""
    metrics = run_folder.read_metrics(folder / "metrics.jsonl")
    sizes = [(is_embedding(path), leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    codec, weights = settings["codec"], settings["weights"]
    run = {
        **settings,
        "label": ", ".join([settings["optimizer"], codec] + [weights] * (weights != "float32")),
        "parameters": sum(size for _, size in sizes),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "embedding_parameters": sum(size for embedding, size in sizes if embedding),
        "first_loss": metrics[0]["loss"],
        "validation_loss": metrics[-1]["validation_loss"],
        "curve": curve(metrics),
        "state_bytes": state_bytes(opt_state),
        "step_bytes": step_bytes(compiled_step),
        "median_ms": median(line["ms"] for line in metrics),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "digest": digest((params, opt_state)),
    }
    run_folder.write(folder / "run.json", run)
    return run


def is_complete(folder: Path) -> bool:
    """Returns whether a run has reached its end."""
    return (folder / "run.json").exists()


def read_run(folder: Path) -> dict:
    """Returns the report of a finished run."""
    return json.loads((folder / "run.json").read_text())


# --- several runs ---


def by_label(runs: list[dict]) -> dict[str, list[dict]]:
    """Groups runs by optimizer and codec, in the order in which they ran. Runs of a group differ in their seeds."""
    groups = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return groups


def validation_loss(runs: list[dict]) -> float:
    """Returns the mean over the seeds."""
    return mean(run["validation_loss"] for run in runs)


def summarize(runs: list[dict], command: str) -> dict:
    """Returns the comparison as data: every run, and how far the mean loss of each group is from the first group's."""
    (reference, *_), *others = groups = list(by_label(runs).values())
    reference_loss = validation_loss(groups[0])
    first_loss = mean(run["first_loss"] for run in groups[0])
    differences = {}
    for group in others:
        relative = validation_loss(group) / reference_loss - 1
        passes = abs(relative) <= LIMIT  # NaN fails
        differences[group[0]["label"]] = {"relative_difference": relative, "within_limit": passes}
    return {
        "command": command,
        "reference": reference["label"],
        "reference_fell_by": 1 - reference_loss / first_loss,
        "limit": LIMIT,
        "differences": differences,
        "runs": runs,
    }


def markdown(summary: dict) -> str:
    """Returns the table: one column per optimizer, one row per measure, padded so that it reads well as text."""
    groups = by_label(summary["runs"])
    rows = [["", *groups]]

    def row(name, cell):
        rows.append([name, *(cell(group) for group in groups.values())])

    def loss(group):
        difference = summary["differences"].get(group[0]["label"])
        text = f"{validation_loss(group):.4f}"
        return text + (f" ({difference['relative_difference']:+.3%})" if difference else "")

    def megabytes(count):
        return f"{count / 1e6:.3f} MB" if count else "-"

    seeds = len(next(iter(groups.values())))
    row("optimizer state outside embeddings, bytes per parameter", lambda g: f"{bytes_per_parameter(g[0]):.2f}")
    for key, name in STATE_CLASSES.items():
        if any(run["state_bytes"].get(key) for run in summary["runs"]):
            row(name, lambda g, key=key: megabytes(g[0]["state_bytes"].get(key, 0)))
    if any("split" in label or "bfloat16" in label for label in groups):
        row("parameters", lambda g: megabytes(g[0]["parameter_bytes"]))
    row("state: total", lambda g: megabytes(sum(g[0]["state_bytes"].values())))
    row(f"validation loss, nats per token{f' (mean of {seeds} seeds)' if seeds > 1 else ''}", loss)
    row("first training loss", lambda g: f"{mean(run['first_loss'] for run in g):.4f}")
    row("memory of a compiled step", lambda g: f"{g[0]['step_bytes'] / 1e6:.1f} MB")
    row("median time per step", lambda g: f"{median(run['median_ms'] for run in g):.0f} ms")

    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        f"| {name:<{widths[0]}} | " + " | ".join(f"{c:>{w}}" for c, w in zip(cells, widths[1:])) + " |"
        for name, *cells in rows
    )


def bytes_per_parameter(run: dict) -> float:
    """Returns the bytes of state per parameter, embeddings and their state left out."""
    held = sum(run["state_bytes"].values()) - run["state_bytes"]["embeddings"]
    return held / (run["parameters"] - run["embedding_parameters"])


def verdict(summary: dict) -> str:
    """Returns the comparison in sentences."""
    reference = summary["reference"]
    lines = [f"The validation loss of {reference} ended {summary['reference_fell_by']:.0%} below its first loss."]
    for label, difference in summary["differences"].items():
        judged = "within" if difference["within_limit"] else "NOT within"
        relative = f"{difference['relative_difference']:+.3%}"
        lines.append(f"That of {label} differs by {relative}, {judged} the limit of {summary['limit']:.1%}.")
    return "\n".join(lines)


def plot(runs: list[dict], metrics: list[list[dict]], path: Path) -> None:
    """Draws loss curves and, for several groups, how far the validation loss of each is from the first group's."""
    from matplotlib.figure import Figure

    groups = [[metrics[runs.index(run)] for run in group] for group in by_label(runs).values()]
    compared = len(groups) > 1
    figure = Figure(figsize=(8, 6 if compared else 4.5), layout="constrained")
    curves = figure.add_subplot(4, 1, (1, 3)) if compared else figure.add_subplot()
    for i, (label, group) in enumerate(zip(by_label(runs), groups)):
        style = {"color": COLORS[i % len(COLORS)], "zorder": 3 + i}
        steps = [line["step"] for line in group[0]]
        losses = np.mean([[line["loss"] for line in lines] for lines in group], axis=0)
        curves.plot(steps, losses, color=style["color"], alpha=0.2, linewidth=0.8)
        curves.plot(steps, smooth(losses), label=f"{label}, training", linewidth=1.2 if i else 3.5, **style)
        curves.plot(*validation_points(group), label=f"{label}, validation", linestyle="", **marker(i), **style)
    reference = [line["loss"] for lines in groups[0] for line in lines]
    curves.set_ylim(min(reference) - 0.2, max(reference) + 0.2)  # a run that diverges leaves the plot
    curves.set_ylabel("loss, nats per token")
    seeds = f", mean of {len(groups[0])} seeds" if len(groups[0]) > 1 else ""
    curves.set_title(f"Language model with {runs[0]['parameters'] / 1e6:.1f} million parameters{seeds}")
    curves.legend(frameon=False, ncols=2)
    if compared:
        curves.tick_params(labelbottom=False)
        plot_differences(figure.add_subplot(4, 1, 4, sharex=curves), groups, next(iter(by_label(runs))))
    for axes in figure.axes:
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].set_xlabel("training step")
    figure.savefig(path, dpi=150)


def plot_differences(axes, groups: list[list[list[dict]]], reference: str) -> None:
    """Draws how far validation losses are from the first group's, in percent, and the limit as a gray band."""
    steps, losses = validation_points(groups[0])
    axes.axhspan(-100 * LIMIT, 100 * LIMIT, color="0.92", label=f"±{LIMIT:.1%}")
    axes.axhline(0, color=COLORS[0], linewidth=2)
    for i, group in enumerate(groups[1:], start=1):
        difference = 100 * (np.array(validation_points(group)[1]) / losses - 1)
        axes.plot(steps, difference, color=COLORS[i % len(COLORS)], **marker(i))
    axes.set_ylim(-250 * LIMIT, 250 * LIMIT)
    axes.set_ylabel(f"validation loss,\n% from {reference}")
    axes.legend(frameon=False, loc="upper right")


def marker(i: int) -> dict:
    """Returns the style of points. Those of the first group are larger, so that points on top of them leave a rim."""
    return {"marker": "os^D"[i % 4], "markersize": 5 if i else 9, "markeredgecolor": "white"}


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooths a curve: fits a straight line around each point, which is unbiased at both ends too."""
    steps = np.arange(len(values))
    distance = steps[None] - steps[:, None]
    bell = np.exp(-0.5 * (distance / SMOOTHED_OVER) ** 2)
    slope, spread = (bell * distance).sum(axis=1)[:, None], (bell * distance**2).sum(axis=1)[:, None]
    weights = bell * (spread - slope * distance)
    return weights @ values / weights.sum(axis=1)


def validation_points(runs: list[list[dict]]) -> tuple[list[int], list[float]]:
    """Returns the steps at which validation ran, and the mean losses over the runs."""
    points = {}
    for line in (line for run in runs for line in run if "validation_loss" in line):
        points.setdefault(line["step"], []).append(line["validation_loss"])
    return list(points), [mean(values) for values in points.values()]


def write(runs: list[dict], folder: Path, name: str, command: str) -> None:
    """Writes summary, table and plot of runs into `folder`, and prints the table."""
    summary = summarize(runs, command)
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown(summary) + "\n")
    metrics = [run_folder.read_metrics(folder / run["name"] / "metrics.jsonl") for run in runs]
    plot(runs, metrics, folder / f"{name}.png")
    print(f"\n{markdown(summary)}\n\n{verdict(summary)}")
    print(f"Plot, table and summary: {folder / name}.png, .md, .json")


def published(summary: dict) -> str:
    """Returns table, command and verdict for the documentation."""
    run = summary["runs"][0]
    where = f"{run['cores']} cores of {run['device']}, JAX {run['jax']}"
    return f"{markdown(summary)}\n\n`{summary['command']}`, on {where}. {verdict(summary)}"


def publish(comparison: Path, name: str) -> None:
    """Writes a comparison into the page that has its marks, and its plot and summary into examples/results/."""
    root = RESULTS.parents[1]
    marks = re.compile(rf"^(<!-- {name}: [^\n]*-->\n).*?^(<!-- /{name} -->)", re.DOTALL | re.MULTILINE)
    pages = [page for page in (root / "README.md", *root.glob("docs/**/*.md")) if marks.search(page.read_text())]
    if len(pages) != 1:
        sys.exit(f"One page must have the marks <!-- {name}: ... --> and <!-- /{name} -->, not {len(pages)}.")
    text = published(json.loads(comparison.read_text()))
    pages[0].write_text(marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", pages[0].read_text()))
    RESULTS.mkdir(exist_ok=True)
    for suffix in (".json", ".png"):
        target = (RESULTS / name).with_suffix(suffix)
        if comparison.with_suffix(suffix).resolve() != target.resolve():  # a published comparison may be rendered again
            shutil.copyfile(comparison.with_suffix(suffix), target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", nargs="?", type=Path, default=Path("runs/comparison.json"))
    parser.add_argument("--publish", metavar="NAME", help="language_model, linear or weights_trained")
    args = parser.parse_args()
    print(published(json.loads(args.comparison.read_text())))
    if args.publish:
        publish(args.comparison, args.publish)
