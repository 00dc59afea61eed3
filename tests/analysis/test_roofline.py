"""Known devices by name, and the peak of this machine."""

import os
from typing import NamedTuple

import jax
import pytest

from moe_jax.analysis import roofline
from moe_jax.devices import memory_of
from moe_jax.partitioning import make_mesh


def test_known_devices_have_their_vendors_capacity():
  assert roofline.device_of('h100').num_bytes == 80_000_000_000
  assert roofline.device_of('v5e').num_bytes == 16_000_000_000
  assert roofline.device_of('v5p').num_bytes == 95_000_000_000


def test_this_machine_has_memory_but_not_more_than_there_is():
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert 2**28 < memory_of(jax.devices()[:1]) <= physical


def test_an_unknown_device_names_those_there_are():
  with pytest.raises(ValueError, match=r"'h1000'; did you mean 'h100'.*'v5e'"):
    roofline.device_of('h1000')


class Fake(NamedTuple):
  """The part of a device of JAX that is read."""

  platform: str
  device_kind: str
  process_index: int = 0


def test_a_peak_of_several_known_devices_is_their_vendors():
  peak = roofline.peak('bfloat16', 4 * [Fake('tpu', 'TPU v5 lite')])
  assert peak == (4 * 197e12, '4 x TPU v5 lite by its data sheet')
  peak = roofline.peak('float32', [Fake('gpu', 'Tesla T4')])
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
