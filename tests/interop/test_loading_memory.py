"""Loading needs the memory of the parameters, one file and a gigabyte."""

import shutil

import pytest

from experiments import bench_loading
from experiments.benchmarks import random_checkpoint


def test_all_bits_of_every_file_arrive_in_the_dtype_of_the_file(tmp_path):
  written = random_checkpoint.write(tmp_path, random_checkpoint.TINY, 15_000)
  assert written.files > 3 and written.largest_file <= 15_000
  for axes, copies in (({}, 1), ({'expert': 8}, 8)):
    row = bench_loading.load(tmp_path, axes)
    assert row['digest'] == written.digest
    # Routers and norms of two layers are float32.
    single = 2 * 24 * 8 + 2 * (2 * 24 + 2 * 6) + 24
    experts = 2 * 2 * 8 * 3 * 24 * 16
    assert row['once'] == written.total + 2 * single
    assert row['dtypes'] == {
      'float32': copies * 4 * single,
      'bfloat16': copies * (written.total - 2 * single - experts) + experts,
    }
    assert row['placed'] == sum(row['dtypes'].values())


@pytest.mark.slow
def test_a_gigabyte_and_more_on_eight_devices(tmp_path, monkeypatch):
  # Without XLA's optimizations, which other tests do without, arrays are
  # copied for each tensor that is put into them.
  for name in ('JAX_DISABLE_MOST_OPTIMIZATIONS', 'XLA_FLAGS'):
    monkeypatch.delenv(name, raising=False)
  folder = tmp_path / 'checkpoint'
  try:
    config = random_checkpoint.config_of(1.3e9)
    written = random_checkpoint.write(folder, config, 0.2e9)
    (row,) = bench_loading.measure(folder, written, [{'fsdp': 8}])
  finally:
    shutil.rmtree(folder)  # pytest would keep it for the next runs
  assert row['placed'] == pytest.approx(1.3e9, rel=0.01)
  # A second copy of the parameters would not fit into this.
  assert row['peak'] <= row['placed'] + written.largest_file + 1e9, row
