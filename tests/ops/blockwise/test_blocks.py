"""Tests the axis and the size of blocks for unusual shapes."""

import re
from ast import literal_eval
from math import prod
from pathlib import Path

import pytest

from flax_stable_embed.ops.blockwise import blocks
from flax_stable_embed.ops.blockwise.blocks import Blocks, choose_blocks

AWKWARD = {
    # shape: (axis, size) with shards=8, with shards=1
    (16, 4096): ((1, 256), (1, 256)),
    (3, 3, 1, 512): ((3, 64), (3, 256)),
    (7, 7, 3, 64): ((3, 32), (3, 64)),
    (4096, 16): ((0, 256), (0, 256)),
    (12, 1024, 4096): ((1, 128), (1, 256)),
    (50257, 768): ((1, 32), (1, 256)),
    (768, 50257): ((0, 32), (0, 256)),
    (4096, 11008): ((0, 256), (0, 256)),
    (1024, 1024): ((0, 128), (0, 256)),
    (2048, 256, 2048): ((1, 32), (1, 256)),  # 2048 experts
    (3, 3, 512, 512): ((2, 64), (2, 256)),
    (512, 512, 3, 3): ((1, 64), (1, 256)),  # the kernel of a convolution as torch stores it
    (2880, 64, 64): ((0, 32), (1, 64)),
    (64, 30, 30): ((0, 32), (0, 64)),  # no other axis is long enough
    (40, 33): ((0, 40), (0, 40)),  # no axis has a factor of 32, so the larger power of two is used
    (50257,): ((0, 256), (0, 256)),
    (768,): ((0, 32), (0, 256)),
    (5,): ((0, 5), (0, 5)),
    (2, 2, 2): ((2, 2), (2, 2)),
}


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_axis_and_size_follow_from_shape_and_shards(shape):
    eight, one = AWKWARD[shape]
    assert choose_blocks(shape) == Blocks(*eight)
    assert choose_blocks(shape, shards=1) == Blocks(*one)


def test_the_table_of_the_docs_is_true():
    page = (Path(blocks.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| `(\(.*\))` \| .* \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) >= 10
    assert {shape: Blocks(int(axis), int(size)) for shape, axis, size in rows} == {
        shape: choose_blocks(literal_eval(shape)) for shape, *_ in rows
    }


@pytest.mark.parametrize("shards", [1, 8, 16])
@pytest.mark.parametrize("stack", [(128,), (36, 128), (512,), (256,), (8, 7)], ids=str)
@pytest.mark.parametrize("layer", [(2880, 2880), (7168, 2048), (96, 200), (1600, 25, 64), (128, 4096)], ids=str)
def test_layers_and_experts_do_not_share_scales(stack, layer, shards):
    assert choose_blocks((*stack, *layer), shards=shards).axis >= len(stack)


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize("shards", [1, 2, 8, 16])
def test_no_block_straddles_two_of_the_promised_shards(shape, shards):
    axis, size = choose_blocks(shape, shards=shards)
    d = shape[axis]
    for ways in range(1, shards + 1):
        if (d & -d) >= 32 * shards and d % ways == 0:
            assert (d // ways) % size == 0


def test_scalars_and_empty_arrays_have_blocks():
    assert choose_blocks(()).absmax_shape(()) == ()
    assert choose_blocks((0, 5)).absmax_shape((0, 5)) == (0, 1)
    assert choose_blocks((64, 0)).absmax_shape((64, 0)) in {(1, 0), (2, 0)}


def test_vectors_and_embedding_tables_have_blocks_along_their_rows():
    assert choose_blocks((4096, 1024), along_rows=True).axis == 1
    assert choose_blocks((4096,), block_axis=-2).axis == 0


def test_size_and_axis_of_blocks_can_be_set():
    assert choose_blocks((512, 512), block_size=256, block_axis=-1) == Blocks(1, 256)
    assert choose_blocks((512, 100), block_size=256, block_axis=1) == Blocks(1, 100)
    with pytest.raises(ValueError, match=r"`block_axis` 2 is not an axis of an array of shape \(4, 4\)"):
        choose_blocks((4, 4), block_axis=2)


def bytes_per_parameter(shape, blocks):
    """Returns the bytes of two moments: one per code, and four per scale."""
    return 2 * (prod(shape) + 4 * prod(blocks.absmax_shape(shape))) / prod(shape)


def test_bytes_per_parameter_count_codes_and_scales():
    assert bytes_per_parameter((4096, 4096), Blocks(0, 256)) == 2.03125
    assert bytes_per_parameter((64, 64), Blocks(0, 32)) == 2.25
