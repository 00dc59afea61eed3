"""Each device holds, runs and sends what the sharding says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.analysis import sharded
from moe_jax.analysis.sharded import Traffic
from moe_jax.partitioning import MeshOptions


def test_two_copies_of_four_experts_on_eight_devices():
  mesh = MeshOptions(data=2, expert=4).make()
  kernel_sharding = NamedSharding(mesh, PartitionSpec(None, 'expert'))
  kernels = jax.ShapeDtypeStruct((3, 4, 5), 'float32', sharding=kernel_sharding)
  devices, holds = sharded.holders(kernels, 1)
  assert [device.id for device in devices] == list(range(8))
  np.testing.assert_array_equal(holds, np.tile(np.eye(4, dtype=bool), (2, 1)))
  # No device lacks anything of the dimensions that are not split.
  assert sharded.holders(kernels, 0)[1].all()


# A program of four devices. It has a loop of 5 rounds whose trip count the
# compiler annotates, and in it a loop of 3 rounds whose end only its condition
# tells, as TPUs write it.
LOOPS = """HloModule jit_step, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0:T(256)} get-tuple-element(%p), index=1
  %moved = (f32[8]{0:T(256)}, f32[8]{0:T(256)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[8]{0:T(256)} collective-permute-done(%moved)
  ROOT %out = (s32[], f32[8]) tuple(%i, %done)
}

%inner_cond (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]) parameter(0)
  %end = s32[] constant(4)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}

%all-reduce-scatter.1 (r: f32[8]) -> f32[4] {
  %r = f32[8] parameter(0)
  %whole = f32[8] all-reduce(%r), replica_groups=mesh['x'=2,'y'=2] {'y'}, to_apply=%add
  ROOT %part = f32[4] dynamic-slice(%whole), dynamic_slice_sizes={4}
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]) parameter(0)
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %y = f32[8] get-tuple-element(%s), index=1
  %both = f32[8] all-reduce(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %given = (s32[], f32[8]) tuple(%start, %both)
  ROOT %loop = (s32[], f32[8]) while(%given), condition=%inner_cond, body=%inner_body
}

%cond (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (u: f32[8], k: s32[]) -> f32[32] {
  %u = f32[8] parameter(0)
  %k = s32[] parameter(1)
  %first = (s32[], f32[8]) tuple(%k, %u)
  %outer = (s32[], f32[8]) while(%first), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %free = (s32[], f32[8]) while(%first), condition=%inner_cond, body=%body
  %v = f32[8] get-tuple-element(%outer), index=1
  %scattered = f32[4] fusion(%v), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %all = f32[32] all-gather(%v), replica_groups=[1,4]<=[4], dimensions={0}
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run():
  traffic = sharded.read_collectives(LOOPS)
  # The trip count of %free depends on an argument: its body is counted once,
  # and the loop is reported.
  assert traffic.unknown_loops == 1
  # Bytes are those of a ring: an all-reduce makes two passes, each of half.
  assert traffic.by_kind == {
    'all-gather': Traffic(1, 3 * 32),
    'all-reduce': Traffic(5 + 1, 6 * 32),
    'collective-permute': Traffic((5 + 1) * 3, 18 * 32),
    'reduce-scatter': Traffic(1, 16),
  }


def test_every_branch_of_a_conditional_counts():
  text = """
%one (a: f32[6]) -> f32[6] {
  %a = f32[6] parameter(0)
  ROOT %moved = f32[6] collective-permute(%a), source_target_pairs={{0,1}}
}
%body (s: f32[6]) -> f32[6] {
  %s = f32[6] parameter(0)
  ROOT %c = f32[6] conditional(%i, %s, %s), branch_computations={%none, %one}
}
ENTRY %main (x: f32[6]) -> f32[6] {
  ROOT %w = f32[6] while(%x), condition=%go, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501
  by_kind = sharded.read_collectives(text).by_kind
  assert by_kind == {'collective-permute': Traffic(3, 3 * 24)}


def test_a_ragged_exchange_sends_at_most_what_all_devices_have():
  # Each of four devices has six rows and a buffer for those of all, to experts
  # and back. The four send 24 rows at most, six each on average.
  text = """HloModule m, num_partitions=4

ENTRY %main (x: f32[6,8], y: f32[24,8], n: s32[4]) -> f32[6,8] {
  %x = f32[6,8] parameter(0)
  %y = f32[24,8] parameter(1)
  %n = s32[4] parameter(2)
  %there = f32[24,8] ragged-all-to-all(%x, %y, %n, %n, %n, %n), replica_groups={{0,1,2,3}}
  ROOT %back = f32[6,8] ragged-all-to-all(%there, %x, %n, %n, %n, %n), replica_groups={{0,1,2,3}}
}
"""  # noqa: E501
  by_kind = sharded.read_collectives(text).by_kind
  assert by_kind == {'ragged-all-to-all': Traffic(2, 2 * 6 * 8 * 4)}


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ('{{0,2,4},{1,3,5}}', 3),
    ('[2,4]<=[4,2]T(1,0)', 4),
    ("mesh['a'=2,'b'=3,'c'=5] {'a','c'}", 10),
    ("mesh['a'=2,'b'=8], device_ids=([2,8]T(1,0)) {'b':(2)4}", 4),
    ('{}', 7),
  ],
)
def test_every_way_to_write_groups(groups, size):
  line = (
    f'  %r = f32[] parameter(0)\n'
    f'  %g = f32[9] all-gather(%r), replica_groups={groups}, dimensions={{0}}'
  )
  head = 'HloModule m, num_partitions=7\n\nENTRY %main () -> f32[]'
  traffic = sharded.read_collectives(f'{head} {{\n{line}\n}}')
  assert traffic.by_kind['all-gather'].num_bytes == 4 * (size - 1)


@pytest.mark.parametrize(
  ('type_', 'num_bytes'),
  [
    ('bf16[3,5]{1,0:T(8,128)(2,1)}', 30),
    ('(pred[7], /*index=1*/s4[6]{0})', 10),
    ('f8e4m3fn[2,3]', 6),
    ('(f32[], token[])', 4),
    ('s64[<=4]', 32),
  ],
)
def test_bytes_of_a_type(type_, num_bytes):
  text = (
    f'ENTRY %main () -> f32[] {{\n  %p = {type_} parameter(0)\n'
    '  %c = f32[] collective-permute(%p), source_target_pairs={{0,1}}\n}'
  )
  permute_traffic = sharded.read_collectives(text).by_kind['collective-permute']
  assert permute_traffic.num_bytes == num_bytes


def test_a_real_loop_counts_as_often_as_it_runs():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec('x'))

  def body(x, w):
    # Both the rows and the dimension that is summed are split over devices.
    y = jax.lax.with_sharding_constraint(x @ w, split)
    return jnp.tanh(y - y.mean(0, keepdims=True)), None

  def f(x, w):
    return jax.lax.scan(body, x, w)[0]

  x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
  w = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
  replicated = NamedSharding(mesh, PartitionSpec())
  jitted = jax.jit(f, in_shardings=(split, replicated), out_shardings=split)
  text = jitted.lower(x, w).compile().as_text()
  traffic = sharded.read_collectives(text)
  # Every round of the loop sums eight columns over the rows.
  assert traffic.by_kind['all-reduce'] == Traffic(3, 3 * 2 * 32 * 7 // 8)
  assert traffic.unknown_loops == 0
