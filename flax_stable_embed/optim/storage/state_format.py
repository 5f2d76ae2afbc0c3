"""Defines `StateFormat`: the codec, the rounding and the blocks of 8-bit moments."""

from dataclasses import dataclass
from typing import Literal

from ...ops.blockwise.blocks import Blocks, choose_blocks
from ...ops.blockwise.quantize import check_block_size, check_codec
from ..arguments import is_int
from .defaults import EMBEDDING


@dataclass(frozen=True)
class StateFormat:
    """Says how 8-bit moments are stored: an 8-bit code per element, and a float32 scale per block of elements.

    It is frozen and static, so that `optax.inject_hyperparams` does not trace it.

    Args:
        codec: The map between codes and numbers: "root" (the default), "dynamic" (the map of bitsandbytes) or "linear".
            `ops/blockwise/README.md` compares their errors.
        rounding: If a step changes a moment by less than the distance between two codes, rounding to nearest discards
            the change. "dither" and "stochastic" round up or down, so that changes are kept on average.
            None: slow moments are dithered, the others rounded to nearest.
            "dither", "stochastic": all second moments and all slow moments, the others to nearest.
            "nearest": all moments.
            Slow moments are second moments with a decay of at least 0.99, other moments with at least 0.999 (AdEMAMix'
            slow average), and sums (Adagrad). If a decay is not a Python number, second moments count as slow.
        block_size: The number of elements that share a scale. None chooses 32 to 256 for each parameter, such that no
            block is split by `shards` shards.
        block_axis: The axis along which elements share a scale. None chooses an axis for each parameter. Vectors always
            use their only axis.
        shards: The largest number of devices over which one axis of a parameter will ever be sharded. It determines the
            shapes in the state, so choose it for all meshes that will ever load a checkpoint of the run.
        min_size: Parameters with fewer elements keep float32 moments, and so do those with fewer than 32 elements along
            the blocked axis. 0 switches both limits off.

    Raises:
        ValueError: The codec or the rounding is unknown, or a number is out of its range.

    >>> StateFormat(codec="dynamic", block_size=256, block_axis=-1)  # the blocks and the map of bitsandbytes
    StateFormat(codec='dynamic', rounding=None, block_size=256, block_axis=-1, shards=8, min_size=4096)
    """

    codec: Literal["root", "dynamic", "linear"] = "root"
    rounding: Literal["nearest", "dither", "stochastic"] | None = None
    block_size: int | None = None
    block_axis: int | None = None
    shards: int = 8
    min_size: int = 4096

    def __post_init__(self):
        check_codec(self.codec)
        if self.rounding not in (None, "nearest", "dither", "stochastic"):
            raise ValueError(
                f"`rounding` must be None, 'nearest', 'dither' or 'stochastic', got {self.rounding!r}. None selects it "
                "by the decay of each moment."
            )
        if self.block_size is not None:
            check_block_size(self.block_size)
            object.__setattr__(self, "block_size", int(self.block_size))
        if self.block_axis is not None and not is_int(self.block_axis):
            raise ValueError(
                f"`block_axis` must be an integer or None, got {self.block_axis!r}. Use -1 for the last axis."
            )
        if not is_int(self.shards) or self.shards < 1:
            raise ValueError(f"`shards` must be an integer of at least 1, got {self.shards!r}. The default is 8.")
        if not is_int(self.min_size) or self.min_size < 0:
            raise ValueError(
                f"`min_size` must be an integer of at least 0, got {self.min_size!r}. The default is 4096."
            )
        for name in ("block_axis", "shards", "min_size"):  # from NumPy's integers to Python's
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))

    def blocks(self, path: str, shape: tuple[int, ...], stacked: tuple[int, ...] = ()) -> Blocks:
        """Returns the blocks of a parameter. Rows of embedding tables do not share scales: their frequencies differ.

        Args:
            path: The parameter's path.
            shape: Its global shape.
            stacked: The axes that stack independent parameters. The others decide.
        """
        within = [axis for axis in range(len(shape)) if axis not in stacked]
        try:
            blocks = choose_blocks(
                tuple(shape[axis] for axis in within),
                shards=self.shards,
                block_size=self.block_size,
                block_axis=self.block_axis,
                along_rows=bool(EMBEDDING.search(path)),
            )
        except ValueError as error:
            raise ValueError(f"Parameter {path!r}: {error}") from None
        return blocks._replace(axis=within[blocks.axis]) if within else Blocks(0, 1)
