"""Settings of every test: fake devices, strict ranks, shapes on demand."""

import ctypes
import gc
import os
import pathlib
import sys
import tempfile

from tests import type_checker
from tests.xla_flags import accepts

_CACHE = os.environ.get(
  'MOE_JAX_TEST_CACHE',
  str(pathlib.Path(tempfile.gettempdir()) / 'moe_jax_test_cache'),
)
# The first makes XLA's CPU compiler a third faster; the second saves about a
# tenth of it, as a tiny program is not cut into 32 modules of LLVM.
_FASTER = (
  '--xla_cpu_use_fusion_emitters=false',
  '--xla_cpu_parallel_codegen_split_count=1',
)

# Tiny models compile for longer than they run, so most of XLA's optimizations
# are off; tests marked `as_users_compile` run a second time with all of them.
# These are environment variables so that programs that tests start obey too.
_OPTIMIZED = bool(os.environ.get('MOE_JAX_TEST_OPTIMIZED'))
os.environ |= {
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '0' if _OPTIMIZED else '1',
  'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0',
  # All workers and runs share one cache.
  'JAX_COMPILATION_CACHE_DIR': _CACHE,
  'MOE_JAX_CACHE': str(pathlib.Path(_CACHE) / 'data'),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
  # Threads of torch would spin while they wait for one that has no core.
  'OMP_NUM_THREADS': '1',
}
_flags = os.environ.get('XLA_FLAGS', '')
if not _OPTIMIZED:
  for _flag in _FASTER:
    if _flag not in _flags and accepts(_flag, pathlib.Path(_CACHE) / 'flags'):
      _flags = f'{_flags} {_flag}'
  os.environ['XLA_FLAGS'] = _flags.strip()
# Tracing creates objects by the million, and hardly any garbage.
gc.set_threshold(50_000, 10, 10)

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

from jaxtyping import install_import_hook  # noqa: E402

# Checks of the shapes and types of arguments add a quarter to the time of the
# tests: the whole check (.ci/run) makes them on one of its Pythons.
if os.environ.get('MOE_JAX_TEST_TYPES') == '1':
  install_import_hook(
    type_checker.modules_with_array_types('moe_jax'),
    f'{type_checker.__name__}.checked',
  )

import pytest  # noqa: E402

from moe_jax.devices import forget_programs  # noqa: E402
from moe_jax.kernels import blocks  # noqa: E402
from tests import block_sizes  # noqa: E402

# Models of tests compile sooner with few sizes of blocks; tests of kernels, and
# those of programs as users compile them, have all.
if not _OPTIMIZED:
  blocks.SIXTEENTHS = block_sizes.FEW


def pytest_collection_modifyitems(config, items):
  """Skips `slow` tests unless `-m` or a test's own id asks for them."""
  if config.getoption('-m') or any('::' in arg for arg in config.args):
    return
  slow = [item for item in items if item.get_closest_marker('slow')]
  config.hook.pytest_deselected(items=slow)
  items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Gives each worker whole files, except for the cases of a few long tests."""
  from tests import worker_units  # needs xdist

  if config.getoption('dist') == 'loadfile':
    return worker_units.Units(config, log)


@pytest.fixture(autouse=True, scope='module')
def _few_compiled_programs():
  """Clears compiled programs after a test file, once there are many."""
  yield
  _forget(6_000)


@pytest.fixture(autouse=True)
def _fewer_where_memory_is_full():
  """Clears them between the tests of a file, too, if they fill 2.5 GB."""
  yield
  statm = pathlib.Path('/proc/self/statm')
  pages = int(statm.read_text().split()[1]) if statm.exists() else 0
  if pages * os.sysconf('SC_PAGESIZE') > 2.5e9:
    _forget(0)


def _forget(most_regions):
  """Clears programs, and gives the memory that they had to the system."""
  forget_programs(most_regions)
  if sys.platform == 'linux':
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def closed_pipe():
  """A stream into a pipe whose reader is gone."""
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, 'w', buffering=1) as stream:
    yield stream
