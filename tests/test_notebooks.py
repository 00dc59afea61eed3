"""Every notebook runs from top to bottom, and keeps its outputs.

Numbers are not compared: a notebook's words must hold, but another machine
rounds otherwise.
"""

import os
import pathlib
import re

import jax
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from colab import run_notebooks

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))
TRANSFORMERS = ROOT / 'colab' / '07_checkpoint_to_checkpoint.ipynb'
MESHES = ROOT / 'colab' / '05_train_on_an_accelerator.ipynb'
# Pictures at both ends of each slider, in place of sliders. (A view of a slider
# can make nbclient wait for ever.)
ENDS = (
  "import sys, types; sys.modules['ipywidgets'] = types.SimpleNamespace("
  'interact=lambda draw, **ends: [draw(**{name: end[i] for name, end in '
  'ends.items()}) for i in (0, 1)])'
)


def code_cells(notebook):
  """The code cells that are not empty."""
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  return [cell for cell in cells if cell.source.strip()]


def executed(path, **variables):
  """A notebook after it ran in quick sizes, in an empty kernel."""
  return run_notebooks.executed(
    path,
    timeout=600,  # on a busy machine
    MOE_JAX_QUICK='1',
    JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.2',
    **variables,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'path', [path for path in NOTEBOOKS if path != MESHES], ids=lambda p: p.stem
)
def test_notebook_runs(path):
  if path == TRANSFORMERS:
    pytest.importorskip('torch')
  notebook = executed(path, begin=ENDS)
  assert all(cell.execution_count for cell in code_cells(notebook))


@pytest.mark.slow
def test_on_eight_devices_the_experts_are_split_over_all():
  flag = '--xla_force_host_platform_device_count=8'
  notebook = executed(MESHES, XLA_FLAGS=flag, JAX_PLATFORMS='cpu')
  printed = ''.join(
    output.text
    for cell in code_cells(notebook)
    for output in cell.outputs
    if output.get('name') == 'stdout'
  )
  assert 'mesh: data 1 x expert 8' in printed
  assert printed.count('all-to-all') == 2  # in the kernel, and moved to eight
  assert 'killed and unbroken: the same bits: True' in printed


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_keeps_its_outputs_and_no_error(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
  outputs = [output for cell in cells for output in cell.outputs]
  assert any('image/png' in output.get('data', {}) for output in outputs)
  for output in outputs:
    assert output.output_type != 'error'
    assert output.get('name') != 'stderr', output.text
  # Only the machine of the author has such a path.
  own_path = r'(?<![\w./:])/(?:home|Users|root|work|tmp|mnt)/\w|site-packages'
  assert not re.search(
    own_path, ''.join(str(o.get('text', '')) for o in outputs)
  )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_in_colab_by_the_badge_below_its_title(path):
  colab = 'https://colab.research.google.com'
  own = f'{colab}/github/moe-jax/moe_jax/blob/main/colab/{path.name}'
  badge = f'[![Open in Colab]({colab}/assets/colab-badge.svg)]({own})'
  title = nbformat.read(path, as_version=4).cells[0].source.split('\n')
  assert title[0].startswith('# ') and title[2] == badge


def test_notebooks_that_use_the_package_install_it_in_the_same_cell():
  users = [path for path in NOTEBOOKS if path.stem != '00_one_file']
  cells = {code_cells(nbformat.read(p, as_version=4))[0].source for p in users}
  assert len(cells) == 1


def test_the_notebook_of_the_one_file_is_that_file():
  stored = nbformat.read(ROOT / 'colab' / '00_one_file.ipynb', as_version=4)
  made = run_notebooks.of_one_file()
  assert [c.source for c in stored.cells] == [c.source for c in made.cells]


def test_an_error_fails_the_run_and_its_kernel_ends(tmp_path):
  pid = "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))"
  lines = [pid, 'raise ValueError("seven slots")']
  cells = [nbformat.v4.new_code_cell(line) for line in lines]
  path = tmp_path / 'broken.ipynb'
  nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
  with pytest.raises(CellExecutionError, match='seven slots'):
    run_notebooks.executed(path, timeout=60)
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / 'pid').read_text()), 0)
