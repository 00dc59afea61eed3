"""House rules of every test: fake devices, strict ranks, checked shapes."""

import gc
import importlib.util
import mmap
import os
import pathlib
import tempfile

_CACHE = os.environ.get(
  'MOE_JAX_TEST_CACHE',
  str(pathlib.Path(tempfile.gettempdir()) / 'moe_jax_test_cache'),
)
_FASTER = '--xla_cpu_use_fusion_emitters=false'


def _known(flag: str) -> bool:
  """Whether this XLA has the flag: one that it has not ends the process."""
  folder = pathlib.Path(importlib.util.find_spec('jaxlib').origin).parent
  for path in folder.glob('*jax_common*'):
    with (
      path.open('rb') as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
    ):
      if text.find(flag.encode()) >= 0:
        return True
  return False


# Most of the suite's time is compiling; tiny models compile for longer than
# they run. In the environment, so that programs that tests start do as tests.
os.environ |= {
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0',
  # One for all workers and runs.
  'JAX_COMPILATION_CACHE_DIR': _CACHE,
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
  # Those of torch spin while they wait for one that has no core.
  'OMP_NUM_THREADS': '1',
}
_flags = os.environ.get('XLA_FLAGS', '')
if _FASTER not in _flags and _known(_FASTER.split('=')[0].lstrip('-')):
  os.environ['XLA_FLAGS'] = f'{_flags} {_FASTER}'.strip()
# Tracing makes objects by the million, and hardly any garbage.
gc.set_threshold(50_000, 10, 10)

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook('moe_jax', 'beartype.beartype')

import pytest  # noqa: E402


def pytest_collection_modifyitems(config, items):
  """Leaves out `slow` tests unless `-m` or a test's own id asks for them."""
  if config.getoption('-m') or any('::' in arg for arg in config.args):
    return
  slow = [item for item in items if item.get_closest_marker('slow')]
  config.hook.pytest_deselected(items=slow)
  items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path_factory, monkeypatch):
  """Prepared data goes to one folder of the test run, never to the user's."""
  monkeypatch.setenv('MOE_JAX_CACHE', str(pathlib.Path(_CACHE) / 'data'))
