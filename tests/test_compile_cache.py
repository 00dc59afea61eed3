"""Compiled programs on disk: their folder, their number, equal results."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from moe_jax import devices
from moe_jax.devices import OFF, keep_programs

SETTINGS = (
  'jax_compilation_cache_dir',
  'jax_enable_compilation_cache',
  'jax_persistent_cache_min_compile_time_secs',
)


@pytest.fixture(autouse=True)
def _as_without_settings(monkeypatch):
  """Resets JAX's settings for a test, and restores those of the others."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  jax.config.update('jax_compilation_cache_dir', None)
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def run(x):
  """The outputs of a program that is compiled, or found on disk."""
  # JAX keeps programs by their function, which is another in each call.
  return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T))(x))


def files(folder):
  """The programs in a folder, with the time at which each was written."""
  return {path.name: path.stat().st_mtime_ns for path in folder.glob('*-cache')}


def test_a_program_is_found_again_and_computes_the_same_bits(tmp_path):
  x = np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7)
  assert keep_programs(str(tmp_path / 'kept')) == ''
  compiled = run(x)
  programs = files(tmp_path / 'kept')
  assert programs
  events = []
  jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
  np.testing.assert_array_equal(run(x), compiled)
  assert '/jax/compilation_cache/cache_hits' in events
  # A file that was cut short costs a warning and the time of compiling.
  for name in programs:
    (tmp_path / 'kept' / name).write_bytes(b'cut')
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    np.testing.assert_array_equal(run(x), compiled)
  assert any('persistent compilation cache' in str(w.message) for w in caught)


def test_the_default_place_is_below_the_root_of_the_cache(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  assert keep_programs() == ''
  folder = tmp_path / 'compiled'
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert folder.is_dir()


def test_a_folder_that_jax_was_told_of_is_left_as_it_is(tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  assert keep_programs() == ''
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')
  assert not (tmp_path / 'own').exists()
  assert keep_programs(str(tmp_path / 'flag')) == ''
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'flag')


def test_a_place_that_has_no_effect_is_said(tmp_path, monkeypatch):
  jax.config.update('jax_enable_compilation_cache', False)
  assert 'JAX_ENABLE_COMPILATION_CACHE' in keep_programs(str(tmp_path))
  assert keep_programs() == ''
  jax.config.update('jax_enable_compilation_cache', True)
  # Hosts of a run with several processes may have no folder in common.
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  assert keep_programs() == ''
  assert not (tmp_path / 'compiled').exists()
  assert keep_programs(str(tmp_path / 'shared')) == ''
  assert (tmp_path / 'shared').exists()


def test_it_can_be_turned_off(tmp_path, monkeypatch):
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  assert keep_programs(OFF) == ''
  run(np.ones((2, 3)))
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_gone_without(tmp_path):
  (tmp_path / 'file').touch()
  problem = keep_programs(str(tmp_path / 'file' / 'below'))
  assert problem.startswith('compiled programs are not kept: ')
  assert jax.config.jax_compilation_cache_dir is None
  assert run(np.ones((2, 3))).shape == (2, 2)


def test_the_oldest_programs_are_deleted_beyond_the_bound(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(devices, 'MOST_BYTES', 10)
  for age, name in enumerate(('new', 'middle', 'old')):
    path = tmp_path / f'{name}-cache'
    path.write_bytes(b'four')
    os.utime(path, (1000 - age, 1000 - age))
  (tmp_path / 'another').write_bytes(b'a file that is no program')
  assert keep_programs(str(tmp_path)) == ''
  assert len(list(tmp_path.iterdir())) == 4  # the user's folder stays whole
  folder = tmp_path / 'compiled'
  folder.mkdir()
  for path in list(tmp_path.glob('*-cache')):
    path.rename(folder / path.name)
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', None)
  assert keep_programs() == ''
  names = sorted(path.name for path in folder.iterdir())
  assert names == ['middle-cache', 'new-cache']
