"""Tests how collectives are counted in the text of a compiled program."""

from benchmarks.counted.collectives import Moved, collectives, counted

TEXT = """
%fused_1 (p: bf16[64,32]) -> bf16[64,32] {
  %all-gather.1 = bf16[1024,32]{1,0:T(8,128)} all-gather(%p), channel_id=7, metadata={op_name="params['head']"}
}
%fused_2 (p: bf16[64,32]) -> bf16[64,32] {
  ROOT %all-gather.2 = bf16[1024,32]{1,0:T(8,128)} all-gather(%p), channel_id=7, metadata={op_name="params['head']"}
}
ENTRY %main {
  %all-reduce.4 = (f32[16]{0}, /*index=1*/f32[4,2]{1,0:T(8,128)S(1)}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %max = f32[8,32]{1,0} all-reduce(%c), channel_id=2, metadata={op_name="jit(step)/optimizer/reduce_max"}
  %gather = f32[8,32]{1,0} all-gather(%c), channel_id=3, metadata={op_name="state[0].mu_absmax['up']['kernel']"}
  %permute = (bf16[8,96]{1,0}, bf16[8,96]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d), channel_id=1
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%e), channel_id=9
  %done = f32[16]{0} all-gather-done(%start)
}
"""


def test_each_collective_counts_once_with_all_its_arrays():
    found = collectives(TEXT)
    assert found == [
        Moved("all-gather", (2 * 1024 * 32,), False),
        Moved("all-reduce", (4 * 16, 4 * 8), False),
        Moved("all-reduce", (4 * 8 * 32,), True),
        Moved("all-gather", (4 * 8 * 32,), True),
        Moved("collective-permute", (2 * 8 * 96,), False),
        Moved("all-gather", (4 * 16,), False),
    ]
    assert counted(found[1:3]) == {"arrays": {"all-reduce": 3}, "bytes": 4 * 24 + 4 * 256}


def test_a_program_on_one_device_has_none():
    assert collectives("ENTRY %main {\n  %x = f32[4]{0} add(%a, %b)\n}\n") == []
