"""Peaks of devices: the vendors' by name, and that of this machine."""

from typing import NamedTuple

import jax

from moe_jax.analysis import roofline
from moe_jax.partitioning import make_mesh


class Fake(NamedTuple):
  """The part of a device of JAX that is read."""

  platform: str
  device_kind: str
  process_index: int = 0


def test_known_devices_are_those_of_their_vendors():
  assert roofline.device_of('h100').num_bytes == 80_000_000_000
  assert roofline.device_of('v5e').num_bytes == 16_000_000_000
  peak = roofline.peak('bfloat16', 4 * [Fake('tpu', 'TPU v5 lite')])
  assert peak == (4 * 197e12, '4 x TPU v5 lite by its data sheet')
  peak = roofline.peak('float32', [Fake('gpu', 'Tesla T4')])
  assert peak.flops_per_second == 8.1e12


def test_other_peaks_are_measured():
  # Vendors name none of a processor, and not that of every type of a TPU.
  for devices in (jax.devices()[:2], 3 * [Fake('tpu', 'TPU v6 lite')]):
    peak = roofline.peak('float32', devices, quick=True)
    assert peak.flops_per_second > 0 and 'measured' in peak.source


def test_devices_that_share_cores_count_as_one():
  assert roofline.num_processors(jax.devices()) == 1
  assert roofline.num_processors(8 * [Fake('gpu', 'NVIDIA L4')]) == 8
  fakes = [Fake('cpu', 'cpu', process_index=i // 4) for i in range(8)]
  assert roofline.num_processors(fakes) == 2


def test_the_devices_of_a_mesh_in_a_line():
  mesh = make_mesh({'data': 2, 'expert': 4})
  assert roofline.describe_mesh(mesh) == '8 x cpu, mesh data=2, expert=4'
