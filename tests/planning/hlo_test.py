"""Collectives read from HLO text: groups, loops, fused reduce-scatters."""

from argenseg_jax.planning.hlo import Collective, collectives, reduced_whole

TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[64,16]) -> bf16[8,16] {
  %input = bf16[64,16]{1,0} parameter(0)
  %all-reduce.7 = bf16[64,16]{1,0} all-reduce(%input), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = bf16[8,16]{1,0} dynamic-slice(%all-reduce.7, %i, %z)
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %gather = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%w), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %done = bf16[64,16]{1,0} all-gather-done(%gather)
  %fused = bf16[8,16]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (arg: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %loop = (s32[], bf16[8,16]) while(%init), condition=%condition, body=%body
  %known = (s32[], bf16[8,16]) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %scattered = f32[2,16]{1,0} reduce-scatter(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %alone = f32[4]{0} all-reduce(%g), replica_groups={{0},{1}}, to_apply=%add
  ROOT %sums = (f32[4]{0}, f32[2]{0}) all-reduce(%a, %b), replica_groups={{0,4}}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_of_a_program():
  everyone = tuple(range(8))
  found = sorted(collectives(TEXT))
  assert found == [
    Collective("all-gather", ((64, 16),), 2048, (0, 2, 4, 6), 8),
    Collective("all-reduce", ((4,), (2,)), 24, (0, 4), 1),
    Collective("reduce-scatter", ((8, 16),), 512, (0, 1, 2, 3), 1),
    Collective("reduce-scatter", ((64, 16),), 2048, everyone, 8),
  ]
  gather, reduce, scatter, _ = found
  assert gather.sent == 2048 * 3 / 4 * 8
  assert reduce.sent == 24 / 2 * 2
  assert scatter.sent == 512 * 3 / 4


OVERLAPPED = """HloModule jit_step

%start (input: bf16[8,16]) -> bf16[64,16] {
  ROOT %all-gather.1 = bf16[64,16]{1,0} all-gather(%input), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%meanwhile (input: bf16[8,16]) -> bf16[64,16] {
  ROOT %all-gather.2 = bf16[64,16]{1,0} all-gather(%input), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%next (input: bf16[8,16]) -> bf16[64,16] {
  ROOT %all-gather.3 = bf16[64,16]{1,0} all-gather(%input), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="8"}
}

ENTRY %main (p: bf16[8,16]) -> bf16[64,16] {
  %a = bf16[64,16]{1,0} fusion(%p), kind=kCustom, calls=%start
  %b = bf16[64,16]{1,0} fusion(%a), kind=kCustom, calls=%meanwhile
  %c = bf16[64,16]{1,0} fusion(%b), kind=kCustom, calls=%next
  ROOT %sum = f32[4]{0} all-reduce(%c), replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}, to_apply=%add
}
"""  # noqa: E501


def test_a_gather_that_overlaps_with_several_fusions_counts_once():
  gathers = [c for c in collectives(OVERLAPPED) if c.kind == "all-gather"]
  assert gathers == 2 * [
    Collective("all-gather", ((64, 16),), 2048, (0, 1, 2, 3), 1)
  ]


def test_groups_named_by_mesh_axes():
  (reduce,) = [c for c in collectives(OVERLAPPED) if c.kind == "all-reduce"]
  assert reduce.group == (0, 1, 4, 5)


STARTED = """HloModule jit_step

ENTRY %main (p: bf16[64,16]) -> bf16[8,16] {
  %start = ((bf16[64,16]{1,0}, f32[16]{0}), (bf16[8,16]{1,0}, f32[2]{0})) reduce-scatter-start(%p, %q), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  ROOT %done = (bf16[8,16]{1,0}, f32[2]{0}) reduce-scatter-done(%start)
}
"""  # noqa: E501


def test_a_started_scatter_is_as_large_as_what_it_scatters():
  (found,) = collectives(STARTED)
  size = 64 * 16 * 2 + 16 * 4
  everyone = tuple(range(8))
  assert found == Collective(
    "reduce-scatter", ((64, 16), (16,)), size, everyone, 1
  )


COMBINED = """HloModule jit_step

ENTRY %main (p: f32[64,16]) -> f32[64,16] {
  ROOT %sums = (f32[16]{0}, f32[8,32,2]{1,2,0}, f32[64,16]{1,0}, f32[8,6,2]{2,1,0}) all-reduce(%a, %b, %c, %d), replica_groups=[1,8]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_each_array_of_a_combined_sum_is_told():
  """A [32, 16] scattered along its second dimension is [8, 32, 2]."""
  found = collectives(COMBINED)
  split = {(16, 32), (16, 64)}
  whole = reduced_whole(found, split, parts=8)
  assert whole == [(8, 32, 2), (64, 16)]
  assert reduced_whole(found, split, parts=4) == [(64, 16)]
  assert reduced_whole(found, split, parts=8, smallest=1024) == [(64, 16)]
  assert reduced_whole(found, split, parts=1) == []  # Nothing is split.
