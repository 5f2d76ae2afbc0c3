"""StateFormat: codec, rounding and blocks."""

from dataclasses import dataclass
from typing import Literal

from ...ops.blockwise.blocks import Blocks, choose_blocks
from ...ops.blockwise.quantize import check_block_size, check_codec
from ..arguments import is_int
from .defaults import EMBEDDING


@dataclass(frozen=True)
class StateFormat:
    """How 8-bit moments are stored. Frozen and static, so that `optax.inject_hyperparams` leaves it alone.

    Args:
        codec: "root" (default), "dynamic" (bitsandbytes' map) or "linear"; see `ops/blockwise/README.md`.
        rounding: "nearest", or "stochastic" for second moments and AdEMAMix's slow mean: they then stay right in the
            mean where what a step changes is less than from one code to the next.
        block_size: elements that share a scale; None chooses 32 to 256 per parameter, and no block straddles shards.
        block_axis: the axis that blocks lie in; None chooses per parameter. Vectors always use their only one.
        shards: the most ways that any axis of a parameter will ever be cut. Fixes the state's shapes, so it is a
            promise about every mesh that will open the checkpoint, not about this one.
        min_size: parameters with fewer elements, or a blocked axis shorter than 32, keep fp32 moments; 0 switches both
            rules off.

    Raises:
        ValueError: an unknown codec or rounding, or a number that cannot be.

    >>> StateFormat(codec="dynamic", block_size=256, block_axis=-1)  # the blocks and the map of bitsandbytes
    StateFormat(codec='dynamic', rounding='nearest', block_size=256, block_axis=-1, shards=8, min_size=4096)
    """

    codec: Literal["root", "dynamic", "linear"] = "root"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    block_size: int | None = None
    block_axis: int | None = None
    shards: int = 8
    min_size: int = 4096

    def __post_init__(self):
        check_codec(self.codec)
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {self.rounding!r}.")
        if self.block_size is not None:
            check_block_size(self.block_size)
            object.__setattr__(self, "block_size", int(self.block_size))
        if self.block_axis is not None and not is_int(self.block_axis):
            raise ValueError(f"`block_axis` must be an integer or None, got {self.block_axis!r}; try -1.")
        if not is_int(self.shards) or self.shards < 1:
            raise ValueError(f"`shards` must be an integer of at least 1, got {self.shards!r}; the default is 8.")
        if not is_int(self.min_size) or self.min_size < 0:
            raise ValueError(
                f"`min_size` must be an integer of at least 0, got {self.min_size!r}; the default is 4096."
            )
        for name in ("block_axis", "shards", "min_size"):  # numpy's integers are other numbers in a state's format
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))

    def blocks(self, path: str, shape: tuple[int, ...]) -> Blocks:
        """The blocks of a parameter. Rows of an embedding table differ in frequency and do not share scales."""
        try:
            return choose_blocks(
                shape,
                shards=self.shards,
                block_size=self.block_size,
                block_axis=self.block_axis,
                along_rows=bool(EMBEDDING.search(path)),
            )
        except ValueError as error:
            raise ValueError(f"parameter {path!r}: {error}") from None
