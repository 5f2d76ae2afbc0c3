"""Chooses the blocks of an array: the axis that they are inside of, and their size. Each block has one scale.

The choice depends on the global shape and on `shards`, the largest number of devices that any axis will ever be sharded
over. It never depends on a mesh. So a checkpoint opens on any mesh, and no block straddles two shards as long as the
promise of `shards` holds.

Among the axes that do not stack layers or experts, a non-minor axis is preferred, because it is free to split on TPU (a
bitcast under the tiled layout). Splitting the minor axis changes the layout.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

# A scale adds 4 / size bytes to each byte of code: 12.5% at 32, 1.6% at 256 (bitsandbytes' size).
SMALLEST, LARGEST = 32, 256
# An axis with more than so many times its length of elements behind it stacks layers or experts: in (128, 2880, 2880)
# each of the 128 experts has 64800 times as many. In an attention kernel (4096, 32, 128) a row has 4096 as well.
STACKED = 8


class Blocks(NamedTuple):
    """Blocks of `size` neighbors along `axis` of an array. The last block may be short.

    Always: 0 <= axis < ndim (0 for a scalar, which counts as one element); size >= 1.
    """

    axis: int
    size: int

    def count(self, shape: tuple[int, ...]) -> int:
        """Returns the number of blocks along the axis."""
        return -(-shape[self.axis] // self.size) if shape else 1

    def fit(self, axis: int, d: int, shards: int) -> bool:
        """Returns whether an axis of `d` elements divides into so many equal shards of full blocks."""
        return d % ((self.size if axis == self.axis else 1) * shards) == 0

    def absmax_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the scales: the array's, with the number of blocks along the axis; () for a scalar."""
        if not shape:
            return ()
        return (*shape[: self.axis], self.count(shape), *shape[self.axis + 1 :])


def power_of_two_part(d: int) -> int:
    """Returns the largest power of two that divides `d`; 0 for 0."""
    return d & -d


def choose_blocks(
    shape: tuple[int, ...],
    *,
    shards: int = 8,
    block_size: int | None = None,
    block_axis: int | None = None,
    along_rows: bool = False,
) -> Blocks:
    """Returns the blocks of an array of this global shape.

    Args:
        shape: The global shape.
        shards: The largest number of devices that any axis will ever be sharded over.
        block_size: Overrides the size. If longer than the axis, the axis is one block.
        block_axis: Overrides the axis. Vectors always use their only one.
        along_rows: True for an embedding table. Its rows differ in frequency and must not share a scale, so blocks are
            along the last axis.

    Raises:
        ValueError: `block_axis` is not an axis of the array.

    >>> choose_blocks((1024, 4096)), choose_blocks((1024, 4096), shards=1), choose_blocks((3, 3, 1, 512))
    (Blocks(axis=0, size=128), Blocks(axis=0, size=256), Blocks(axis=3, size=64))
    >>> choose_blocks((512, 2880, 2880))  # 512 experts do not share scales
    Blocks(axis=2, size=32)
    """
    if not shape:
        return Blocks(0, 1)
    axis = len(shape) - 1
    if len(shape) > 1:
        if block_axis is not None:
            if not -len(shape) <= block_axis < len(shape):
                raise ValueError(
                    f"`block_axis` {block_axis} is not an axis of an array of shape {shape}. Use -1 for the last."
                )
            axis = block_axis % len(shape)
        elif not along_rows:
            axis = _choose_axis(shape, shards)
    size = _choose_size(shape[axis], shards) if block_size is None else block_size
    return Blocks(axis, max(1, min(size, shape[axis])))


def _choose_axis(shape: tuple[int, ...], shards: int) -> int:
    splits = [power_of_two_part(d) for d in shape]
    last, enough, within = len(shape) - 1, SMALLEST * shards, _within_a_layer(shape)
    wide = [a for a in within if a < last and splits[a] >= enough]
    if wide:
        return max(wide, key=lambda a: (splits[a], a))
    if splits[last] >= enough:
        return last
    return max(within, key=lambda a: (splits[a], shape[a], a))


def _within_a_layer(shape: tuple[int, ...]) -> Sequence[int]:
    """Returns the axes that do not stack layers or experts and are long enough for a block.

    Layers and experts differ in the size of their gradients, so they share a scale only where no other axis will do.
    """
    long = [a for a, d in enumerate(shape) if d >= SMALLEST]
    within = [a for a in long if a >= len(shape) - 2 or prod(shape[a + 1 :]) <= STACKED * shape[a]]
    return within or long or range(len(shape))


def _choose_size(d: int, shards: int) -> int:
    split = power_of_two_part(d)
    return max(SMALLEST, min(split // shards, LARGEST)) if split >= SMALLEST else LARGEST
