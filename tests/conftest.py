"""House rules of every test: fake devices, strict ranks, checked shapes."""

import os
import pathlib
import tempfile

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tiny models compile for longer than they run.
jax.config.update('jax_disable_most_optimizations', True)
# One cache for all workers and runs: most of the suite's time is compiling.
_CACHE = os.environ.get(
  'MOE_JAX_TEST_CACHE',
  str(pathlib.Path(tempfile.gettempdir()) / 'moe_jax_test_cache'),
)
jax.config.update('jax_compilation_cache_dir', _CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

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
