"""Rooflines by hand, known devices by name, and the peaks of this machine."""

import math
import os
from typing import NamedTuple

import jax
import pytest

from moe_jax.analysis import roofline
from moe_jax.partitioning import make_mesh

N, M, F, E, K = 10, 3, 7, 5, 2


def work(**options):
  return roofline.ffn_work(num_tokens=N, width=M, hidden=F, **options)


def test_a_dense_layer_forward():
  counts = work()
  assert counts.flops == 2 * 10 * (3 * 7 + 7 * 3)
  assert counts.min_bytes == 4 * (2 * 21 + 10 * 3 + 10 * 3)


def test_a_sparse_layer_reads_every_expert_and_serves_every_choice():
  counts = work(num_experts=E, num_selected=K)
  assert counts.flops == 2 * work().flops
  assert counts.min_bytes == 4 * (5 * 2 * 21 + 2 * 30)


def test_backward():
  counts = work(num_experts=E, num_selected=K, backward=True)
  assert counts.flops == 3 * 2 * work().flops
  # Kernels are read twice and their gradients written once; x is read twice; y,
  # dy and dx pass once.
  assert counts.min_bytes == 4 * (3 * 210 + 5 * 30)


def test_router_third_kernel_and_type():
  counts = work(num_experts=E, num_kernels=3, router=True, itemsize=2)
  assert counts.flops == 2 * 10 * 3 * 21 + 2 * 10 * 3 * 5
  assert counts.min_bytes == 2 * (5 * 3 * 21 + 3 * 5 + 2 * 30)


@pytest.mark.parametrize(
  ('flops', 'min_bytes', 'seconds'),
  # The first is limited by products, the second by memory.
  [(300, 10, 3.0), (100, 80, 4.0)],
)
def test_the_slower_of_both_bounds(flops, min_bytes, seconds):
  peaks = roofline.Peaks(100.0, 20.0, 'float32', 512, 64)
  assert roofline.Work(flops, min_bytes).seconds(peaks) == seconds


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_peaks_are_measured(dtype):
  peaks = roofline.measure_peaks(dtype, quick=True)
  assert math.isfinite(peaks.flops_per_second) and peaks.flops_per_second > 0
  assert math.isfinite(peaks.bytes_per_second) and peaks.bytes_per_second > 0
  assert f'({dtype} matmul)' in peaks.describe()


def test_peaks_of_a_round_are_of_its_own_times():
  peaks = roofline.Peaks(1.0, 1.0, 'float32', matmul_size=10, copy_bytes=600)
  seconds = {roofline.MATMUL: [2.0, 4.0], roofline.COPY: [3.0, 1.0]}
  by_round = roofline.by_round(peaks, seconds)
  assert [p.flops_per_second for p in by_round] == [1000.0, 500.0]
  assert [p.bytes_per_second for p in by_round] == [200.0, 600.0]


def test_known_devices_have_their_vendors_capacity():
  assert roofline.device_of('h100').num_bytes == 80_000_000_000
  assert roofline.device_of('v5e').num_bytes == 16_000_000_000
  assert roofline.device_of('v5p').num_bytes == 95_000_000_000


def test_this_machine_has_memory_but_not_more_than_there_is():
  this_machine = roofline.device_of(roofline.HERE)
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert 2**28 < this_machine.num_bytes <= physical


def test_an_unknown_device_names_those_there_are():
  with pytest.raises(ValueError, match=r"'h1000'; did you mean 'h100'.*'v5e'"):
    roofline.device_of('h1000')


class Fake(NamedTuple):
  """The part of a device of JAX that is read."""

  platform: str
  device_kind: str
  compute_capability: str = ''
  process_index: int = 0


def test_the_fast_type_is_bfloat16_where_there_are_products_of_it():
  assert roofline.fast_dtype(Fake('tpu', 'TPU v5 lite')) == 'bfloat16'
  assert roofline.fast_dtype(Fake('gpu', 'NVIDIA L4', '8.9')) == 'bfloat16'
  assert roofline.fast_dtype(Fake('gpu', 'AMD MI300', 'gfx942')) == 'bfloat16'
  assert roofline.fast_dtype(Fake('gpu', 'Tesla T4', '7.5')) == 'float32'
  assert roofline.fast_dtype(jax.devices()[0]) == 'float32'


def test_a_peak_of_several_known_devices_is_their_vendors():
  peak = roofline.peak('bfloat16', 4 * [Fake('tpu', 'TPU v5 lite')])
  assert peak == (4 * 197e12, '4 x TPU v5 lite by its data sheet')
  peak = roofline.peak('float32', [Fake('gpu', 'Tesla T4', '7.5')])
  assert peak.flops_per_second == 8.1e12


def test_devices_that_share_cores_count_as_one():
  assert roofline.num_processors(jax.devices()) == 1
  assert roofline.num_processors(8 * [Fake('gpu', 'NVIDIA L4')]) == 8
  fakes = [Fake('cpu', 'cpu', process_index=i // 4) for i in range(8)]
  assert roofline.num_processors(fakes) == 2


def test_the_devices_of_a_mesh_in_a_line():
  mesh = make_mesh({'data': 2, 'expert': 4})
  assert roofline.describe_mesh(mesh) == '8 x cpu, mesh data=2, expert=4'
  assert roofline.describe_mesh(make_mesh({}, jax.devices()[:1])) == '1 x cpu'


def test_the_peak_of_a_processor_is_measured():
  peak = roofline.peak('float32', jax.devices()[:2], quick=True)
  assert peak.flops_per_second > 0
  assert peak.source == 'a measured product of 512 x 512 matrices'


def test_peaks_of_a_type_that_the_vendor_does_not_name_are_measured():
  chips = 3 * [Fake('tpu', 'TPU v6 lite')]
  assert 'measured' in roofline.peak('float32', chips, quick=True).source
