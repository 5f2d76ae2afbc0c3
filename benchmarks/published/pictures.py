"""Draws the pictures of docs/images: the README's first screen, and the 8-bit number format for docs/format.md.

`python -m benchmarks readme` draws them. The first screen shows the files of results; the format is computed by
`fse.ops`.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import jax.numpy as jnp
import numpy as np

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.codecs import CODECS, table

from ..counted import state
from ..harness import report

FOLDER = report.ROOT / "docs" / "images"
COLORS = {"root": "#0072B2", "dynamic": "#D55E00", "linear": "#009E73"}  # Okabe and Ito: told apart by everyone
MAGNITUDES = np.logspace(-7, 0, 20_000, dtype=np.float32)  # of numbers in a block whose largest number is 1
KINDS = {True: "signed, first moments", False: "unsigned, second moments"}


# --- the README's first screen ---------------------------------------------------------------------------------------

TRAINED = report.ROOT / "examples" / "results" / "language_model.json"
MODEL = "Llama 2 7B"
FP32, IN_8_BITS = "#E69F00", "#2E86D1"  # Okabe and Ito's orange, and a blue that is clear on white and on black
INK = "#7D8590"  # text and axes, as legible on white as on black
ON_BARS = {FP32: "black", IN_8_BITS: "white"}


def loss_curves() -> dict[str, tuple[list[int], list[float]]]:
    """Returns steps and training losses by optimizer, as means over the runs of the example that have a curve."""
    curves: dict[str, list[dict[str, list]]] = {}
    for run in json.loads(TRAINED.read_text())["runs"]:
        if "curve" in run:
            curves.setdefault(run["optimizer"], []).append(run["curve"])
    return {
        name: (runs[0]["steps"], [mean(losses) for losses in zip(*(run["loss"] for run in runs))])
        for name, runs in curves.items()
    }


def draw_first_screen() -> Any:
    """Draws the bytes of optimizer state per parameter, and two training curves that coincide, without background."""
    from matplotlib.figure import Figure

    style = {"fontsize": 11, "color": INK}
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    model = json.loads(state.FILE.read_text())["models"][MODEL]
    for at, (name, color) in enumerate(((state.ADAMW, FP32), (state.ADAMW8BIT, IN_8_BITS))):
        total = model["state"][name]["total"]
        bar = total / model["parameters"]
        left.barh(at, bar, color=color, height=0.55)
        left.text(bar + 0.15, at, f"{bar:.2f}", va="center", fontsize=15, fontweight="bold", color=color)
        left.text(0, at - 0.36, name, va="bottom", family="monospace", **style)
        left.text(bar - 0.12, at, state.gigabytes(total), va="center", ha="right", fontsize=10, color=ON_BARS[color])
    left.set_xlim(0, 9.6)
    left.set_ylim(1.4, -0.75)
    left.set_axis_off()
    left.set_title(f"Optimizer state of {MODEL},\nbytes per parameter", loc="left", **style)
    curves = loss_curves()  # the first one is wide, so that the second one on top leaves a rim
    right.plot(*curves["adamw"], color=FP32, linewidth=6, label=state.ADAMW)
    right.plot(*curves["adamw8bit"], color=IN_8_BITS, linewidth=2, label=state.ADAMW8BIT)
    right.set_title("Training loss of a language model,\nnats per token", loc="left", **style)
    right.set_xlabel("training step", fontsize=10, color=INK)
    right.legend(frameon=False, labelcolor=INK, prop={"family": "monospace", "size": 11})
    right.tick_params(colors=INK, labelsize=10)
    right.spines[["top", "right"]].set_visible(False)
    right.spines[["bottom", "left"]].set_color(INK)
    return figure


# --- the 8-bit format ------------------------------------------------------------------------------------------------


def magnitudes(codec: str, signed: bool) -> np.ndarray:
    """Returns the magnitudes above zero that a codec can store, in rising order."""
    values = table(codec, signed)
    return np.sort(values[values > 0])


def relative_errors(codec: Any, signed: bool) -> np.ndarray:
    """Returns |x' - x| / x for each of `MAGNITUDES`, each in a block whose largest number is 1."""
    x = jnp.stack([jnp.asarray(MAGNITUDES), jnp.ones(len(MAGNITUDES))], axis=1)
    codes, absmax = fse.ops.quantize(x, signed=signed, codec=codec, block_size=2)
    back = fse.ops.dequantize(codes, absmax, signed=signed, codec=codec, block_size=2)[:, 0]
    return np.abs(np.asarray(back, np.float64) - MAGNITUDES) / MAGNITUDES


