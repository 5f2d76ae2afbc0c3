"""Pictures of the 8-bit number format for docs/format.md, drawn from what `fse.ops` computes.

`python -m benchmarks readme` draws them.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.codecs import CODECS, table

from ..harness import report

FOLDER = report.ROOT / "docs" / "images"
COLOURS = {"root": "#0072B2", "dynamic": "#D55E00", "linear": "#009E73"}  # Okabe and Ito: told apart by everyone
MAGNITUDES = np.logspace(-7, 0, 20_000, dtype=np.float32)  # of numbers whose block has a largest one of 1
KINDS = {True: "signed, first moments", False: "unsigned, second moments"}


def magnitudes(codec: str, signed: bool) -> np.ndarray:
    """The magnitudes that a codec can write, above zero, in rising order."""
    values = table(codec, signed)
    return np.sort(values[values > 0])


def relative_errors(codec: Any, signed: bool) -> np.ndarray:
    """|x' - x| / x for each of `MAGNITUDES`, each in a block whose largest number is 1."""
    x = jnp.stack([jnp.asarray(MAGNITUDES), jnp.ones(len(MAGNITUDES))], axis=1)
    codes, absmax = fse.ops.quantize(x, signed=signed, codec=codec, block_size=2)
    back = fse.ops.dequantize(codes, absmax, signed=signed, codec=codec, block_size=2)[:, 0]
    return np.abs(np.asarray(back, np.float64) - MAGNITUDES) / MAGNITUDES


def largest(errors: np.ndarray, bins: int = 80) -> np.ndarray:
    """The largest error in each of `bins` stretches of equal width in the logarithm."""
    return errors.reshape(bins, -1).max(axis=1)


def draw_codes() -> Any:
    """The values of all codes above zero, on a logarithmic axis."""
    figure, axes = _figure(2, (8, 3.4))
    for ax, signed in zip(axes, KINDS):
        for codec, colour in COLOURS.items():
            values = magnitudes(codec, signed)
            ax.semilogy(np.arange(1, len(values) + 1), values, ".", markersize=3, color=colour, label=codec)
        ax.set_title(KINDS[signed], fontsize=10)
        ax.set_xlabel("code, counted from zero")
    axes[0].set_ylabel("value, of the block's largest")
    axes[0].legend(frameon=False, markerscale=3)
    return figure


def draw_errors() -> Any:
    """The largest relative error at each magnitude."""
    figure, axes = _figure(2, (8, 3.4))
    for ax, signed in zip(axes, KINDS):
        for codec, colour in COLOURS.items():
            errors = largest(relative_errors(codec, signed))
            middle = np.sqrt(MAGNITUDES.reshape(len(errors), -1)[:, [0, -1]].prod(axis=1))
            ax.loglog(middle, 100 * errors, color=colour, label=codec)
        ax.set_title(KINDS[signed], fontsize=10)
        ax.set_xlabel("number, of the block's largest")
    axes[0].set_ylabel("largest error, percent of the number")
    axes[0].legend(frameon=False)
    return figure


def draw_blocks() -> Any:
    """A moment of heavy tails beside what stands for it: codes of its own shape, and a scale for each block."""
    rows, columns = shape = (256, 24)
    rng = np.random.default_rng(0)
    moment = rng.standard_t(3, shape) * rng.lognormal(0, 1.5, (1, columns)) * np.logspace(-1, 1, rows)[:, None]
    blocks = fse.StateFormat().blocks("kernel", shape)
    codes, absmax = fse.ops.quantize(jnp.asarray(moment), signed=True, block_size=blocks.size, axis=blocks.axis)
    figure, axes = _figure(3, (8, 4.2))
    shown = (
        (f"a moment, {rows} x {columns}, fp32", np.log10(np.abs(moment) + 1e-6), "viridis"),
        ("codes: a byte each", np.asarray(codes), "RdBu"),
        (f"absmax: {absmax.shape[0]} x {absmax.shape[1]}, fp32", np.log10(np.asarray(absmax)), "viridis"),
    )
    for ax, (title, picture, colours) in zip(axes, shown):
        image = ax.imshow(picture, aspect="auto", cmap=colours, interpolation="nearest", extent=(0, columns, rows, 0))
        figure.colorbar(image, ax=ax, location="bottom", shrink=0.9, label="code" if "byte" in title else "log10")
        ax.set_title(title, fontsize=10)
        for edge in range(blocks.size, rows, blocks.size):
            ax.axhline(edge, color="white", linewidth=1.5)
        ax.set_xticks([])
        ax.set_yticks(range(0, rows + 1, blocks.size) if ax is axes[0] else [])
    axes[0].set_ylabel(f"blocks of {blocks.size} down each column")
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


PICTURES = {"codes.png": draw_codes, "errors.png": draw_errors, "blocks.png": draw_blocks}


def draw(folder: Path = FOLDER) -> None:
    """Writes all of them."""
    assert set(COLOURS) == set(CODECS)
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        make().savefig(folder / name, dpi=130)
