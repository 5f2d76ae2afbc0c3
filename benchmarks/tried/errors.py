"""Measures the error of a round trip through 8 bits: quantize, dequantize, compare, for every codec and block size.

Signed data stands for a first moment, its squares for a second moment. There are two errors, both relative. The root
mean square error over the root mean square of the data depends on the largest elements. The median of |x' - x| / |x|
over all elements shows the small ones.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.codecs import CODECS

from ..harness import report

BLOCK_SIZES = (32, 64, 128, 256)
SIZE = 1 << 18  # elements; another seed moves the figures of `normal` by less than 1%
DATA = {
    "normal": lambda rng: rng.standard_normal(SIZE),
    "lognormal, sigma 2": lambda rng: rng.choice([-1.0, 1.0], SIZE) * rng.lognormal(0.0, 2.0, SIZE),
    "Student t, 3 degrees": lambda rng: rng.standard_t(3, SIZE),
}


def measure() -> list[dict[str, Any]]:
    """Returns one row per kind of data, sign and codec, with a pair of errors per block size."""
    rows = []
    for name, draw in DATA.items():
        x = draw(np.random.default_rng(0)).astype(np.float32)
        for signed, data in ((True, x), (False, x**2)):
            for codec in CODECS:
                errors = {str(b): _round_trip(data, signed, codec, b) for b in BLOCK_SIZES}
                rows.append({"data": name, "signed": signed, "codec": codec, "errors": errors})
    return rows


def _round_trip(x: np.ndarray, signed: bool, codec: Any, block_size: int) -> list[float]:
    codes, absmax = fse.ops.quantize(jnp.asarray(x), signed=signed, codec=codec, block_size=block_size)
    back = fse.ops.dequantize(codes, absmax, signed=signed, codec=codec, block_size=block_size)
    error, data = np.abs(np.asarray(back, np.float64) - x), np.abs(x.astype(np.float64))
    return [float(np.sqrt(np.mean(error**2) / np.mean(data**2))), float(np.median(error / data))]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the table. Errors are percent: root mean square / median."""
    head = ["data", "moment", "codec", *(f"blocks of {b}" for b in BLOCK_SIZES)]
    lines = [head, ["---"] * 3 + ["--:"] * len(BLOCK_SIZES)]
    for row in rows:
        cells = [f"{100 * rms:.3g} / {100 * median:.3g}" for rms, median in row["errors"].values()]
        data = row["data"] if row["signed"] else f"{row['data']}, squared"
        lines.append([data, "signed" if row["signed"] else "unsigned", f"`{row['codec']}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> None:
    """Measures and prints. The errors in the documentation come with the results of `steps`."""
    report.parser("errors", __doc__).parse_args(arguments)
    print(markdown(measure()))
