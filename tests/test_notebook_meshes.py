"""The notebook about accelerators uses all devices that a runtime has."""

import pathlib

import jax
import pytest

from colab import run_notebooks

PATH = pathlib.Path(
  run_notebooks.ROOT, 'colab', '05_train_on_an_accelerator.ipynb'
)


@pytest.mark.slow
def test_on_eight_devices_the_experts_are_split_over_all():
  notebook = run_notebooks.executed(
    PATH,
    timeout=600,  # on a busy machine
    MOE_JAX_QUICK='1',
    XLA_FLAGS='--xla_force_host_platform_device_count=8',
    JAX_PLATFORMS='cpu',
    JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.2',
  )
  printed = ''.join(
    output.text
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if output.get('name') == 'stdout'
  )
  assert 'mesh: data 1 x expert 8' in printed
  assert printed.count('all-to-all') == 2  # in the kernel, and moved to eight
  assert 'killed and unbroken: the same bits: True' in printed