def largest(errors: np.ndarray, bins: int = 80) -> np.ndarray:
    """Returns the largest error in each of `bins` intervals of equal width on a logarithmic axis."""
    return errors.reshape(bins, -1).max(axis=1)


def draw_codes() -> Any:
    """Draws the values of all codes above zero, on a logarithmic axis."""
    figure, axes = _figure(2, (8, 3.4))
    for ax, signed in zip(axes, KINDS):
        for codec, color in COLORS.items():
            values = magnitudes(codec, signed)
            ax.semilogy(np.arange(1, len(values) + 1), values, ".", markersize=3, color=color, label=codec)
        ax.set_title(KINDS[signed], fontsize=10)
        ax.set_xlabel("code, counted from zero")
    axes[0].set_ylabel("value, relative to the block's largest")
    axes[0].legend(frameon=False, markerscale=3)
    return figure


def draw_errors() -> Any:
    """Draws the largest relative error at each magnitude."""
    figure, axes = _figure(2, (8, 3.4))
    for ax, signed in zip(axes, KINDS):
        for codec, color in COLORS.items():
            errors = largest(relative_errors(codec, signed))
            middle = np.sqrt(MAGNITUDES.reshape(len(errors), -1)[:, [0, -1]].prod(axis=1))
            ax.loglog(middle, 100 * errors, color=color, label=codec)
        ax.set_title(KINDS[signed], fontsize=10)
        ax.set_xlabel("number, relative to the block's largest")
    axes[0].set_ylabel("largest error, percent of the number")
    axes[0].legend(frameon=False)
    return figure


def draw_blocks() -> Any:
    """Draws a moment with heavy tails and the arrays that store it: codes of the same shape, and a scale per block."""
    rows, columns = shape = (256, 24)
    rng = np.random.default_rng(0)
    moment = rng.standard_t(3, shape) * rng.lognormal(0, 1.5, (1, columns)) * np.logspace(-1, 1, rows)[:, None]
    blocks = fse.StateFormat().blocks("kernel", shape)
    codes, absmax = fse.ops.quantize(jnp.asarray(moment), signed=True, block_size=blocks.size, axis=blocks.axis)
    figure, axes = _figure(3, (8, 4.2))
    shown = (
        (f"a moment, {rows} x {columns}, fp32", np.log10(np.abs(moment) + 1e-6), "viridis"),
        ("codes: one byte each", np.asarray(codes), "RdBu"),
        (f"absmax: {absmax.shape[0]} x {absmax.shape[1]}, fp32", np.log10(np.asarray(absmax)), "viridis"),
    )
    for ax, (title, picture, colors) in zip(axes, shown):
        image = ax.imshow(picture, aspect="auto", cmap=colors, interpolation="nearest", extent=(0, columns, rows, 0))
        figure.colorbar(image, ax=ax, location="bottom", shrink=0.9, label="code" if "byte" in title else "log10")
        ax.set_title(title, fontsize=10)
        for edge in range(blocks.size, rows, blocks.size):
            ax.axhline(edge, color="white", linewidth=1.5)
        ax.set_xticks([])
        ax.set_yticks(range(0, rows + 1, blocks.size) if ax is axes[0] else [])
    axes[0].set_ylabel(f"blocks of {blocks.size} along each column")
    return figure


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, sharey=columns == 2)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        if columns == 2:
            ax.grid(color="0.9", linewidth=0.6)
    return figure, axes


FORMAT = {"codes.png": draw_codes, "errors.png": draw_errors, "blocks.png": draw_blocks}
PICTURES = {"first_screen.png": draw_first_screen} | FORMAT


def draw(folder: Path = FOLDER) -> list[Path]:
    """Writes all of them and returns their paths."""
    assert set(COLORS) == set(CODECS)
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        first = name not in FORMAT
        make().savefig(folder / name, dpi=200 if first else 130, transparent=first)
    return [folder / name for name in PICTURES]
