"""Rooflines by hand, and the peaks of this machine."""

import math

import pytest

from experiments.benchmarks import roofline
from experiments.benchmarks.moe_layer import Sizes

N, M, F, E, K = 10, 3, 7, 5, 2


def work(E=1, K=1, backward=False, router=False, **sizes):
  return Sizes(N, M, F, **sizes).work(E, K, backward=backward, router=router)


def test_a_sparse_layer_reads_every_expert_and_serves_every_choice():
  counts, products = work(E, K), 2 * 2 * 10 * (3 * 7 + 7 * 3)
  assert counts.flops == products
  assert counts.min_bytes == 4 * (5 * 2 * 21 + 2 * 30)
  counts = work(E, K, backward=True)
  assert counts.flops == 3 * products
  # Kernels are read twice and their gradients written once; x is read twice; y,
  # dy and dx pass once.
  assert counts.min_bytes == 4 * (3 * 210 + 5 * 30)
  # A router, a third kernel, and numbers of two bytes.
  counts = work(E, router=True, activation='swiglu', dtype='bfloat16')
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


def test_peaks_are_measured():
  peaks = roofline.measure_peaks('bfloat16', quick=True)
  assert math.isfinite(peaks.flops_per_second) and peaks.flops_per_second > 0
  assert math.isfinite(peaks.bytes_per_second) and peaks.bytes_per_second > 0


def test_peaks_of_a_round_are_of_its_own_times():
  peaks = roofline.Peaks(1.0, 1.0, 'float32', matmul_size=10, copy_bytes=600)
  seconds = {roofline.MATMUL: [2.0, 4.0], roofline.COPY: [3.0, 1.0]}
  by_round = roofline.by_round(peaks, seconds)
  assert [p.flops_per_second for p in by_round] == [1000.0, 500.0]
  assert [p.bytes_per_second for p in by_round] == [200.0, 600.0]
