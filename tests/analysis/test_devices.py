"""Known devices by name, and the memory of this one."""

import os

import pytest

from moe_jax.analysis import devices


def test_known_devices_have_their_vendors_capacity():
  assert devices.get('h100').num_bytes == 80_000_000_000
  assert devices.get('v5e').num_bytes == 16_000_000_000
  assert devices.get('v5p').num_bytes == 95_000_000_000


def test_this_machine_has_memory_but_not_more_than_there_is():
  here = devices.get(devices.HERE)
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert 2**28 < here.num_bytes <= physical


@pytest.mark.parametrize(
  ('written', 'expected'), [('4096\n', 4096), ('max\n', None), (None, None)]
)
def test_a_limit_of_the_process_group_counts(tmp_path, written, expected):
  file = tmp_path / 'memory.max'
  if written is not None:
    file.write_text(written)
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert devices.host_bytes(file) == (expected or physical)


def test_an_unknown_device_names_those_there_are():
  with pytest.raises(ValueError, match=r"'h1000'; did you mean 'h100'.*'v5e'"):
    devices.get('h1000')
